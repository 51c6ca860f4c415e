"""Robust DPO: the logistic loss that flipped labels leave unbiased."""

from typing import Unpack

from torch import Tensor

from rlloss._typing import Float
from rlloss.preference import logistic_loss
from rlloss.preference_margins import MarginLoss, MarginOptions

__all__ = ["RobustDPOLoss"]


class RobustDPOLoss(MarginLoss):
    """Robust DPO (rDPO), https://arxiv.org/abs/2403.00409.

    Where a known share of labels is flipped, its expectation over the flips is DPO's loss of the true labels, while
    the smoothed loss of `rlloss.DPOLoss` fits the noise. The price is variance: it has no lower bound.

        loss = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e),   e = label_smoothing
        dloss/dh = beta (sigmoid(beta h) - (1 - e) / (1 - 2 e))

    Args:
        label_smoothing: Share of labels that are flipped, in [0, 0.5).
        **options: `rlloss.MarginOptions`.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> round(RobustDPOLoss(label_smoothing=0.1)(*pair, *pair).loss.item(), 4)  # at the reference: log 2
    0.6931
    """

    def __init__(self, *, label_smoothing: float = 0.1, **options: Unpack[MarginOptions]) -> None:
        super().__init__(**options)
        is_number = isinstance(label_smoothing, int | float) and not isinstance(label_smoothing, bool)
        if not is_number or not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"{self._who}: label_smoothing must be a number in [0, 0.5), got {label_smoothing!r}: labels of which "
                "half are flipped say nothing"
            )
        self.label_smoothing = label_smoothing

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The difference of the logistic losses of both labels."""
        flipped = self.label_smoothing
        return ((1 - flipped) * logistic_loss(beta * h) - flipped * logistic_loss(-beta * h)) / (1 - 2 * flipped)
