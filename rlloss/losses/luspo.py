"""LUSPO: GSPO without its preference for short answers."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["LUSPOLoss"]


class LUSPOLoss(ClippedPolicyLoss):
    """LUSPO, https://arxiv.org/abs/2602.05261: GSPO with each sequence's loss times its length.

    The mean over a sequence's tokens in GSPO's ratio divides each token's gradient by the length; times the length,
    a token of a long answer moves as far as one of a short answer, and long ones no longer wither.

        s_i = exp((1/L_i) sum_t (l_t - old_t))
        loss = (1/S) sum_i L_i max(-s_i A_i, -clip(s_i, 1 - clip_eps_low, 1 + clip_eps_high) A_i)
        dloss/dl_t = -(1/S) s_i A_i    where the clip does not bind, else 0

    At s = 1 that is the gradient of the expected reward, whatever the lengths. Where advantages differ within a
    sequence, each token's meets the common ratio and clip, and the sum is taken. The KL term is per token, and summed
    over a sequence. Base class: inputs, options and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> LUSPOLoss()(old + torch.tensor([[0.1, -0.1]]), old, torch.tensor([0.5]), mask).loss
    tensor(-1.)
    """

    reduction = "sequence_sum"
    ratio_level = "geometric"

    def __init__(
        self,
        *,
        clip_eps_low: float = 2e-3,
        clip_eps_high: float = 2.5e-3,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
