"""EXO: the reverse KL from the policy's preference to the labels."""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference_margins import MarginLoss, MarginOptions

__all__ = ["EXOLoss"]


class EXOLoss(MarginLoss):
    """EXO on pairs, https://arxiv.org/abs/2402.00856.

    DPO minimises the KL from the labels to the policy's preference q, which covers modes; EXO the KL from q to the
    smoothed labels, which seeks one. Unlike DPO it lets go of a pair that is hopelessly lost.

        q = sigmoid(beta h)
        loss = q log(q / (1 - label_smoothing)) + (1 - q) log((1 - q) / label_smoothing)
        dloss/dh = beta q (1 - q) (beta h - log((1 - label_smoothing) / label_smoothing))

    Args:
        label_smoothing: The paper's epsilon, in (0, 0.5]: the labels' probability that the rejected answer wins.
        **options: `rlloss.MarginOptions`.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> EXOLoss(label_smoothing=0.5)(*pair, *pair).loss  # at the reference q is 1/2, as these labels are
    tensor(0.)
    """

    def __init__(self, *, label_smoothing: float = 1e-3, **options: Unpack[MarginOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5, open_low=True)
        self.label_smoothing = label_smoothing

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The KL of two coins."""
        x = beta * h
        wins = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-self.label_smoothing))
        return wins + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(self.label_smoothing))
