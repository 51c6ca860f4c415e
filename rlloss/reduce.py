"""Masks, shift, per-sequence sums and means, counts and reductions: the one place where a count divides."""

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_choice, check_mask, check_range, check_tokens_layout
from rlloss._typing import Bool, Float, Int

__all__ = [
    "Counts",
    "Normalizer",
    "Reduction",
    "check_normalizer",
    "count",
    "last_tokens",
    "prompt_mean_weights",
    "reduce_sequences",
    "reduce_tokens",
    "sequence_lengths",
    "sequence_mean",
    "sequence_sum",
    "shift",
    "to_tokens",
    "weighted",
    "within_sequences",
    "zero_masked",
]

Reduction = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sum"]


class Counts(NamedTuple):
    """What a batch holds, in every unit that a loss may divide by; additive over micro-batches and ranks."""

    tokens: Tensor
    sequences: Tensor

    def __add__(self, other: Any) -> "Counts":
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences)

    def __radd__(self, other: object) -> "Counts":
        return self if isinstance(other, int) and other == 0 else NotImplemented


Normalizer = Counts | Tensor | float | int


def count(loss_mask: Tensor, cu_seqlens: Tensor | None = None) -> Counts:
    """Counts the True entries of a mask and the rows that have at least one.

    Args:
        loss_mask: `[B, T]`, packed `[N]` with `cu_seqlens`, or `[B]` for losses whose unit is the row or the pair.
        cu_seqlens: Boundaries `[S + 1]` of a packed batch.

    >>> count(torch.tensor([[True, True], [False, False]]))
    Counts(tokens=tensor(2), sequences=tensor(1))
    """
    check_mask("count", "loss_mask", loss_mask)
    if loss_mask.ndim == 1 and cu_seqlens is None:
        return Counts(loss_mask.sum(), loss_mask.sum())
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    return Counts(lengths.sum(), (lengths > 0).sum())


def shift(
    input_ids: Int[Tensor, "*tokens"], loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None
) -> tuple[Int[Tensor, "*tokens"], Bool[Tensor, "*tokens"]]:
    """The ids that the model's rows predict, and their mask: row i of the model is scored against `ids[i]`.

    A causal model's output at position i predicts token i + 1, so `ids` is `input_ids` one step to the left. The
    last position of every sequence predicts nothing: its id is a filler and its mask is False. The first token of a
    sequence is never predicted; in left-padded rows leave its mask False.

    >>> ids, mask = shift(torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, True]]))
    >>> ids.tolist(), mask.tolist()
    ([[6, 7, 7]], [[True, True, False]])
    """
    check_tokens_layout("shift", loss_mask, cu_seqlens)
    if input_ids.shape != loss_mask.shape:
        raise ValueError(
            f"shift: input_ids {list(input_ids.shape)} and loss_mask {list(loss_mask.shape)} must have one shape"
        )
    ids = torch.cat([input_ids[..., 1:], input_ids[..., -1:]], dim=-1)
    mask = torch.cat([loss_mask[..., 1:], torch.zeros_like(loss_mask[..., -1:])], dim=-1)
    if cu_seqlens is not None:
        segment = _segments(loss_mask, cu_seqlens)
        mask[..., :-1] &= segment[1:] == segment[:-1]
    return ids, mask


