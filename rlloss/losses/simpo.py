"""SimPO: preferences on mean log-probs, without a reference, with a target margin."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import PreferenceLoss, logistic_loss
from rlloss.reduce import Normalizer

__all__ = ["SimPOLoss"]


class SimPOLoss(PreferenceLoss):
    """SimPO, equation 6 of https://arxiv.org/abs/2405.14734; `margin` is its gamma.

    The reward is what greedy decoding ranks by, the mean log-prob of a token; no reference is needed, and the chosen
    answer must win by a margin.

        h = chosen_mean_logps - rejected_mean_logps
        loss = -log sigmoid(beta h - margin), smoothed as `rlloss.DPOLoss` is
        dloss/dh = beta (sigmoid(beta h - margin) - 1 + label_smoothing)

    forward(chosen_mean_logps, rejected_mean_logps): means per token `[B]` (`rlloss.sequence_mean_logps`). Base class:
    options and metrics; the metric margin is beta h, from which the target is not taken off.

    Args:
        beta: Scale of the reward.
        margin: What beta h should exceed; the paper's code sets it to beta times a ratio of 0.25 and up.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].

    >>> import torch
    >>> loss, metrics = SimPOLoss(beta=2.0, margin=1.0)(torch.tensor([-0.5]), torch.tensor([-1.0]))
    >>> round(loss.item(), 4)  # log 2: the target is just met
    0.6931
    """

    length_normalized = True
    _inputs = ("chosen_mean_logps", "rejected_mean_logps")

    def __init__(self, *, beta: float = 2.0, margin: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__(beta=beta, reference_free=True)
        check_range(self._who, "margin", margin)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.margin, self.label_smoothing = margin, label_smoothing

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        chosen_mean_logps: Float[Tensor, " B"],
        rejected_mean_logps: Float[Tensor, " B"],
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        return super().forward(
            chosen_mean_logps, rejected_mean_logps, mask=mask, weights=weights, normalizer=normalizer
        )

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return f"beta={self.beta}, margin={self.margin}, label_smoothing={self.label_smoothing}"

    def pair_loss(self, h: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h - margin."""
        return logistic_loss(self.beta * h - self.margin, self.label_smoothing)
