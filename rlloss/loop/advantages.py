"""From a rollout's rewards to its advantages: KL and running statistics in the reward, then groups or a critic."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rlloss._checks import check_choice, check_range
from rlloss.advantages.gae import gae
from rlloss.advantages.group import compares_within_groups, group_advantages
from rlloss.advantages.presets import needed_inputs, preset_options
from rlloss.advantages.running import AdaptiveKLController, FixedKLController, RunningRewardNorm
from rlloss.advantages.shaping import kl_shaped_rewards
from rlloss.advantages.whiten import whiten
from rlloss.divergence import kl_k1, kl_k2, kl_k3
from rlloss.loop.batch import Batch
from rlloss.loop.session import Session
from rlloss.output import ExplainedVariance, Moments
from rlloss.reduce import sequence_lengths, sequence_sum

__all__ = ["CriticAdvantages", "GroupAdvantages", "ShapedAdvantages"]

KLController = FixedKLController | AdaptiveKLController
RewardKL = Literal["k1", "k2", "k3", "abs"]

_ESTIMATORS: dict[RewardKL, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "abs": lambda logprobs, ref_logprobs: kl_k1(logprobs, ref_logprobs).abs(),
}


class ShapedAdvantages(nn.Module):
    """Base of the advantages that shape rewards first; its state (controller, norm) rides in the session's checkpoint.

    Args:
        kl_coef: Weight of the KL to the reference in the reward: a number or a controller, which is updated with the
            mean KL per sequence after every rollout.
        kl: Its estimator per token. Only `k1` makes the policy descend KL(pi || ref) (`rlloss.kl_shaped_rewards`);
            `k2`, `k3` and `abs` (of k1) are penalties that other libraries have.
        reward_norm: Normalises rewards by all that were seen, those of this step included.
    """

    def __init__(
        self,
        *,
        kl_coef: float | KLController = 0.0,
        kl: RewardKL = "k1",
        reward_norm: RunningRewardNorm | None = None,
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, "kl", kl, get_args(RewardKL))
        self.kl: RewardKL = kl
        if not isinstance(kl_coef, int | float | FixedKLController | AdaptiveKLController):
            raise ValueError(f"{type(self).__name__}: kl_coef must be a number or a KL controller, got {kl_coef!r}")
        self.kl_controller = FixedKLController(kl_coef) if isinstance(kl_coef, int | float) else kl_coef
        self.reward_norm = reward_norm

    needs_greedy = False  # whether batches have `greedy_rewards`, those of a greedy completion of each row's prompt

    @property
    def needs_reference(self) -> bool:
        """Whether the reward has a KL part."""
        return bool(self.kl_controller.kl_coef > 0)

    def forward(self, session: Session, batch: Batch) -> dict[str, float]:
        """Sets `advantages`, and what else the loss needs, of a batch that `rollout` made; returns numbers to log."""
        raise NotImplementedError

    def shaped(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Rewards per token, the sequence's own at its last, and what is logged of them."""
        rewards, mask = batch.fields["rewards"], batch.loss_mask
        if self.reward_norm is not None:
            if "token_rewards" in batch.fields:
                raise ValueError(
                    f"{type(self).__name__}: reward_norm is for one reward per answer, got rewards per token"
                )
            self.reward_norm.update(Moments.of(rewards.double(), torch.ones_like(rewards, dtype=torch.bool)))
            rewards = self.reward_norm(rewards)
        rewards = batch.fields.get("token_rewards", rewards)
        old_logprobs = batch.fields["old_logprobs" if "old_logprobs" in batch.fields else "rollout_logprobs"]
        kl = torch.zeros_like(old_logprobs)
        numbers = {}
        if self.needs_reference:
            kl = _ESTIMATORS[self.kl](old_logprobs, batch.fields["ref_logprobs"])
            per_sequence = sequence_sum(kl, mask).mean()
            numbers = {"sequence_kl": float(per_sequence), "kl_coef": float(self.kl_controller.kl_coef)}
        shaped = kl_shaped_rewards(rewards, kl, mask, self.kl_controller.kl_coef.to(rewards.dtype))
        if self.needs_reference:
            self.kl_controller.update(numbers["sequence_kl"], len(mask))
        return shaped, numbers


