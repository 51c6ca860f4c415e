"""What a loss returns: a scalar with a gradient, and metrics that merge exactly."""

# metrics and outputs are tuples so that they are pytrees; their `+` merges and their `*` scales
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "EffectiveSampleSize",
    "ExplainedVariance",
    "LossOutput",
    "Max",
    "Mean",
    "Metric",
    "Min",
    "Moments",
    "combine",
    "merge_metrics",
    "scalars",
    "waist_gradient",
]


class _Metric:
    """What all kinds share: `a + b` merges, `sum(parts)` works, `float(metric)` reads."""

    __slots__ = ()

    @property
    def value(self) -> Tensor:
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError

    def __radd__(self, other: object) -> Any:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __float__(self) -> float:
        return float(self.value)


class _MeanFields(NamedTuple):
    total: Tensor
    count: Tensor


class Mean(_Metric, _MeanFields):
    """A masked mean, kept as sum and count so that merging parts of any size is exact.

    >>> whole = Mean.of(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, True]))
    >>> part = Mean.of(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
    >>> float(part + Mean.of(torch.tensor([6.0]), torch.tensor([True]))) == float(whole) == 3.0
    True
    """

    __slots__ = ()

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "Mean":
        """The mean of `values` where `mask` is True; 0 where nothing is."""
        values = torch.where(mask, values.detach(), 0)
        return cls(values.sum(), mask.sum())

    @classmethod
    def constant(cls, value: Tensor | float, count: Tensor) -> "Mean":
        """One number that stands for `count` entries: parts that agree on it merge to it."""
        # a fill, where a copy of the number would make the host wait for the device
        if not isinstance(value, Tensor):
            value = torch.full((), value, device=count.device)
        value = value.detach().to(count.device)
        return cls(value * count, count)

    @property
    def value(self) -> Tensor:
        """Total / count."""
        return self.total / self.count.clamp(min=1)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)


class _MomentsFields(NamedTuple):
    count: Tensor
    mean: Tensor
    m2: Tensor


class Moments(_Metric, _MomentsFields):
    """Mean and (population) standard deviation, merged by Chan's formula: https://doi.org/10.1080/00031305.1983.10483115.

    >>> x = Moments.of(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
    >>> float(x), float(x.std)
    (2.0, 1.0)
    """

    __slots__ = ()

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "Moments":
        """The moments of `values` where `mask` is True."""
        values, count = torch.where(mask, values.detach(), 0), mask.sum()
        mean = values.sum() / count.clamp(min=1)
        return cls(count, mean, torch.where(mask, values - mean, 0).square().sum())

    @property
    def value(self) -> Tensor:
        """The mean."""
        return self.mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of what was seen; 0 where nothing was."""
        return (self.m2 / self.count.clamp(min=1)).sqrt()

    def __add__(self, other: "Moments") -> "Moments":
        count, delta = self.count + other.count, other.mean - self.mean
        share = other.count.to(other.mean.dtype) / count.clamp(min=1)
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * self.count * share)


class _ExplainedVarianceFields(NamedTuple):
    count: Tensor
    target_mean: Tensor
    target_m2: Tensor
    error_mean: Tensor
    error_m2: Tensor


class ExplainedVariance(_Metric, _ExplainedVarianceFields):
    """1 - Var(target - prediction) / Var(target): 1 for a perfect critic, 0 for a constant one; merged as Moments are.

    >>> prediction, target = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    >>> round(float(ExplainedVariance.of(prediction, target, target > 0)), 4)
    0.6667
    """

    __slots__ = ()

    @classmethod
    def of(cls, predictions: Tensor, targets: Tensor, mask: Tensor) -> "ExplainedVariance":
        """What `predictions` explain of `targets` where `mask` is True."""
        targets = torch.where(mask, targets.detach(), 0)
        target, error = Moments.of(targets, mask), Moments.of(targets - torch.where(mask, predictions, 0), mask)
        return cls(*target, error.mean, error.m2)

    @property
    def value(self) -> Tensor:
        """1 - Var(error) / Var(target); 0 where the targets do not vary."""
        rounding = self.count * (4 * torch.finfo(self.target_m2.dtype).eps * self.target_mean).square()
        varies = self.target_m2 > rounding
        return torch.where(varies, 1 - self.error_m2 / torch.where(varies, self.target_m2, 1), 0)

    def __add__(self, other: "ExplainedVariance") -> "ExplainedVariance":
        target = Moments(self.count, self.target_mean, self.target_m2)
        target += Moments(other.count, other.target_mean, other.target_m2)
        error = Moments(self.count, self.error_mean, self.error_m2)
        error += Moments(other.count, other.error_mean, other.error_m2)
        return ExplainedVariance(*target, error.mean, error.m2)


class _MaxFields(NamedTuple):
    largest: Tensor


class Max(_Metric, _MaxFields):
    """The largest masked value; reads 0 where there is none."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "Max":
        """The largest of `values` where `mask` is True."""
        values = torch.where(mask, values.detach(), -torch.inf).flatten()
        return cls(torch.cat([values, values.new_full((1,), -torch.inf)]).amax())

    @property
    def value(self) -> Tensor:
        """The largest value seen, else 0."""
        return torch.where(self.largest == -torch.inf, 0, self.largest)

    def __add__(self, other: "Max") -> "Max":
        return Max(torch.maximum(self.largest, other.largest))


class _MinFields(NamedTuple):
    smallest: Tensor


