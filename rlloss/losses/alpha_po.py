"""AlphaPO: SimPO with the shape of the reward as a parameter."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference import logistic_loss
from rlloss.preference_inputs import power_score
from rlloss.preference_margins import MeanPreferenceLoss

__all__ = ["AlphaPOLoss"]


class AlphaPOLoss(MeanPreferenceLoss):
    """AlphaPO, https://arxiv.org/abs/2501.03884; `margin` is its gamma.

    SimPO's reward, log p of p = exp(mean log-prob), bent: alpha > 0 makes unlikely answers worse than their log, which
    keeps the chosen one from sinking with the rejected one; alpha < 0 does the opposite, and 0 is SimPO.

        s(l) = (1 - exp(-alpha l)) / alpha
        loss = -log sigmoid(x), smoothed as `rlloss.DPOLoss` is,
        x = beta (s(chosen_mean_logps) - s(rejected_mean_logps)) - margin
        dloss/dchosen_mean_logps = beta (sigmoid(x) - 1 + label_smoothing) exp(-alpha chosen_mean_logps),
        dloss/drejected_mean_logps = -beta (sigmoid(x) - 1 + label_smoothing) exp(-alpha rejected_mean_logps)

    forward(chosen_mean_logps, rejected_mean_logps): means per token `[B]` (`rlloss.sequence_mean_logps`). The
    exponents are at most 20, without gradient beyond. `rlloss.PreferenceLoss` lists the optional inputs and the
    metrics, which are of s; adds score_bounded_frac (share of pairs at that bound).

    Args:
        beta: Scale of the reward.
        alpha: Shape of the reward.
        margin: What the scaled difference should exceed.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].

    >>> import math, torch
    >>> half, quarter = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    >>> loss, metrics = AlphaPOLoss(alpha=1.0, beta=0.5, margin=1.0)(half, quarter)  # s = -1 and -3
    >>> round(loss.item(), 4)  # log 2: the target is just met
    0.6931
    """

    def __init__(
        self, *, beta: float = 2.0, alpha: float = 0.25, margin: float = 0.5, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "alpha", alpha)
        check_range(self._who, "margin", margin)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.alpha, self.margin, self.label_smoothing = alpha, margin, label_smoothing

    @property
    def score_exponent(self) -> float:
        """Alpha."""
        return self.alpha

    def score(self, log_ratio: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The bent reward of a mean log-prob."""
        return power_score(log_ratio, self.alpha)

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h - margin."""
        return logistic_loss(beta * h - self.margin, self.label_smoothing)
