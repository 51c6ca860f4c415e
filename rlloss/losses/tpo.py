"""TPO: triple preference optimisation, a gold answer's likelihood beside a preference without a reference."""

from torch import Tensor

from rlloss._checks import check_flag, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import logistic_loss
from rlloss.preference_margins import ReferenceFreeLoss
from rlloss.reduce import Normalizer

__all__ = ["TPOLoss"]


class TPOLoss(ReferenceFreeLoss):
    """TPO, https://arxiv.org/abs/2405.16681; `margin` is the gamma of its TPO-L.

    What is imitated need not be what is preferred: a third, gold answer to the prompt carries the likelihood.

        h = chosen_logps - rejected_logps
        loss = -log sigmoid(beta h - margin), smoothed as `rlloss.DPOLoss` is, - nll_coef gold_logps
        dloss/dh = beta (sigmoid(beta h - margin) - 1 + label_smoothing)        dloss/dgold_logps = -nll_coef

    forward(chosen_logps, rejected_logps, gold_logps=...): per-sequence sums `[B]` (`rlloss.sequence_logps`), or, for
    TPO-L (registry name `tpo_l`), means per token throughout: `length_normalized=True, margin=0.5`.
    `rlloss.PreferenceLoss` lists the optional inputs and the metrics; adds none for the gold answer, whose mean
    likelihood is a metric of SFT.

    Args:
        beta: Scale of the margin.
        nll_coef: Weight of the gold answer's negative log-likelihood; with 0 there is no `gold_logps`.
        margin: What beta h should exceed.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        length_normalized: The inputs are means per token, not sums.

    >>> import torch
    >>> loss, metrics = TPOLoss()(torch.tensor([-2.0]), torch.tensor([-2.0]), gold_logps=torch.tensor([-3.0]))
    >>> round(loss.item(), 4)  # log 2 + 3
    3.6931
    """

    def __init__(
        self,
        *,
        beta: float = 0.01,
        nll_coef: float = 1.0,
        margin: float = 0.0,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "nll_coef", nll_coef, 0)
        check_range(self._who, "margin", margin)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        check_flag(self._who, "length_normalized", length_normalized)
        self.nll_coef, self.margin, self.label_smoothing = nll_coef, margin, label_smoothing
        self.length_normalized = length_normalized

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        *,
        gold_logps: Float[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        if gold_logps is None and self.nll_coef:
            raise ValueError(
                f"{self._who}: nll_coef={self.nll_coef} needs gold_logps, got None; pass the gold answers' log-probs "
                "or set nll_coef=0"
            )
        if gold_logps is not None and not self.nll_coef:
            raise ValueError(f"{self._who}: nll_coef=0 leaves gold_logps unused; leave them out")
        logps = (chosen_logps, rejected_logps, None, None)
        return self._output(logps, mask, weights, beta, normalizer, gold_logps=gold_logps)

    def answers_loss(
        self,
        chosen: Float[Tensor, " B"],
        rejected: Float[Tensor, " B"],
        beta: Tensor | float,
        gold_logps: Tensor | float = 0.0,
    ) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h - margin, and the gold answer's likelihood."""
        preference = logistic_loss(beta * (chosen - rejected) - self.margin, self.label_smoothing)
        return preference - self.nll_coef * gold_logps
