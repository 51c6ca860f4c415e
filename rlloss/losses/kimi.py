"""Kimi k1.5: the policy gradient with a square that keeps whole answers near the policy that wrote them."""

from typing import Literal, Unpack

from rlloss._checks import check_choice, check_range
from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import QuadraticPolicyLoss

__all__ = ["KimiLoss"]


class KimiLoss(QuadraticPolicyLoss):
    """Online policy mirror descent of Kimi k1.5, equation 3 of https://arxiv.org/abs/2501.12599.

    Nothing is clipped and no ratio is exponentiated: a square pulls the log-prob of each whole answer back to that of
    the policy which wrote it, so that answers of an earlier policy teach as they are.

        D_i = sum_t (l_t - old_t)
        loss = (1/S) sum_i [-sum_t A_t l_t + (tau / 2) D_i^2]
        dloss/dl_t = (1/S) (-A_t + tau D_i)

    Advantages are r minus the mean reward of the group: `rlloss.group_advantages(..., scale="none")`; the paper's
    other choice, r - tau log mean exp(r / tau), is r minus `rlloss.optimal_value`. `token` is ROLL's reading, in which
    every token has its own square: D_t = l_t - old_t. Base class: inputs, options and metrics; adds drift, the mean
    of D over the tokens.

    Args:
        tau: Weight of the square. The paper names no number; this is ROLL's, for tokens.
        ratio_level: `sequence` or `token`: whose log-ratio is squared.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> KimiLoss(tau=0.5)(l, l - 1, torch.tensor([2.0]), mask).loss  # 2 * 3 + 0.5 / 2 * 2^2
    tensor(7.)
    """

    def __init__(
        self,
        *,
        tau: float = 0.1,
        ratio_level: Literal["sequence", "token"] = "sequence",
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "tau", tau, 0, open_low=True)
        check_choice(self._who, "ratio_level", ratio_level, ("sequence", "token"))
        self.tau = tau
        self.ratio_level = ratio_level  # pyright: ignore[reportAttributeAccessIssue]
