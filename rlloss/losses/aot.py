"""AOT: alignment by optimal transport, which ranks the policy's margins above the reference's."""

from torch import Tensor

from rlloss.preference import Sides
from rlloss.preference_margins import RankedLoss

__all__ = ["AOTLoss"]


class AOTLoss(RankedLoss):
    """AOT on pairs, https://arxiv.org/abs/2406.05882.

    DPO asks every pair to be won; AOT asks the distribution of the policy's margins to dominate that of the
    reference's, quantile by quantile, which is a one-dimensional optimal transport: two sorts.

        u = sort(chosen_logps - rejected_logps),   v = sort(ref_chosen_logps - ref_rejected_logps),   h_k = u_k - v_k
        loss = (1/B) sum_k -log sigmoid(beta h_k), smoothed as `rlloss.DPOLoss` is
        dloss/dh_k = beta (sigmoid(beta h_k) - 1 + label_smoothing) / B

    Base class: inputs, options, metrics, and how a step is split.

    >>> import torch
    >>> chosen, rejected = torch.tensor([-1.0, -3.0]), torch.tensor([-3.0, -2.0])  # margins 2 and -1
    >>> ref_chosen, ref_rejected = torch.tensor([-4.0, -2.0]), torch.tensor([-3.0, -4.0])  # -1 and 2
    >>> round(AOTLoss()(chosen, rejected, ref_chosen, ref_rejected).loss.item(), 4)  # the same distribution: log 2
    0.6931
    """

    def samples(self, policy: Sides, reference: Sides) -> tuple[Tensor, Tensor]:
        """The margins of both models."""
        return policy[0] - policy[1], reference[0] - reference[1]
