"""Bradley-Terry: a reward model from pairs."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss.preference import logistic_loss
from rlloss.scored_pairs import ScoredPairLoss

__all__ = ["BradleyTerryLoss"]


class BradleyTerryLoss(ScoredPairLoss):
    """The reward-model loss, equation 1 of https://arxiv.org/abs/2203.02155, with margins and centring.

    Margins are those of equation 2 of https://arxiv.org/abs/2307.09288: a pair that raters found far apart must be
    scored further apart. Pairs fix rewards only up to a constant; centring, https://arxiv.org/abs/2312.09244, pulls
    each pair's sum to 0.

        x = (r_w - r_l - margin) / temperature
        loss = -log sigmoid(x), smoothed as `rlloss.DPOLoss` is, + center_coef (r_w + r_l)^2
        dloss/dr_w = (sigmoid(x) - 1 + label_smoothing) / temperature + 2 center_coef (r_w + r_l)
        dloss/dr_l = -(sigmoid(x) - 1 + label_smoothing) / temperature + 2 center_coef (r_w + r_l)

    Without any of them it is what some call the LogExp loss, log(1 + exp(r_l - r_w)). Inputs and metrics:
    `rlloss.ScoredPairLoss`.

    Args:
        temperature: Difference of rewards, in units of the reward, that is one nat of log-odds.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        center_coef: Weight of the centring.

    >>> import torch
    >>> loss, metrics = BradleyTerryLoss()(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]))
    >>> round(loss.item(), 4), float(metrics["accuracy"])
    (1.1269, 0.5)
    """

    def __init__(self, *, temperature: float = 1.0, label_smoothing: float = 0.0, center_coef: float = 0.0) -> None:
        super().__init__()
        check_range(self._who, "temperature", temperature, 0, open_low=True)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        check_range(self._who, "center_coef", center_coef, 0)
        self.temperature, self.label_smoothing, self.center_coef = temperature, label_smoothing, center_coef

    def pair_loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """The loss of each pair."""
        h = chosen - rejected if margin is None else chosen - rejected - margin
        loss = logistic_loss(h / self.temperature, self.label_smoothing)
        if self.center_coef:
            loss = loss + self.center_coef * (chosen + rejected).square()
        return loss
