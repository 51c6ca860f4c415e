"""DPO: preferences as a logistic loss on the policy's own log-ratios."""

from typing import Unpack

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import logistic_loss
from rlloss.preference_margins import MarginLoss, MarginOptions
from rlloss.reduce import Normalizer

__all__ = ["DPOLoss"]


class DPOLoss(MarginLoss):
    """DPO, equation 7 of https://arxiv.org/abs/2305.18290, with the label smoothing of cDPO, https://ericmitchell.ai/cdpo.pdf.

    The reward model is the policy itself: beta times its log-ratio to the reference.

        loss = -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
        dloss/dh = beta (sigmoid(beta h) - 1 + label_smoothing)

    `soft_labels`, the probability per pair that the chosen answer is the preferred one, stand for
    1 - label_smoothing. With `length_normalized=True` it is the length-normalised DPO of
    https://arxiv.org/abs/2411.15124, whose registry name is `sigmoid_norm`.

    RPO, https://arxiv.org/abs/2405.16436, and iterative RPO, https://arxiv.org/abs/2404.19733, add the chosen
    answer's likelihood, iterative RPO as a mean over its tokens:
    `combine(preference=dpo_out, nll=alpha * SFTLoss(reduction="sequence_mean")(chosen_logprobs, chosen_mask))`.

    Args:
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        **options: `rlloss.MarginOptions`: beta, reference_free, length_normalized and the divergence.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> loss, metrics = DPOLoss(beta=0.1)(*pair, *pair)  # at the reference: log 2
    >>> round(loss.item(), 4)
    0.6931
    """

    def __init__(self, *, label_smoothing: float = 0.0, **options: Unpack[MarginOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.label_smoothing = label_smoothing

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        soft_labels: Float[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        if soft_labels is not None:
            if self.label_smoothing:
                raise ValueError(
                    f"{self._who}: soft_labels say of each pair what label_smoothing={self.label_smoothing} says of "
                    "all; leave one of them out"
                )
            soft_labels = soft_labels.detach()
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        return self._output(logps, mask, weights, beta, normalizer, soft_labels=soft_labels)

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h."""
        return logistic_loss(beta * h, self.label_smoothing)

    def answers_loss(
        self,
        chosen: Float[Tensor, " B"],
        rejected: Float[Tensor, " B"],
        beta: Tensor | float,
        soft_labels: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " B"]:
        """`pair_loss` of the margin, or the logistic loss under each pair's own label."""
        h = chosen - rejected
        return self.pair_loss(h, beta) if soft_labels is None else logistic_loss(beta * h, 1 - soft_labels)
