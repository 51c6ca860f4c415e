"""DiscoPOP: a loss that a language model found, between the logistic and the exponential one."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference import logistic_loss
from rlloss.preference_margins import MarginLoss, MarginOptions

__all__ = ["DiscoPOPLoss"]


class DiscoPOPLoss(MarginLoss):
    """DiscoPOP, the log-ratio modulated loss of https://arxiv.org/abs/2406.08414.

    Logistic where the pair is lost and exponential where it is won, with a hump between them: it is not convex, and
    its slope is positive around h = 0.

        x = beta h,   g = sigmoid(x / tau)
        loss = -(1 - g) log sigmoid(x) + g exp(-x)
        dloss/dh = beta (g (1 - g) / tau (exp(-x) + log sigmoid(x)) - (1 - g) sigmoid(-x) - g exp(-x))

    g exp(-x) is taken as exp(log g - x), which no x makes overflow while tau is at most 1.

    Args:
        tau: Width in beta h of the passage from one to the other, in (0, 1].
        **options: `rlloss.MarginOptions`.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> round(DiscoPOPLoss()(*pair, *pair).loss.item(), 4)  # at the reference: (log 2 + 1) / 2
    0.8466
    """

    def __init__(self, *, tau: float = 0.05, **options: Unpack[MarginOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "tau", tau, 0, 1, open_low=True)
        self.tau = tau

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The mixture of both losses."""
        x = beta * h
        exponential = torch.exp(F.logsigmoid(x / self.tau) - x)
        return torch.sigmoid(-x / self.tau) * logistic_loss(x) + exponential
