"""DPO: preferences as a logistic loss on the policy's own log-ratios."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference import PreferenceLoss, logistic_loss

__all__ = ["DPOLoss"]


class DPOLoss(PreferenceLoss):
    """DPO, equation 7 of https://arxiv.org/abs/2305.18290, with the label smoothing of cDPO, https://ericmitchell.ai/cdpo.pdf.

    The reward model is the policy itself: beta times its log-ratio to the reference.

        loss = -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
        dloss/dh = beta (sigmoid(beta h) - 1 + label_smoothing)

    Args:
        beta: Strength of the pull to the reference.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        reference_free: Takes the reference as uniform.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> loss, metrics = DPOLoss(beta=0.1)(*pair, *pair)  # at the reference: log 2
    >>> round(loss.item(), 4)
    0.6931
    """

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, reference_free: bool = False) -> None:
        super().__init__(beta=beta, reference_free=reference_free)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.label_smoothing = label_smoothing

    def pair_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h."""
        return logistic_loss(self.beta * h, self.label_smoothing)
