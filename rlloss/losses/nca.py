"""NCA: noise contrastive alignment, which also holds the chosen answer's likelihood up."""

from torch import Tensor

from rlloss._typing import Float
from rlloss.preference import PreferenceLoss, logistic_loss

__all__ = ["NCALoss"]


class NCALoss(PreferenceLoss):
    """NCA on pairs, https://arxiv.org/abs/2402.05369.

    DPO is content where both answers become less likely if the rejected one falls faster. Here each answer is told
    from the reference's noise by itself, so that the chosen one's log-ratio has a target of its own.

        loss = -log sigmoid(beta c) - (1/2) log sigmoid(-beta c) - (1/2) log sigmoid(-beta r)
        dloss/dc = beta (sigmoid(beta c) / 2 - sigmoid(-beta c))        dloss/dr = beta sigmoid(beta r) / 2

    Base class: inputs, options and metrics.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> round(NCALoss()(*pair, *pair).loss.item(), 4)  # at the reference: 2 log 2
    1.3863
    """

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The chosen one among the data, both among the noise."""
        noise = logistic_loss(-beta * chosen) + logistic_loss(-beta * rejected)
        return logistic_loss(beta * chosen) + noise / 2
