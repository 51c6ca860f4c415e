"""AOT without pairs: chosen log-ratios ranked above rejected ones."""

from torch import Tensor

from rlloss.preference import Sides
from rlloss.preference_margins import RankedLoss

__all__ = ["AOTUnpairedLoss"]


class AOTUnpairedLoss(RankedLoss):
    """AOT on unpaired answers, https://arxiv.org/abs/2406.05882.

    The distribution of the log-ratios of good answers is to dominate that of bad ones, quantile by quantile; which
    answers belong to one prompt does not matter, only that there are as many of each.

        u = sort(chosen_logps - ref_chosen_logps),   v = sort(rejected_logps - ref_rejected_logps),   h_k = u_k - v_k
        loss = (1/B) sum_k -log sigmoid(beta h_k), smoothed as `rlloss.DPOLoss` is
        dloss/dh_k = beta (sigmoid(beta h_k) - 1 + label_smoothing) / B

    Base class: inputs, options, metrics, and how a step is split.

    >>> import torch
    >>> chosen, rejected, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -1.0]), torch.zeros(2)
    >>> round(AOTUnpairedLoss()(chosen, rejected, ref, ref).loss.item(), 4)  # the same distribution: log 2
    0.6931
    """

    def samples(self, policy: Sides, reference: Sides) -> tuple[Tensor, Tensor]:
        """The log-ratios of both answers."""
        return policy[0] - reference[0], policy[1] - reference[1]
