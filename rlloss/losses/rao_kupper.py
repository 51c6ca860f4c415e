"""Rao-Kupper: a reward model from pairs of which some are ties."""

import math

import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.scored_pairs import TiedPairLoss

__all__ = ["RaoKupperLoss"]


class RaoKupperLoss(TiedPairLoss):
    """Bradley-Terry with ties by Rao and Kupper, https://doi.org/10.1080/01621459.1967.10482901.

    Rewards that differ by less than raters can tell are ties: a win says that they differ by more, and a tie that they
    do not, which a plain Bradley-Terry model would have to drop. It is the model of https://arxiv.org/abs/2410.05328.

        P(win) = sigmoid(h - eta),   P(tie) = (theta^2 - 1) sigmoid(h - eta) sigmoid(-h - eta),   eta = log theta
        loss = -log P
        dloss/dh = sigmoid(h - eta) - 1 for a win, sigmoid(h - eta) - sigmoid(-h - eta) for a tie

    with h = r_w - r_l. At theta = 1, where ties are impossible, wins have the loss of `rlloss.BradleyTerryLoss`; the
    theta of a data set is about (1 + t) / (1 - t) where a share t of equally good answers are ties. Inputs and
    metrics: `rlloss.TiedPairLoss`.

    Args:
        theta: How readily raters call a tie, above 1.

    >>> import torch
    >>> loss_fn, even = RaoKupperLoss(theta=2.0), torch.tensor([0.0])
    >>> loss, metrics = loss_fn(even, even, ties=torch.tensor([True]))
    >>> round(loss.exp().item(), 4)  # a tie, a win and a loss have 1/3 each
    3.0
    """

    def __init__(self, *, theta: float = 2.0) -> None:
        super().__init__()
        check_range(self._who, "theta", theta, 1, open_low=True)
        self.theta = theta

    def win_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """-log sigmoid(h - eta)."""
        return -F.logsigmoid(h - math.log(self.theta))

    def tie_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """What both wins ask for together, less log(theta^2 - 1)."""
        return self.win_loss(h) + self.win_loss(-h) - math.log(self.theta**2 - 1)
