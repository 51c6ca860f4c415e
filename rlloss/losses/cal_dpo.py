"""Cal-DPO: DPO whose implicit rewards are calibrated to a scale."""

from torch import Tensor

from rlloss._typing import Float
from rlloss.preference import PreferenceLoss, logistic_loss

__all__ = ["CalDPOLoss"]


class CalDPOLoss(PreferenceLoss):
    """Cal-DPO, https://arxiv.org/abs/2412.14516.

    DPO sees differences alone, so that both likelihoods may sink. Two squares hold the log-ratios at half a unit of
    reward above and below the reference. The logistic term, as the paper has it, is of h itself: `beta` sets the
    targets alone.

        loss = -log sigmoid(h) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2
        dloss/dc = sigmoid(h) - 1 + 2 (c - 1 / (2 beta))        dloss/dr = 1 - sigmoid(h) + 2 (r + 1 / (2 beta))

    Base class: inputs, options and metrics.

    >>> import torch
    >>> chosen, rejected, ref = torch.tensor([-3.0]), torch.tensor([-7.0]), torch.tensor([-5.0])
    >>> round(CalDPOLoss(beta=0.25)(chosen, rejected, ref, ref).loss.item(), 4)  # both at their targets: softplus(-4)
    0.0181
    """

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The logistic loss of the margin, and both distances."""
        target = 1 / (2 * beta)
        return logistic_loss(chosen - rejected) + (chosen - target).square() + (rejected + target).square()
