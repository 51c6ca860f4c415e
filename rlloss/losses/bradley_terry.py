"""Bradley-Terry: a reward model from pairs."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Moments
from rlloss.preference import logistic_loss, mean_of_rows, row_mask
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, zero_masked

__all__ = ["BradleyTerryLoss"]


class BradleyTerryLoss(Loss):
    """The reward-model loss, equation 1 of https://arxiv.org/abs/2203.02155, with margins and centring.

    Margins are those of equation 2 of https://arxiv.org/abs/2307.09288: a pair that raters found far apart must be
    scored further apart. Pairs fix rewards only up to a constant; centring, https://arxiv.org/abs/2312.09244, pulls
    each pair's sum to 0.

        x = (r_w - r_l - margin) / temperature
        loss = -log sigmoid(x), smoothed as `rlloss.DPOLoss` is, + center_coef (r_w + r_l)^2
        dloss/dr_w = (sigmoid(x) - 1 + label_smoothing) / temperature + 2 center_coef (r_w + r_l)
        dloss/dr_l = -(sigmoid(x) - 1 + label_smoothing) / temperature + 2 center_coef (r_w + r_l)

    forward(chosen_rewards, rejected_rewards): one reward per answer `[B]`, float32 or float64.

    Optional: `margin` (per pair `[B]`), `mask` (pairs that count), `weights` (scale a pair; 0 rejects it and keeps the
    denominator), `normalizer` (`rlloss.count` of the pairs, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of pairs with r_w > r_l), margin (r_w - r_l, with margin_std), chosen_reward,
    rejected_reward.

    Args:
        temperature: Difference of rewards, in units of the reward, that is one nat of log-odds.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        center_coef: Weight of the centring.

    >>> import torch
    >>> loss, metrics = BradleyTerryLoss()(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]))
    >>> round(loss.item(), 4), float(metrics["accuracy"])
    (1.1269, 0.5)
    """

    family = "reward"

    def __init__(self, *, temperature: float = 1.0, label_smoothing: float = 0.0, center_coef: float = 0.0) -> None:
        super().__init__()
        check_range(self._who, "temperature", temperature, 0, open_low=True)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        check_range(self._who, "center_coef", center_coef, 0)
        self.temperature, self.label_smoothing, self.center_coef = temperature, label_smoothing, center_coef

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
        mask = row_mask(
            self._who,
            mask,
            {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards},
            {"margin": margin, "weights": weights},
            hint="rlloss.ScalarModel.score makes it",
        )
        chosen, rejected = zero_masked(mask, chosen_rewards, rejected_rewards)
        inputs = (chosen, rejected) if margin is None else (chosen, rejected, *zero_masked(mask, margin.detach()))
        loss = mean_of_rows(self.pair_loss, inputs, mask, weights, normalizer)
        difference = chosen - rejected
        return LossOutput(
            loss,
            {
                "accuracy": Mean.of((difference > 0).to(difference.dtype), mask),
                "margin": Moments.of(difference, mask),
                "chosen_reward": Mean.of(chosen, mask),
                "rejected_reward": Mean.of(rejected, mask),
            },
        )

    def pair_loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        """The loss of each pair."""
        loss = logistic_loss((chosen - rejected - margin) / self.temperature, self.label_smoothing)
        if self.center_coef:
            loss = loss + self.center_coef * (chosen + rejected).square()
        return loss
