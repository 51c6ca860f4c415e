"""TIS: REINFORCE under importance weights that never exceed a bound."""

from typing import Literal, Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import TruncatedPolicyLoss

__all__ = ["TISLoss"]


class TISLoss(TruncatedPolicyLoss):
    """Truncated importance sampling, the baseline of https://arxiv.org/abs/2503.14286.

    An answer that the policy has since grown fond of counts as it does on-policy, one that it has left counts for
    less: with the bound at 1 no stale answer outweighs a fresh one.

        w_i = min(exp(sum_t (l_t - old_t)), ratio_max)    (`token`: w_t, of each token's own l_t - old_t)
        loss = -(1/S) sum_i sg[w_i] sum_t A_t l_t
        dloss/dl_t = -(1/S) w_i A_t

    `old_logprobs` are those of the policy that wrote the answers. It is `rlloss.ImportanceSamplingLoss` with that
    paper's bounds, its KL term included, whose docstring weighs the levels against each other. Base class: inputs,
    options and metrics (ratio is the one before the clip); adds clip_frac, the share of tokens whose weight is clipped.

    Args:
        ratio_level: `sequence`, the paper's, or `token`, ROLL's: whose ratio is the weight.
        ratio_max: Largest weight, at least 1.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> TISLoss()(l, l - 3, torch.tensor([0.5]), mask).loss  # 1 * 0.5 * (1 + 2)
    tensor(1.5000)
    """

    def __init__(
        self,
        *,
        ratio_level: Literal["sequence", "token"] = "sequence",
        ratio_max: float = 1.0,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(ratio_level=ratio_level, ratio_min=0.0, ratio_max=ratio_max, **options)
