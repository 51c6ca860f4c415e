"""CPO: contrastive preference optimisation, DPO without a reference and with the chosen answer's likelihood."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import logistic_loss
from rlloss.preference_margins import ReferenceFreeLoss
from rlloss.reduce import Normalizer

__all__ = ["CPOLoss"]


class CPOLoss(ReferenceFreeLoss):
    """CPO, https://arxiv.org/abs/2401.08417.

    A uniform reference makes DPO as cheap as SFT; in the place of its pull stands the likelihood of what is chosen.

        h = chosen_logps - rejected_logps
        loss = -log sigmoid(beta h), smoothed as `rlloss.DPOLoss` is, - nll_coef chosen_logps
        dloss/dchosen_logps = beta (sigmoid(beta h) - 1 + label_smoothing) - nll_coef
        dloss/drejected_logps = beta (1 - label_smoothing - sigmoid(beta h))

    forward(chosen_logps, rejected_logps): per-sequence sums `[B]` (`rlloss.sequence_logps`). The paper's likelihood
    is that of whole answers, which outweighs the first term; public code takes its mean over tokens:
    `combine(preference=CPOLoss(nll_coef=0.0)(...), nll=SFTLoss()(chosen_logprobs, chosen_mask))`.
    `rlloss.PreferenceLoss` lists the optional inputs and the metrics.

    Args:
        beta: Scale of the margin.
        nll_coef: Weight of the chosen answer's negative log-likelihood.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].

    >>> import torch
    >>> loss, metrics = CPOLoss()(torch.tensor([-2.0]), torch.tensor([-2.0]))
    >>> round(loss.item(), 4)  # log 2 + 2
    2.6931
    """

    def __init__(self, *, beta: float = 0.1, nll_coef: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "nll_coef", nll_coef, 0)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.nll_coef, self.label_smoothing = nll_coef, label_smoothing

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        return self._output((chosen_logps, rejected_logps, None, None), mask, weights, beta, normalizer)

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of the margin, and the likelihood."""
        return logistic_loss(beta * (chosen - rejected), self.label_smoothing) - self.nll_coef * chosen
