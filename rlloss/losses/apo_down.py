"""APO-down: both answers become less likely, the rejected one more so."""

import torch
from torch import Tensor

from rlloss._typing import Float
from rlloss.preference import PreferenceLoss

__all__ = ["APODownLoss"]


class APODownLoss(PreferenceLoss):
    """APO-down, https://arxiv.org/abs/2408.06266.

    For answers that are worse than the model's own: the chosen one is to fall, too, but less than the rejected one.

        loss = sigmoid(beta c) + 1 - sigmoid(beta h)
        dloss/dc = beta sigmoid(beta c) sigmoid(-beta c) - beta sigmoid(beta h) sigmoid(-beta h)
        dloss/dr = beta sigmoid(beta h) sigmoid(-beta h)

    Base class: inputs, options and metrics.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> APODownLoss()(*pair, *pair).loss  # at the reference
    tensor(1.)
    """

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The chosen one's gain, and what the margin lacks."""
        return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