class GroupAdvantages(ShapedAdvantages):
    """`rlloss.preset_advantages` of rewards that carry the KL, as RLOO's paper has it.

    `remax` makes `train_online` sample a greedy completion per prompt.

    Args:
        name: One of `rlloss.list_advantages()`.
        kl_coef: See `ShapedAdvantages`, as for `kl` and `reward_norm`.
        **options: Of `rlloss.group_advantages`, in place of what the name stands for: `scale`, `baseline`, `eps`, ...

    >>> GroupAdvantages("rloo", kl_coef=0.05).needs_reference
    True
    """

    options: dict[str, Any]

    def __init__(
        self,
        name: str = "grpo",
        *,
        kl_coef: float | KLController = 0.0,
        kl: RewardKL = "k1",
        reward_norm: RunningRewardNorm | None = None,
        **options: Any,
    ) -> None:
        super().__init__(kl_coef=kl_coef, kl=kl, reward_norm=reward_norm)
        self.options = {"scale": "group", "baseline": "mean"} | preset_options(name, who="GroupAdvantages") | options
        self.scale, self.baseline = self.options["scale"], self.options["baseline"]
        self.compares_within_groups = compares_within_groups(self.scale, self.baseline)
        needs = needed_inputs(self.scale, self.baseline)
        self.needs_lengths, self.needs_greedy = "weights" in needs, "baselines" in needs
        # options that contradict each other show before a rollout is paid for
        nothing = torch.zeros(0)
        inputs: dict[str, Any] = dict.fromkeys(needs, nothing)
        group_advantages(nothing, nothing.long(), **self.options, **inputs)

    def forward(self, session: Session, batch: Batch) -> dict[str, float]:
        """Sets one advantage per sequence."""
        shaped, numbers = self.shaped(batch)
        totals, options = sequence_sum(shaped, batch.loss_mask), self.options.copy()
        if self.needs_lengths:
            options["weights"] = sequence_lengths(batch.loss_mask)
        if self.needs_greedy:
            greedy = batch.fields["greedy_rewards"]
            options["baselines"] = greedy if self.reward_norm is None else self.reward_norm(greedy)
        batch.fields["advantages"] = group_advantages(totals, batch.fields["group_ids"], **options)
        return numbers


class CriticAdvantages(ShapedAdvantages):
    """PPO's advantages: rewards with the KL in them, `rlloss.gae` over the session's critic, whitened.

    Sets `advantages`, `returns` and `old_values`; logs explained_variance_before, what the critic as it was before the
    updates explains of the rewards that were still to come.

    Args:
        gamma: Discount per token.
        gae_lambda: Between one-step errors (0) and whole returns (1).
        whiten: Gives the advantages of a step mean 0 and variance 1.
        bootstrap: Adds the critic's value behind the last token of sequences that were cut. For rewards that would
            have gone on; a reward of the whole answer has been given, cut or not, and would count twice.
        **shaping: `ShapedAdvantages`.

    >>> CriticAdvantages(gae_lambda=1.0).needs_reference
    False
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten: bool = True,
        bootstrap: bool = False,
        **shaping: Any,
    ) -> None:
        super().__init__(**shaping)
        check_range("CriticAdvantages", "gamma", gamma, 0, 1)
        check_range("CriticAdvantages", "gae_lambda", gae_lambda, 0, 1)
        self.gamma, self.gae_lambda, self.whiten, self.bootstrap = gamma, gae_lambda, whiten, bootstrap

    def forward(self, session: Session, batch: Batch) -> dict[str, float]:
        """Sets advantages, returns and old values, all per token."""
        rewards, numbers = self.shaped(batch)
        mask, values = batch.loss_mask, session.values(batch)
        last_value = None
        if self.bootstrap:
            behind = values.gather(1, batch.last_index[:, None]).squeeze(1)
            last_value = torch.where(batch.fields["finished"], 0, behind)
        advantages, returns = gae(rewards, values, mask, self.gamma, self.gae_lambda, last_value)
        _, to_come = gae(rewards, values, mask, self.gamma, 1.0, last_value)
        batch.fields |= {
            "advantages": whiten(advantages, mask) if self.whiten else advantages,
            "returns": returns,
            "old_values": torch.where(mask, values, 0),
        }
        return numbers | {"explained_variance_before": float(ExplainedVariance.of(values, to_come, mask))}