class Min(_Metric, _MinFields):
    """The smallest masked value; reads 0 where there is none."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "Min":
        """The smallest of `values` where `mask` is True."""
        values = torch.where(mask, values.detach(), torch.inf).flatten()
        return cls(torch.cat([values, values.new_full((1,), torch.inf)]).amin())

    @property
    def value(self) -> Tensor:
        """The smallest value seen, else 0."""
        return torch.where(self.smallest == torch.inf, 0, self.smallest)

    def __add__(self, other: "Min") -> "Min":
        return Min(torch.minimum(self.smallest, other.smallest))


class _EffectiveSampleSizeFields(NamedTuple):
    total: Tensor
    squares: Tensor
    count: Tensor


class EffectiveSampleSize(_Metric, _EffectiveSampleSizeFields):
    """Kish's (sum w)^2 / (n sum w^2) of importance weights: 1 where all weigh the same, 1/n where one has it all.

    >>> w = torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> float(EffectiveSampleSize.of(w, w >= 0))
    0.5
    """

    __slots__ = ()

    @classmethod
    def of(cls, weights: Tensor, mask: Tensor) -> "EffectiveSampleSize":
        """That of `weights` where `mask` is True, as a share of their number; 0 where none weighs anything."""
        weights = torch.where(mask, weights.detach(), 0)
        return cls(weights.sum(), weights.square().sum(), mask.sum())

    @property
    def value(self) -> Tensor:
        """The share of the samples that the weights are worth."""
        weighed = self.count * self.squares
        return torch.where(weighed > 0, self.total.square() / torch.where(weighed > 0, weighed, 1), 0)

    def __add__(self, other: "EffectiveSampleSize") -> "EffectiveSampleSize":
        return EffectiveSampleSize(self.total + other.total, self.squares + other.squares, self.count + other.count)


Metric = Mean | Moments | ExplainedVariance | EffectiveSampleSize | Max | Min


class LossOutput(NamedTuple):
    """A loss (0-dim, carries the gradient) and its detached metrics; `0.1 * output` scales the loss alone."""

    loss: Tensor
    metrics: dict[str, Metric]

    def __mul__(self, factor: float | Tensor) -> "LossOutput":
        return LossOutput(self.loss * factor, self.metrics)

    def __rmul__(self, factor: float | Tensor) -> "LossOutput":
        return self * factor


def combine(**terms: LossOutput) -> LossOutput:
    """The sum of losses over different sets of tokens, each with its own normaliser.

    Metrics keep their term's name: `combine(policy=a, nll=0.1 * b).metrics["nll/..."]`. VAPO's imitation of its own
    right answers, https://arxiv.org/abs/2504.05118, is such a sum; `b` is the SFT loss of rows that earned a reward,
    `SFTLoss()(logprobs, loss_mask & is_right[:, None], normalizer=...)`, divided by the count of that mask.

    >>> a = LossOutput(torch.tensor(1.0), {"x": Max(torch.tensor(2.0))})
    >>> total = combine(policy=a, nll=0.5 * a)
    >>> float(total.loss), sorted(total.metrics)
    (1.5, ['nll/x', 'policy/x'])
    """
    if not terms:
        raise ValueError("combine: needs at least one named LossOutput, as in combine(policy=out, nll=0.1 * out2)")
    for name, term in terms.items():
        if not isinstance(term, LossOutput):
            raise ValueError(f"combine: {name} must be a LossOutput, got {type(term).__name__}")
    loss = torch.stack([term.loss for term in terms.values()]).sum()
    return LossOutput(loss, {f"{name}/{k}": v for name, term in terms.items() for k, v in term.metrics.items()})


def merge_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Metrics of the whole batch from those of its parts (micro-batches, ranks): exact, in any order.

    A part that lacks a key simply does not vote on it.

    >>> part = {"largest": Max(torch.tensor(1.0))}
    >>> merge_metrics([part, {"largest": Max(torch.tensor(4.0))}])["largest"].value
    tensor(4.)
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric
    return merged


def scalars(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """All metrics as floats with one device sync; `Moments` also yield `<name>_std`.

    >>> scalars({"ratio": Moments.of(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))})
    {'ratio': 2.0, 'ratio_std': 1.0}
    """
    values = {}
    for name, metric in metrics.items():
        values[name] = metric.value
        if isinstance(metric, Moments):
            values[f"{name}_std"] = metric.std
    if not values:
        return {}
    dtype = max((v.dtype for v in values.values()), key=lambda d: d.itemsize)
    return dict(zip(values, torch.stack([v.to(dtype) for v in values.values()]).tolist(), strict=True))


def waist_gradient(loss: Callable[..., LossOutput], *waist: Tensor) -> tuple[LossOutput, tuple[Tensor, ...]]:
    """Differentiates a whole step's loss with respect to its log-probs, for losses that no split reproduces.

    The log-probs of a step are small even where its activations are not: collect them without gradient, call this
    once, then run `logprobs.backward(gradient)` per micro-batch. Exact for every loss, whatever couples its rows.

    >>> out, (g,) = waist_gradient(lambda x: LossOutput((x * x).sum(), {}), torch.tensor([1.0, 3.0]))
    >>> float(out.loss), g.tolist()
    (10.0, [2.0, 6.0])
    """
    leaves = [x.detach().requires_grad_() for x in waist]
    with torch.enable_grad():
        out = loss(*leaves)
    if not isinstance(out, LossOutput):
        raise ValueError(f"waist_gradient: loss must return a LossOutput, got {type(out).__name__}")
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
    return LossOutput(out.loss.detach(), out.metrics), grads
