"""PPO: the clipped surrogate."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["PPOLoss"]


class PPOLoss(ClippedPolicyLoss):
    """PPO-clip, equation 7 of https://arxiv.org/abs/1707.06347; the dual clip is equation 5 of https://arxiv.org/abs/1912.09729.

    The surrogate stops paying where the ratio has left its range in the direction that the advantage asks for. The
    critic has a loss of its own, `rlloss.ValueLoss`; advantages come from `rlloss.gae`, and the paper's entropy bonus
    (equation 9) is `entropy_coef`.

        loss = (1/N) sum_t max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)    (N trained tokens)
        dloss/dl_t = -(1/N) r_t A_t    where the clip does not bind, else 0

    Base class: inputs, options and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0, beyond 1 + clip_eps_high the delta of
            https://arxiv.org/abs/2505.07291; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> PPOLoss()(old + 1, old, torch.tensor([[1.0, -1.0]]), mask).loss  # (-1.2 + e) / 2
    tensor(0.7591)
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
