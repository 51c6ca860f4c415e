"""Layouts and reductions: any layout becomes one row of floats per sequence, and every loss divides here."""

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike


def rows(x: ArrayLike | None, cu_seqlens: ArrayLike | None = None) -> list[list[float]]:
    """One row of floats per sequence, from padded `[B, T]` or packed `[N]` cut at `cu_seqlens`; none from None.

    >>> rows([1, 2, 3], cu_seqlens=[0, 1, 3])
    [[1.0], [2.0, 3.0]]
    """
    if x is None:
        return []
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != (2 if cu_seqlens is None else 1):
        raise ValueError(f"rows: needs [B, T], or [N] with cu_seqlens; got {list(values.shape)}, {cu_seqlens=}")
    if cu_seqlens is None:
        return values.tolist()
    return [values[start:stop].tolist() for start, stop in pairwise(np.asarray(cu_seqlens).tolist())]


def advantage_rows(advantages: ArrayLike, mask: list[list[float]], cu_seqlens: ArrayLike | None) -> list[list[float]]:
    """Advantages per token; one value per sequence is the advantage of each of its tokens."""
    values = np.asarray(advantages, dtype=np.float64)
    per_token = values.ndim == 2 if cu_seqlens is None else len(values) == sum(len(row) for row in mask)
    if per_token:
        return rows(advantages, cu_seqlens)
    return [[advantage] * len(row) for advantage, row in zip(values.tolist(), mask, strict=True)]


def as_given(by_sequence: list[list[float]], cu_seqlens: ArrayLike | None) -> ArrayLike:
    """One row per sequence, in the layout that `rows` took it from; what lies behind the last boundary is gone.

    >>> as_given([[1.0], [2.0, 3.0]], cu_seqlens=[0, 1, 3])
    [1.0, 2.0, 3.0]
    """
    return by_sequence if cu_seqlens is None else [number for row in by_sequence for number in row]


def mean(values: list[float]) -> float:
    """The mean, 0 over nothing."""
    return sum(values) / len(values) if values else 0.0


def reduced(token_losses: list[list[float]], how: str, max_completion_length: int | None = None) -> float:
    """One number from the losses of the counted tokens of each row; a row without any is not a sequence.

    >>> reduced([[1.0, 2.0, 3.0], [6.0], []], "token_mean")
    3.0
    >>> reduced([[1.0, 2.0, 3.0], [6.0], []], "sequence_mean")
    4.0
    """
    sequences = [losses for losses in token_losses if losses]
    if how == "token_mean":
        return mean([loss for losses in sequences for loss in losses])
    if how == "sequence_mean":
        return mean([mean(losses) for losses in sequences])
    if how == "sequence_sum":
        return mean([sum(losses) for losses in sequences])
    if how == "sum":
        return float(sum(sum(losses) for losses in sequences))
    if how == "fixed_length":
        if max_completion_length is None:
            raise ValueError("reduced: fixed_length divides by max_completion_length, got None")
        return mean([sum(losses) / max_completion_length for losses in sequences])
    names = "token_mean, sequence_mean, sequence_sum, fixed_length, sum"
    raise ValueError(f"reduced: reduction must be one of {names}, got {how!r}")
