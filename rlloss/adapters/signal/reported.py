"""Losses of the library that also report what Signal's metrics want of them; no formula of a loss stands here."""

from typing import Any

import torch
from torch import Tensor

from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.output import LossOutput, Max, Mean, Metric, Min, Moments
from rlloss.policy import PolicyLoss
from rlloss.protocol import Exactness, Loss
from rlloss.reduce import Counts, count, last_tokens
from rlloss.surrogate import bounded, log_ratios

__all__ = ["ReportedImportanceSampling", "ReportedPolicy", "ReportedRewards"]


class ReportedPolicy(Loss):
    """A policy loss, alone or with a critic, that reports its parts: policy_loss, value_loss, penalty.

    Args:
        loss_fn: What is trained.
        surrogate: The same policy loss without its KL term and entropy bonus; `penalty` is what those add.
    """

    family = "policy"

    def __init__(self, loss_fn: PolicyLoss | ActorCriticLoss, surrogate: PolicyLoss) -> None:
        super().__init__()
        self.loss_fn, self.surrogate = loss_fn, surrogate

    @property
    def exactness(self) -> Exactness:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the loss that is trained."""
        return self.loss_fn.exactness

    @property
    def needs_reference(self) -> bool:
        """As the loss that is trained."""
        return self.loss_fn.needs_reference

    @property
    def needs_critic(self) -> bool:
        """As the loss that is trained."""
        return self.loss_fn.needs_critic

    def forward(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        normalizer: Counts | None = None,
        values: Tensor | None = None,
        old_values: Tensor | None = None,
        returns: Tensor | None = None,
        **keywords: Any,
    ) -> LossOutput:
        """The loss, with the reports among its metrics."""
        inputs = (logprobs, old_logprobs, advantages, loss_mask)
        critic = {"values": values, "old_values": old_values, "returns": returns} if self.needs_critic else {}
        out = self.loss_fn(*inputs, ref_logprobs=ref_logprobs, normalizer=normalizer, **critic, **keywords)
        own = count(loss_mask)
        step = own if normalizer is None else normalizer

        def share(loss: Tensor) -> Mean:
            # parts of a step add up to its loss; as a mean over tokens they do so when metrics are merged
            return Mean(loss.detach() * step.tokens, own.tokens)

        with torch.no_grad():
            policy_loss = self.surrogate(*inputs, normalizer=normalizer).loss
            reports: dict[str, Metric] = {"policy_loss": share(policy_loss), "penalty": share(out.loss - policy_loss)}
            if isinstance(self.loss_fn, ActorCriticLoss):
                value_loss = self.loss_fn.value(values, old_values, returns, loss_mask, normalizer=normalizer).loss
                reports["value_loss"] = share(value_loss)
        return LossOutput(out.loss, out.metrics | reports)


class ReportedImportanceSampling(ReportedPolicy):
    """Importance sampling that reports the weights of whole sequences, each counted once: is_ratio, is_clipped."""

    def __init__(self, loss_fn: ImportanceSamplingLoss, surrogate: ImportanceSamplingLoss) -> None:
        super().__init__(loss_fn, surrogate)
        self.ratio_min, self.ratio_max, self.max_log_ratio = loss_fn.ratio_min, loss_fn.ratio_max, loss_fn.max_log_ratio

    def forward(
        self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor, **keywords: Any
    ) -> LossOutput:
        """The loss, with the reports among its metrics."""
        out = super().forward(logprobs, old_logprobs, advantages, loss_mask, **keywords)
        old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
        log_ratio = log_ratios(logprobs.detach(), old_logprobs, loss_mask, "sequence")
        ratio, once = bounded(log_ratio, self.max_log_ratio).exp(), last_tokens(loss_mask)
        is_clipped = (ratio < self.ratio_min) | (ratio > self.ratio_max)
        reports: dict[str, Metric] = {
            "is_ratio": Mean.of(ratio, once),
            "is_ratio_max": Max.of(ratio, once),
            "is_ratio_min": Min.of(ratio, once),
            "is_clipped": Mean.of(is_clipped.to(ratio.dtype), once),
        }
        return LossOutput(out.loss, out.metrics | reports)


class ReportedRewards(Loss):
    """Bradley-Terry that reports the spread of each side."""

    family = "reward"

    def __init__(self, loss_fn: BradleyTerryLoss) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, chosen_rewards: Tensor, rejected_rewards: Tensor, *, mask: Tensor, **keywords: Any) -> LossOutput:
        """The loss, with the reports among its metrics."""
        out = self.loss_fn(chosen_rewards, rejected_rewards, mask=mask, **keywords)
        sides = {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards}
        return LossOutput(out.loss, out.metrics | {name: Moments.of(x, mask) for name, x in sides.items()})
