"""Margin ranking: a hinge on the difference of two rewards."""

from torch import Tensor

from rlloss._checks import check_flag, check_range
from rlloss.scored_pairs import ScoredPairLoss

__all__ = ["MarginRankingLoss"]


class MarginRankingLoss(ScoredPairLoss):
    """The hinge of the ranking SVM, https://doi.org/10.1145/775047.775067, on rewards.

    A pair that is apart by its margin teaches nothing, where the logistic loss would push it on for ever; a wrong pair
    pushes with a slope of 1 however wrong it is, or in proportion where `squared`.

        loss = max(0, margin - (r_w - r_l))                          or its square
        dloss/dr_w = -1 where r_w - r_l < margin, else 0             or -2 max(0, margin - (r_w - r_l))
        dloss/dr_l = -dloss/dr_w

    Inputs and metrics: `rlloss.ScoredPairLoss`, whose `margin` per pair takes the place of the constant.

    Args:
        margin: The difference that is asked for, in units of the reward.
        squared: Squares the hinge.

    >>> import torch
    >>> MarginRankingLoss()(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5])).loss  # 0 and 1/2
    tensor(0.2500)
    """

    def __init__(self, *, margin: float = 1.0, squared: bool = False) -> None:
        super().__init__()
        check_range(self._who, "margin", margin, 0)
        check_flag(self._who, "squared", squared)
        self.margin, self.squared = margin, squared

    def pair_loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """The hinge of each pair."""
        hinge = ((self.margin if margin is None else margin) - (chosen - rejected)).clamp(min=0)
        return hinge.square() if self.squared else hinge
