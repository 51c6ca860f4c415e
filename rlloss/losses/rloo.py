"""RLOO: REINFORCE on whole answers, each against the others to its prompt."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["RLOOLoss"]


class RLOOLoss(ClippedPolicyLoss):
    """RLOO, https://arxiv.org/abs/2402.14740: the answer is one action, so the ratio is that of the whole sequence.

    With one update per rollout r is 1 and the gradient is the paper's, REINFORCE with leave-one-out advantages:
    `rlloss.group_advantages(..., baseline="leave_one_out", scale="none")`. With more updates the sequence's ratio
    is clipped as PPO does; being a product over its tokens, it leaves the range soon in long answers.

        r_i = exp(sum_t (l_t - old_t))
        loss = (1/S) sum_i max(-r_i A_i, -clip(r_i, 1 - clip_eps_low, 1 + clip_eps_high) A_i)
        dloss/dl_t = -(1/S) r_i A_i    where the clip does not bind, else 0

    Where advantages differ within a sequence, each token's meets the common ratio and clip, and the mean is taken. The
    paper's KL penalty is part of the reward: take kl_coef * sum_t (old_t - ref_t) off it. Base class: inputs, options
    and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`; the KL term is per token, and averaged over a sequence.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> RLOOLoss()(old + 0.05, old, torch.tensor([1.0]), mask).loss  # -exp(0.1)
    tensor(-1.1052)
    """

    reduction = "sequence_mean"
    ratio_level = "sequence"

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
