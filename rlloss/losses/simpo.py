"""SimPO: preferences on mean log-probs, without a reference, with a target margin."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference import logistic_loss
from rlloss.preference_margins import MeanPreferenceLoss

__all__ = ["SimPOLoss"]


class SimPOLoss(MeanPreferenceLoss):
    """SimPO, equation 6 of https://arxiv.org/abs/2405.14734; `margin` is its gamma.

    The reward is what greedy decoding ranks by, the mean log-prob of a token; no reference is needed, and the chosen
    answer must win by a margin.

        h = chosen_mean_logps - rejected_mean_logps
        loss = -log sigmoid(beta h - margin), smoothed as `rlloss.DPOLoss` is
        dloss/dh = beta (sigmoid(beta h - margin) - 1 + label_smoothing)

    forward(chosen_mean_logps, rejected_mean_logps): means per token `[B]` (`rlloss.sequence_mean_logps`).
    `rlloss.PreferenceLoss` lists the optional inputs and the metrics; the metric margin is beta h, from which the
    target is not taken off.

    CPO-SimPO adds the chosen answer's likelihood, per token:
    `combine(preference=simpo_out, nll=alpha * SFTLoss()(chosen_logprobs, chosen_mask))`.

    Args:
        beta: Scale of the reward.
        margin: What beta h should exceed; the paper's code sets it to beta times a ratio of 0.25 and up.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].

    >>> import torch
    >>> loss, metrics = SimPOLoss(beta=2.0, margin=1.0)(torch.tensor([-0.5]), torch.tensor([-1.0]))
    >>> round(loss.item(), 4)  # log 2: the target is just met
    0.6931
    """

    def __init__(self, *, beta: float = 2.0, margin: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "margin", margin)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.margin, self.label_smoothing = margin, label_smoothing

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h - margin."""
        return logistic_loss(beta * h - self.margin, self.label_smoothing)
