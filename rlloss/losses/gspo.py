"""GSPO: one importance ratio per sequence."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["GSPOLoss"]


class GSPOLoss(ClippedPolicyLoss):
    """GSPO, equations 5 and 7 of https://arxiv.org/abs/2507.18071.

    The unit that is rewarded is the unit that is clipped: the ratio is the sequence's geometric mean, so all tokens
    of a sequence share it and are clipped together.

        s_i = exp((1/L_i) sum_t (l_t - old_t))
        loss = (1/S) sum_i max(-s_i A_i, -clip(s_i, 1 - clip_eps_low, 1 + clip_eps_high) A_i)
        dloss/dl_t = -(1/S) (1/L_i) s_i A_i    where the clip does not bind, else 0

    Ranges are of order 1e-4 (section 5.1 of the paper), because a mean of many tokens moves little. Where advantages
    differ within a sequence, each token's meets the common ratio and clip, and the mean is taken. Base class: inputs,
    options and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`; the KL term stays per token.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> GSPOLoss()(old + torch.tensor([[0.1, -0.1]]), old, torch.tensor([0.5]), mask).loss
    tensor(-0.5000)
    """

    reduction = "sequence_mean"
    ratio_level = "geometric"

    def __init__(
        self,
        *,
        clip_eps_low: float = 3e-4,
        clip_eps_high: float = 4e-4,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