def within_sequences(loss_mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The mask without what lies behind the last boundary of a pack: it belongs to no sequence."""
    if cu_seqlens is None:
        return loss_mask
    return loss_mask & (_segments(loss_mask, cu_seqlens) < cu_seqlens.shape[0] - 1)


def zero_masked(loss_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The mask at the door: masked entries become 0 before any exp, log or product can see them."""
    return tuple(torch.where(loss_mask, x, 0) for x in tensors)


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """`weights * values`, where weight 0 rejects an entry whatever stands in it."""
    return values if weights is None else torch.where(weights == 0, 0, weights * values)


def _segments(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    positions = torch.arange(loss_mask.shape[0], device=loss_mask.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)


def sequence_sum(
    values: Float[Tensor, "*tokens"], loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None
) -> Float[Tensor, " S"]:
    """Per-sequence sums over the trained tokens: rows of `[B, T]`, or segments of a packed `[N]`.

    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> sequence_sum(x, x > 0, cu_seqlens=torch.tensor([0, 1, 3])).tolist()
    [1.0, 5.0]
    """
    check_tokens_layout("sequence_sum", loss_mask, cu_seqlens)
    values = torch.where(loss_mask, values, 0)
    if cu_seqlens is None:
        return values.sum(-1)
    num_sequences = cu_seqlens.shape[0] - 1
    # tokens behind the last boundary belong to no sequence; they fall into the extra bucket
    sums = values.new_zeros(num_sequences + 1).index_add(0, _segments(loss_mask, cu_seqlens), values)
    return sums[:num_sequences]


def sequence_lengths(loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None) -> Int[Tensor, " S"]:
    """Trained tokens per sequence.

    >>> sequence_lengths(torch.tensor([[True, False, True], [False, False, False]])).tolist()
    [2, 0]
    """
    check_tokens_layout("sequence_lengths", loss_mask, cu_seqlens)
    if cu_seqlens is None:
        return loss_mask.sum(-1)
    num_sequences = cu_seqlens.shape[0] - 1
    zeros = torch.zeros(num_sequences + 1, dtype=torch.long, device=loss_mask.device)
    return zeros.index_add(0, _segments(loss_mask, cu_seqlens), loss_mask.long())[:num_sequences]


def sequence_mean(
    values: Float[Tensor, "*tokens"], loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None
) -> Float[Tensor, " S"]:
    """Per-sequence means over the trained tokens; 0 for a sequence without any.

    >>> sequence_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [2.0]
    """
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    return sequence_sum(values, loss_mask, cu_seqlens) / lengths.clamp(min=1)


def to_tokens(per_sequence: Tensor, loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None) -> Tensor:
    """Gives every token the value of its sequence.

    >>> to_tokens(torch.tensor([1.0, 2.0]), torch.ones(3).bool(), torch.tensor([0, 1, 3])).tolist()
    [1.0, 2.0, 2.0]
    """
    if cu_seqlens is None:
        return per_sequence[:, None].expand(loss_mask.shape)
    # one more entry for tokens behind the last boundary
    return torch.cat([per_sequence, per_sequence.new_zeros(1)])[_segments(loss_mask, cu_seqlens)]


def last_tokens(loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None) -> Bool[Tensor, "*tokens"]:
    """True at the last trained token of every sequence; a sequence without any has none.

    >>> last_tokens(torch.tensor([[True, True, False], [False, False, False]])).tolist()
    [[False, True, False], [False, False, False]]
    """
    check_tokens_layout("last_tokens", loss_mask, cu_seqlens)
    totals = sequence_lengths(loss_mask, cu_seqlens)
    if cu_seqlens is not None:
        totals = totals.cumsum(0)
    # behind the last boundary stands 0, the count of no trained token
    return loss_mask & (loss_mask.cumsum(-1) == to_tokens(totals, loss_mask, cu_seqlens))


def group_index(group_ids: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The groups numbered 0, 1, ... in the order of their ids; `torch.unique` would make the host wait for the device.

    >>> group_index(torch.tensor([7, 3, 7])).tolist()
    [1, 0, 1]
    """
    ordered, order = group_ids.sort()
    number = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))[: len(ordered)]
    return torch.empty_like(order).scatter(0, order, number)


def prompt_mean_weights(
    loss_mask: Bool[Tensor, "*tokens"], group_ids: Int[Tensor, " S"], cu_seqlens: Tensor | None = None
) -> Float[Tensor, "*tokens"]:
    """Token weights that turn the reduction `sum` into a mean over prompts of the token mean of each prompt's group.

    >>> mask = torch.tensor([[True, True], [True, True], [True, False]])
    >>> prompt_mean_weights(mask, torch.tensor([7, 7, 9])).tolist()
    [[0.125, 0.125], [0.125, 0.125], [0.5, 0.0]]
    """
    lengths = sequence_lengths(loss_mask, cu_seqlens)
    if group_ids.shape != lengths.shape:
        raise ValueError(
            f"prompt_mean_weights: group_ids must have one entry per sequence, {list(lengths.shape)}, "
            f"got {list(group_ids.shape)}"
        )
    group = group_index(group_ids)
    tokens = torch.zeros_like(lengths).index_add(0, group, lengths)
    prompts = (tokens > 0).sum()
    weights = 1 / (tokens[group].clamp(min=1) * prompts.clamp(min=1))
    return torch.where(loss_mask, to_tokens(weights, loss_mask, cu_seqlens), 0)


def reduce_tokens(
    values: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    reduction: Reduction,
    *,
    normalizer: Normalizer | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
) -> Float[Tensor, ""]:
    """Reduces per-token values to a scalar; S is the number of sequences with at least one trained token.

    `token_mean` sum / tokens; `sequence_mean` (1/S) sum_i (1/L_i) sum_t; `sequence_sum` (1/S) sum;
    `fixed_length` sum / (S * max_length); `sum` sum.

    Args:
        normalizer: `Counts` of the whole step, summed over micro-batches and ranks, or the plain number of this
            reduction's unit; the counts of this call where it is None.
        max_length: The constant C of `fixed_length`.

    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> x = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    >>> [float(reduce_tokens(x, mask, r)) for r in ("token_mean", "sequence_mean", "sequence_sum")]
    [2.0, 3.0, 4.0]
    """
    check_choice("reduce_tokens", "reduction", reduction, get_args(Reduction))
    if (reduction == "fixed_length") != (max_length is not None):
        raise ValueError(
            f"reduce_tokens: max_length is for fixed_length and only for it, got {reduction=} {max_length=}"
        )
    if reduction == "sequence_mean":
        total = sequence_mean(values, loss_mask, cu_seqlens).sum()
    else:
        total = sequence_sum(values, loss_mask, cu_seqlens).sum()
    if reduction == "sum":
        if normalizer is not None and not isinstance(normalizer, Counts):
            raise ValueError(f"reduce_tokens: the reduction 'sum' divides by nothing, got normalizer={normalizer!r}")
        return total
    counts = count(loss_mask, cu_seqlens) if normalizer is None else normalizer
    unit = "tokens" if reduction == "token_mean" else "sequences"
    return total / (_divisor(counts, unit) * (max_length or 1))


def reduce_sequences(
    values: Float[Tensor, " S"], mask: Bool[Tensor, " S"], *, normalizer: Normalizer | None = None
) -> Float[Tensor, ""]:
    """The mean of per-sequence (or per-pair) values over the rows that count.

    >>> float(reduce_sequences(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])))
    2.0
    """
    return torch.where(mask, values, 0).sum() / _divisor(count(mask) if normalizer is None else normalizer, "sequences")


def _divisor(normalizer: Normalizer, unit: Literal["tokens", "sequences"]) -> Tensor | float | int:
    if isinstance(normalizer, Counts):
        return getattr(normalizer, unit).clamp(min=1)
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(
                f"normalizer: must be Counts or one number, got a tensor of shape {list(normalizer.shape)}"
            )
        return torch.where(normalizer == 0, 1, normalizer)
    check_range("normalizer", f"the number of {unit}", normalizer, 0)
    return normalizer or 1


def check_normalizer(who: str, normalizer: Normalizer | None, *, plain_number: bool = True) -> None:
    """Raises ValueError unless `normalizer` is None, Counts or, for losses of one unit, a plain number."""
    if normalizer is None:
        return
    if isinstance(normalizer, Counts):
        for name, value in normalizer._asdict().items():
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(
                    f"{who}: normalizer.{name} must be a 0-dim tensor, got {value!r}; use rlloss.count(mask)"
                )
    elif isinstance(normalizer, bool) or not isinstance(normalizer, int | float | Tensor):
        raise ValueError(f"{who}: normalizer must be rlloss.Counts or a number, got {type(normalizer).__name__}")
    elif not plain_number:
        raise ValueError(
            f"{who}: divides by tokens and by sequences, so normalizer must be rlloss.Counts, got {normalizer!r}"
        )
