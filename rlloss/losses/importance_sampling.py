"""Truncated importance sampling: the off-policy policy gradient, its weights held within bounds."""

from typing import Literal, Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import TruncatedPolicyLoss

__all__ = ["ImportanceSamplingLoss"]


class ImportanceSamplingLoss(TruncatedPolicyLoss):
    """Off-policy REINFORCE with truncated importance weights, https://doi.org/10.1198/106186008X320456.

    The clip bounds how much an answer counts and never whether it counts: the weight carries no gradient and the
    log-prob does, so that a clipped answer still teaches, where PPO's clip (or a clip of w A itself) lets go of it.
    Held at 1 it is the TIS that https://arxiv.org/abs/2503.14286 compares itself with, `rlloss.TISLoss`.

        w_i = clip(exp(sum_t (l_t - old_t)), ratio_min, ratio_max)    (`token`: w_t, of each token's own l_t - old_t)
        loss = -(1/S) sum_i sg[w_i] sum_t A_t l_t
        dloss/dl_t = -(1/S) w_i A_t

    `old_logprobs` are those of the policy that wrote the answers, however old. The weight of the whole sequence makes
    the gradient that of the expected reward, unbiased where nothing is clipped; its variance grows with the length.
    `token` leaves out that the beginnings were another policy's: biased, with a variance that does not grow; it is the
    actor's weight in https://arxiv.org/abs/1802.01561. The log-prob of an answer is a sum, so both sum over its tokens
    and never average. Base class: inputs, options and metrics (ratio is the one before the clip); adds clip_frac, the
    share of tokens whose weight is clipped.

    The KL term stays per token, under each token's own ratio r, held to the same bounds as the weights, since one
    answer of long ago would outweigh all others. The bound holds how much a token counts, as above: with it, the
    gradient of a token's k3 is clip(r_t) (l_t - ref_t). So the term descends KL(pi||ref) exactly where no r_t is
    clipped, and elsewhere with that token's weight cut, as truncated importance sampling does the expected reward.

    Args:
        ratio_level: `sequence` or `token`: whose ratio is the weight.
        ratio_min: Least weight, at most 1.
        ratio_max: Largest weight, at least 1; `math.inf` for none but the bound of every ratio, max_log_ratio.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> ImportanceSamplingLoss(ratio_max=2.0)(l, l - 3, torch.tensor([0.5]), mask).loss  # 2 * 0.5 * (1 + 2)
    tensor(3.)
    """

    def __init__(
        self,
        *,
        ratio_level: Literal["sequence", "token"] = "sequence",
        ratio_min: float = 0.0,
        ratio_max: float = 10.0,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(ratio_level=ratio_level, ratio_min=ratio_min, ratio_max=ratio_max, **options)
