"""APO-zero: chosen answers become likelier and rejected ones less likely, each by itself."""

import torch
from torch import Tensor

from rlloss._typing import Float
from rlloss.preference import PreferenceLoss

__all__ = ["APOZeroLoss"]


class APOZeroLoss(PreferenceLoss):
    """APO-zero, https://arxiv.org/abs/2408.06266.

    For answers that are better than the model's own: the reference anchors both, so that the chosen one's likelihood
    rises, and a pair that is far on either side is left alone.

        loss = 1 - sigmoid(beta c) + sigmoid(beta r)
        dloss/dc = -beta sigmoid(beta c) sigmoid(-beta c)        dloss/dr = beta sigmoid(beta r) sigmoid(-beta r)

    Base class: inputs, options and metrics.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> APOZeroLoss()(*pair, *pair).loss  # at the reference
    tensor(1.)
    """

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """One minus the chosen one's gain, plus the rejected one's."""
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
