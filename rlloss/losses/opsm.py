"""GRPO that lets go of bad answers which the policy would hardly write any more."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss
from rlloss.reduce import sequence_mean, to_tokens

__all__ = ["OPSMLoss"]


class OPSMLoss(ClippedPolicyLoss):
    """Off-policy sequence masking of DeepSeek-V3.2, equations 8 and 9 of https://arxiv.org/abs/2512.02556.

    A policy learns from its own mistakes; those of another are not its own, and pushing them down harms what it has.
    So GRPO's surrogate is dropped at a bad answer whose tokens have become less likely by `threshold` on average.

        M_t = 0 where A_t < 0 and (1/L_i) sum_t (old_t - l_t) > threshold, else 1
        loss = (1/S) sum_i (1/L_i) sum_t [M_t max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A) + kl_coef KL]
        dloss/dl_t = -(1/S) (1/L_i) M_t r_t A_t    where the clip does not bind, else 0    (kl_coef = 0)

    `old_logprobs` are the sampler's own, so that M sees its mismatch too. M carries no gradient and leaves the KL term
    and every count alone. That term, in the default form of `kl` and `kl_grad`, is the paper's equation 7. Base class:
    inputs, options and metrics; adds clip_frac and masked_frac, the share of tokens with M = 0.

    Args:
        threshold: Nats per token; the paper names no number.
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> loss_fn = OPSMLoss(threshold=0.5)
    >>> loss_fn(l, l, torch.tensor([-1.0]), mask).loss, loss_fn(l, l + 0.6, torch.tensor([-1.0]), mask).loss
    (tensor(1.), tensor(0.))
    """

    reduction = "sequence_mean"

    def __init__(
        self,
        *,
        threshold: float,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
        check_range(self._who, "threshold", threshold, 0)
        self.threshold = threshold

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """PPO's clipped surrogate, dropped where M = 0."""
        token_loss, metrics = super().surrogate(batch)
        mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
        fallen = to_tokens(sequence_mean(-batch.log_ratio.detach(), mask, cu_seqlens), mask, cu_seqlens)
        is_masked = (batch.advantages < 0) & (fallen > self.threshold)
        masked_frac = Mean.of(is_masked.to(token_loss.dtype), mask)
        return torch.where(is_masked, 0, token_loss), metrics | {"masked_frac": masked_frac}
