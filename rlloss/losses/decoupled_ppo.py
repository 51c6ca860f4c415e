"""Decoupled PPO: clipped around one policy, sampled from another."""

import math
from typing import Any, Unpack

from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric, Moments
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss
from rlloss.surrogate import bounded

__all__ = ["DecoupledPPOLoss"]


class DecoupledPPOLoss(ClippedPolicyLoss):
    """PPO's decoupled objective, https://arxiv.org/abs/2110.00641, as AReaL has it, https://arxiv.org/abs/2505.24298.

    The policy that limits the update need not be the one that wrote the answers: clipped around a recent policy, stale
    answers are not thrown away for their age, and a weight corrects for who wrote them.

        w = min(exp(old - rollout), ratio_max)
        loss = (1/N) sum_t sg[w] max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)
        dloss/dl_t = -(1/N) w_t r_t A_t    where the clip does not bind, else 0

    `old_logprobs` are those of the proximal policy, around which r is clipped (recomputed at the start of the update,
    or of a moving average); `rollout_logprobs`, which it needs, are those that the answers were sampled with. The
    weight scales the KL term as well, which so descends what it names under the sampler's answers. It is PPO with the
    token weights of `rlloss.importance_correction`, which has other ways to hold w. Base class: inputs, options and
    metrics; adds clip_frac, and of w before its bound rollout_ratio (with rollout_ratio_std) and rollout_clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        ratio_max: Largest w, at least 1; the papers have none, and max_log_ratio bounds it anyway.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DecoupledPPOLoss(ratio_max=3.0)(l, None, torch.tensor([0.5]), mask, rollout_logprobs=l - 2).loss  # -3 * 0.5
    tensor(-1.5000)
    """

    reduction = "token_mean"
    needs_rollout = True

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        ratio_max: float = math.inf,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
        check_range(self._who, "ratio_max", ratio_max, 1)
        self.ratio_max = ratio_max

    def door(
        self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor, **optional: Any
    ) -> PolicyBatch:
        """The base class's, with w among the token weights."""
        batch = super().door(logprobs, old_logprobs, advantages, loss_mask, **optional)
        weights = self._rollout_ratio(batch).clamp(max=self.ratio_max)
        return batch._replace(token_weights=weights if batch.token_weights is None else weights * batch.token_weights)

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """PPO's clipped surrogate per token, and what w is."""
        token_loss, metrics = super().surrogate(batch)
        ratio = self._rollout_ratio(batch)
        is_held = (ratio > self.ratio_max).to(ratio.dtype)
        return token_loss, metrics | {
            "rollout_ratio": Moments.of(ratio, batch.loss_mask),
            "rollout_clip_frac": Mean.of(is_held, batch.loss_mask),
        }

    def _rollout_ratio(self, batch: PolicyBatch) -> Tensor:
        assert batch.rollout_logprobs is not None  # the door has checked it
        return bounded(batch.old_logprobs - batch.rollout_logprobs, self.max_log_ratio).exp()
