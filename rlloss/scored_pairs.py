"""What the losses of reward models over pairs share: mask at the door, difference, reduction, metrics."""

import torch
from torch import Tensor

from rlloss._checks import check_device, check_mask
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Metric, Moments
from rlloss.preference import mean_of_rows, row_mask
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, zero_masked

__all__ = ["ScoredPairLoss", "TiedPairLoss"]


class ScoredPairLoss(Loss):
    """Base of the losses that train a reward model on pairs: a subclass writes the loss of a pair.

    forward(chosen_rewards, rejected_rewards): one reward per answer `[B]`, float32 or float64.

    Optional: `margin` (per pair `[B]`), `mask` (pairs that count), `weights` (scale a pair; 0 rejects it and keeps the
    denominator), `normalizer` (`rlloss.count` of the pairs, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of pairs with r_w > r_l), margin (r_w - r_l, with margin_std), chosen_reward,
    rejected_reward.
    """

    family = "reward"

    def pair_loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """The loss of each pair."""
        raise NotImplementedError

    def forward(
        self,
        chosen_rewards: Float[Tensor, " B"],
        rejected_rewards: Float[Tensor, " B"],
        *,
        margin: Float[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        mask = _pair_mask(self._who, mask, chosen_rewards, rejected_rewards, {"margin": margin, "weights": weights})
        extra = () if margin is None else zero_masked(mask, margin.detach())
        chosen, rejected = zero_masked(mask, chosen_rewards, rejected_rewards)
        loss = mean_of_rows(self.pair_loss, (chosen, rejected, *extra), mask, weights, normalizer)
        return LossOutput(loss, _metrics(chosen, rejected, mask))


class TiedPairLoss(Loss):
    """Base of the losses on pairs of which some are ties: a subclass writes the loss of a win and that of a tie.

    forward(chosen_rewards, rejected_rewards, ties=...): as `rlloss.ScoredPairLoss`, with True in `ties` `[B]` where
    raters found both answers alike, so that it does not matter which of them is called chosen; none where it is None.
    There are no margins. Metrics: those of the base over the pairs that have a winner, and tie_distance, the mean
    |r_w - r_l| of the others.
    """

    family = "reward"

    def win_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each pair whose winner was preferred, by h = r_w - r_l."""
        raise NotImplementedError

    def tie_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each tie, by the difference h of its rewards."""
        raise NotImplementedError

    def forward(
        self,
        chosen_rewards: Float[Tensor, " B"],
        rejected_rewards: Float[Tensor, " B"],
        *,
        ties: Bool[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        mask = _pair_mask(self._who, mask, chosen_rewards, rejected_rewards, {"weights": weights})
        tied = torch.zeros_like(mask) if ties is None else self._checked(ties, chosen_rewards)
        chosen, rejected = zero_masked(mask, chosen_rewards, rejected_rewards)

        def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
            h = chosen - rejected
            return torch.where(tied, self.tie_loss(h), self.win_loss(h))

        loss = mean_of_rows(pair_loss, (chosen, rejected), mask, weights, normalizer)
        distance = Mean.of((chosen - rejected).abs(), mask & tied)
        return LossOutput(loss, _metrics(chosen, rejected, mask & ~tied) | {"tie_distance": distance})

    def _checked(self, ties: Tensor, chosen_rewards: Tensor) -> Tensor:
        check_mask(self._who, "ties", ties, ndim=(1,))
        if ties.shape != chosen_rewards.shape:
            raise ValueError(
                f"{self._who}: ties must be {list(chosen_rewards.shape)} as chosen_rewards, got {list(ties.shape)}"
            )
        check_device(self._who, "ties", ties, "chosen_rewards", chosen_rewards)
        return ties


def _pair_mask(
    who: str, mask: Tensor | None, chosen: Tensor, rejected: Tensor, optional: dict[str, Tensor | None]
) -> Tensor:
    inputs = {"chosen_rewards": chosen, "rejected_rewards": rejected}
    return row_mask(who, mask, inputs, optional, hint="rlloss.ScalarModel.score makes it")


def _metrics(chosen: Tensor, rejected: Tensor, decided: Tensor) -> dict[str, Metric]:
    """Those of the pairs that have a winner."""
    difference = chosen - rejected
    return {
        "accuracy": Mean.of((difference > 0).to(difference.dtype), decided),
        "margin": Moments.of(difference, decided),
        "chosen_reward": Mean.of(chosen, decided),
        "rejected_reward": Mean.of(rejected, decided),
    }
