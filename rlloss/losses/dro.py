"""DRO: offline rewards, fitted by the log-ratio of the answer to the reference."""

from typing import Literal, Unpack

from rlloss._checks import check_choice, check_range
from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import QuadraticPolicyLoss

__all__ = ["DROLoss"]


class DROLoss(QuadraticPolicyLoss):
    """Direct reward optimisation, equations 4 and 8 of https://arxiv.org/abs/2405.19107.

    It learns from answers of any origin, one per prompt and no pairs: at the optimum of the KL-regularised reward,
    tau log(pi / ref) = r - V(x) for every answer, and the square of what that misses is least there. So the advantage
    is r - V(x), with V(x) learned or `rlloss.optimal_value`; it is no baseline that another might replace.

        D_i = sum_t (l_t - ref_t)
        loss = (1/S) sum_i [-sum_t A_t l_t + (tau / 2) D_i^2]
        dloss/dl_t = (1/S) (-A_t + tau D_i)

    This is the paper's square (A - tau D)^2 / 2 without what has no gradient, divided by tau as in its section 3.3
    (its algorithm 1 drops the tau of the second term, which equation 8 has). `dro` of tinker is ratio_level="token",
    anchor="old": every token's own square, against the policy that wrote the answer. Base class: inputs, options and
    metrics (ratio and approx_kl are those to old); adds drift, the mean of D over the tokens.

    Args:
        tau: Weight of the square, the temperature of the KL-regularised reward.
        ratio_level: `sequence` or `token`: whose log-ratio is squared.
        anchor: `reference` or `old`: what the log-ratio is taken to.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DROLoss()(l, None, torch.tensor([2.0]), mask, ref_logprobs=l - 1).loss  # 2 * 3 + 1 / 2 * 2^2
    tensor(8.)
    """

    def __init__(
        self,
        *,
        tau: float = 1.0,
        ratio_level: Literal["sequence", "token"] = "sequence",
        anchor: Literal["reference", "old"] = "reference",
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "tau", tau, 0, open_low=True)
        check_choice(self._who, "ratio_level", ratio_level, ("sequence", "token"))
        check_choice(self._who, "anchor", anchor, ("reference", "old"))
        self.tau, self.anchor = tau, anchor
        self.ratio_level = ratio_level  # pyright: ignore[reportAttributeAccessIssue]
