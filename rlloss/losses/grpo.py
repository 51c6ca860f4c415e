"""GRPO: PPO's clipped surrogate with group advantages, averaged per sequence."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["GRPOLoss"]


class GRPOLoss(ClippedPolicyLoss):
    """GRPO, equation 3 of https://arxiv.org/abs/2402.03300.

    Every sequence weighs the same, whatever its length; advantages come from `rlloss.group_advantages`.

        loss = (1/S) sum_i (1/L_i) sum_t [max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A) + kl_coef KL]
        dloss/dl_t = -(1/S) (1/L_i) r_t A_t    where the clip does not bind, else 0    (kl_coef = 0)

    The paper's own penalty, bare k3, is `kl_coef=0.04, kl_grad="literal"`; it descends KL(ref||pi). The default
    descends KL(pi||ref), which the paper names. Base class: inputs, options and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0, beyond 1 + clip_eps_high the delta of
            https://arxiv.org/abs/2505.07291; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> GRPOLoss()(logprobs, logprobs, torch.tensor([0.5]), mask).loss
    tensor(-0.5000)
    """

    reduction = "sequence_mean"

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
