"""Davidson: ties by the geometric mean of two strengths."""

import math

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.scored_pairs import TiedPairLoss

__all__ = ["DavidsonLoss"]


class DavidsonLoss(TiedPairLoss):
    """Bradley-Terry with ties by Davidson, https://doi.org/10.1080/01621459.1970.10481082.

    A tie has a strength of its own, nu times the geometric mean of both answers', so that among the pairs with a winner
    the odds are those of Bradley and Terry, exp(h), whatever nu is.

        P(win) = 1 / (1 + exp(-h) + nu exp(-h/2)),   P(tie) = nu exp(-h/2) P(win)
        loss = -log P
        dloss/dh = -(P(loss) + P(tie) / 2) for a win, (P(win) - P(loss)) / 2 for a tie

    with h = r_w - r_l. The nu of a data set is about 2t / (1 - t) where a share t of equally good answers are ties.
    Inputs and metrics: `rlloss.TiedPairLoss`.

    Args:
        nu: How readily raters call a tie, above 0.

    >>> loss_fn, even = DavidsonLoss(nu=1.0), torch.tensor([0.0])
    >>> loss, metrics = loss_fn(even, even, ties=torch.tensor([True]))
    >>> round(loss.exp().item(), 4)  # a tie, a win and a loss have 1/3 each
    3.0
    """

    def __init__(self, *, nu: float = 1.0) -> None:
        super().__init__()
        check_range(self._who, "nu", nu, 0, open_low=True)
        self.nu = nu

    def win_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """-log P(win)."""
        return torch.stack([torch.zeros_like(h), -h, math.log(self.nu) - h / 2]).logsumexp(0)

    def tie_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """-log P(tie)."""
        return torch.stack([h / 2, -h / 2, torch.full_like(h, math.log(self.nu))]).logsumexp(0) - math.log(self.nu)
