"""What all losses over rows or pairs share: mask at the door, margin, logistic loss, reduction, metrics."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_device, check_flag, check_full_precision, check_like, check_mask, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Metric, Moments
from rlloss.preference_inputs import MAX_EXPONENT
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, reduce_sequences, weighted, zero_masked

__all__ = ["PreferenceLoss", "logistic_loss"]

Logps = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # chosen, rejected, and the reference's of both
Sides = tuple[Tensor, Tensor]  # of the chosen and of the rejected answers


class PreferenceLoss(Loss):
    """Base of the paired preference losses: a subclass writes its loss as one expression.

    forward(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps): per-sequence sums `[B]`
    (`rlloss.sequence_logps`), or means (`rlloss.sequence_mean_logps`) where `length_normalized` says so, float32 or
    float64. The log-ratios of a pair and its margin, in nats, are

        c = chosen_logps - ref_chosen_logps,   r = rejected_logps - ref_rejected_logps,   h = c - r

    A loss of the margin is written as `pair_loss(h, beta)`, any other as `answers_loss(chosen, rejected, beta)`.
    With `reference_free=True` the reference is uniform: the two ref tensors are None and drop out.

    Optional: `mask` (pairs that count), `weights` (scale a pair; 0 rejects it and keeps the denominator), `beta` (each
    pair's own, above 0, in the place of the loss's), `normalizer` (`rlloss.count` of the pairs, summed over the step's
    micro-batches and ranks).

    Metrics: accuracy (share of pairs with h > 0), margin (beta * h, with margin_std), chosen_reward and
    rejected_reward (beta times each log-ratio). An all-masked batch gives exactly 0 with zero gradient.
    """

    family = "preference"
    length_normalized: bool = False  # whether its inputs are means per token, not sums
    _inputs = ("chosen_logps", "rejected_logps")

    def __init__(self, *, beta: float = 0.1, reference_free: bool = False) -> None:
        super().__init__()
        check_range(self._who, "beta", beta, 0, open_low=True)
        check_flag(self._who, "reference_free", reference_free)
        self.beta, self.reference_free = beta, reference_free

    @property
    def needs_reference(self) -> bool:
        """True unless the reference is taken as uniform."""
        return not self.reference_free

    def score(self, log_ratio: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """What an answer's log-ratio counts: itself."""
        return log_ratio

    @property
    def score_exponent(self) -> float:
        """Nats per nat of the log-ratio that `score` exponentiates, bounded at 20; 0 where it does not."""
        return 0.0

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The loss of each pair as a function of its margin h."""
        raise NotImplementedError

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The loss of each pair as a function of the scores of its answers: that of their difference."""
        return self.pair_loss(chosen - rejected, beta)

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        return self._output(logps, mask, weights, beta, normalizer)

    def _output(
        self,
        logps: Logps,
        mask: Tensor | None,
        weights: Tensor | None,
        beta: Tensor | None,
        normalizer: Normalizer | None,
        step: Mapping[str, Tensor] | None = None,
        **rows: Tensor | None,
    ) -> LossOutput:
        """The loss and its metrics.

        `answers_loss` also gets `rows`, one number per pair each; `step`, numbers of the whole step, are metrics.
        """
        check_normalizer(self._who, normalizer)
        more = {name: x for name, x in rows.items() if x is not None}
        mask, chosen, rejected = self._log_ratios(logps, mask, {"weights": weights, "beta": beta, **more})
        strength = self.beta if beta is None else beta.detach()
        answers_loss: Callable[..., Tensor] = self.answers_loss

        def row_loss(chosen: Tensor, rejected: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(more, values, strict=True))
            return answers_loss(self.score(chosen), self.score(rejected), strength, **given)

        inputs = (chosen, rejected, *zero_masked(mask, *more.values()))
        loss = mean_of_rows(row_loss, inputs, mask, weights, normalizer)
        metrics = self._metrics(chosen.detach(), rejected.detach(), strength, mask)
        return LossOutput(loss, metrics | {name: Mean.constant(x, mask.sum()) for name, x in (step or {}).items()})

    def _log_ratios(
        self, logps: Logps, mask: Tensor | None, rows: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that count, and the log-ratios of both answers."""
        mask, (chosen, rejected), (ref_chosen, ref_rejected) = self._door(logps, mask, rows)
        return mask, chosen - ref_chosen, rejected - ref_rejected

    def _door(self, logps: Logps, mask: Tensor | None, rows: dict[str, Tensor | None]) -> tuple[Tensor, Sides, Sides]:
        """The pairs that count, and the log-probs of both answers under the policy and under the reference."""
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = logps
        refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
        of_sequence = "sequence_mean_logps" if self.length_normalized else "sequence_logps"
        mask = row_mask(
            self._who,
            mask,
            dict(zip(self._inputs, (chosen_logps, rejected_logps), strict=True)),
            refs | rows,
            hint=f"rlloss.{of_sequence}(logprobs, loss_mask) makes it",
        )
        self._check_reference(refs)
        chosen, rejected = zero_masked(mask, chosen_logps, rejected_logps)
        if ref_chosen_logps is None or ref_rejected_logps is None:
            return mask, (chosen, rejected), (torch.zeros_like(chosen), torch.zeros_like(rejected))
        ref_chosen, ref_rejected = zero_masked(mask, ref_chosen_logps.detach(), ref_rejected_logps.detach())
        return mask, (chosen, rejected), (ref_chosen, ref_rejected)

    def _metrics(self, chosen: Tensor, rejected: Tensor, beta: Tensor | float, mask: Tensor) -> dict[str, Metric]:
        exponent = torch.maximum(-self.score_exponent * chosen, -self.score_exponent * rejected)
        chosen, rejected = self.score(chosen), self.score(rejected)
        margin = chosen - rejected
        metrics: dict[str, Metric] = {
            "accuracy": Mean.of((margin > 0).to(margin.dtype), mask),
            "margin": Moments.of(beta * margin, mask),
            "chosen_reward": Mean.of(beta * chosen, mask),
            "rejected_reward": Mean.of(beta * rejected, mask),
        }
        if self.score_exponent:
            metrics["score_bounded_frac"] = Mean.of((exponent > MAX_EXPONENT).to(margin.dtype), mask)
        return metrics

    def _check_reference(self, refs: dict[str, Tensor | None]) -> None:
        for name, ref in refs.items():
            if self.reference_free and ref is not None:
                raise ValueError(f"{self._who}: reference_free=True takes no reference, got {name}; pass None")
            if not self.reference_free and ref is None:
                raise ValueError(f"{self._who}: needs {name}, got None; or set reference_free=True")


def logistic_loss(logits: Float[Tensor, " B"], label_smoothing: Tensor | float = 0.0) -> Float[Tensor, " B"]:
    """The negative log-likelihood of "chosen wins", a share `label_smoothing` of the labels taken to be flipped.

    -(1 - label_smoothing) log sigmoid(x) - label_smoothing log sigmoid(-x), with the slope
    sigmoid(x) - 1 + label_smoothing.

    >>> logistic_loss(torch.tensor([0.0])).tolist()
    [0.6931471824645996]
    """
    if not isinstance(label_smoothing, Tensor) and not label_smoothing:
        return -F.logsigmoid(logits)  # finite where logits are infinite: the other term would be 0 * inf
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def mean_of_rows(
    row_loss: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    mask: Tensor,
    weights: Tensor | None,
    normalizer: Normalizer | None,
) -> Tensor:
    """The weighted mean of `row_loss(*inputs)` over the rows that count.

    A row of weight 0 enters as 0: what stands there could be infinite, and 0 * inf is NaN in the product's backward.
    """
    if weights is not None:
        (weights,) = zero_masked(mask, weights.detach())
        inputs = zero_masked(weights != 0, *inputs)
    return reduce_sequences(weighted(row_loss(*inputs), weights), mask, normalizer=normalizer)


def row_mask(
    who: str, mask: Tensor | None, inputs: dict[str, Tensor], optional: dict[str, Tensor | None], *, hint: str
) -> Tensor:
    """The rows that count, all of them where `mask` is None, after checking that every tensor has one value per row."""
    (first_name, first), *_ = inputs.items()
    check_full_precision(who, first_name, first)
    if first.ndim != 1:
        raise ValueError(f"{who}: {first_name} must be one number per row [B], got {list(first.shape)}; {hint}")
    for name, x in (inputs | {k: x for k, x in optional.items() if x is not None}).items():
        check_like(who, name, x, first_name, first)
    if mask is None:
        return torch.ones_like(first, dtype=torch.bool)
    check_mask(who, "mask", mask, ndim=(1,))
    if mask.shape != first.shape:
        raise ValueError(f"{who}: mask must be {list(first.shape)} as {first_name}, got {list(mask.shape)}")
    check_device(who, "mask", mask, first_name, first)
    return mask
