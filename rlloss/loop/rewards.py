"""Reward functions in the field's form: (prompts, completions, **columns) -> a number per completion, or per token."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlloss._checks import check_range
from rlloss.loop.modes import eval_mode
from rlloss.rewards.call import RewardFunction, called, check_number, finite_numbers, name_of, parts_of

__all__ = ["RewardFunction", "Rewards", "Scores"]


class Scores(NamedTuple):
    """What completions earned: in all, by each function, and per token where a function said so."""

    total: Tensor  # [B]
    means: dict[str, float]  # unweighted, by name; empty where there is one function
    per_token: list[list[float]] | None  # a function's number for the whole completion stands at its last token


class Rewards:
    """One reward function or a weighted sum of several, with every return value checked.

    A function is called with the columns that it names, or with all of them where it takes `**columns`. It may also
    return a list of numbers per completion, one for each of its tokens: rewards that are earned on the way. It finds
    the tokens in the column `completion_ids`.

    >>> def length(prompts, completions, **columns):
    ...     return [float(len(c)) for c in completions]
    >>> Rewards([length, length], weights=[1.0, 0.5])(["p", "p"], ["abc", ""], {}).total.tolist()
    [4.5, 0.0]
    """

    def __init__(
        self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise ValueError("Rewards: needs at least one reward function, got none")
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"Rewards: {len(self.functions)} functions need as many weights, got {self.weights}")
        for weight in self.weights:
            check_range("Rewards", "weight", weight, -sys.float_info.max, sys.float_info.max)
        self.names = [name_of(f) for f in self.functions]

    def modules(self) -> dict[str, nn.Module]:
        """The functions that are modules, whose state belongs into a checkpoint, and those that others are made of."""
        parts = [(i, j, part) for i, f in enumerate(self.functions) for j, part in enumerate(parts_of(f))]
        return {f"reward_{i}_{j}" if j else f"reward_{i}": p for i, j, p in parts if isinstance(p, nn.Module)}

    def frozen(self) -> AbstractContextManager[None]:
        """Modules are in eval mode for as long as the context lasts: what is only measured teaches no statistics.

        >>> norm = nn.Identity()
        >>> with Rewards(norm).frozen():
        ...     norm.training
        False
        >>> norm.training
        True
        """
        return eval_mode(*self.modules().values())

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Scores:
        """The weighted rewards of all completions."""
        total, means, parts = torch.zeros(len(completions)), {}, []
        for function, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            given = called(function, prompts, completions, columns)
            tokens = _per_token(given, name, completions, columns)
            given = given if tokens is None else [sum(row) for row in tokens]
            numbers = finite_numbers(f"reward function {name!r}", given, completions)
            values = torch.tensor(numbers, dtype=torch.float32)
            means[f"reward/{name}"] = float(values.mean())
            total += weight * values
            parts.append((weight, values.tolist(), tokens))
        per_token = None
        if any(tokens is not None for _, _, tokens in parts):
            per_token = [[0.0] * len(ids) for ids in columns["completion_ids"]]
            for weight, values, tokens in parts:
                for i, row in enumerate(per_token):
                    earned = [0.0] * (len(row) - 1) + [values[i]] if tokens is None else tokens[i]
                    per_token[i] = [x + weight * y for x, y in zip(row, earned, strict=True)]
        return Scores(total, means if len(self.functions) > 1 else {}, per_token)


def _per_token(
    given: Any, name: str, completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[list[float]] | None:
    """What a function returned, where it is a list per completion."""
    rows = [_numbers(row) for row in given] if isinstance(given, list | tuple) else []
    if all(row is None for row in rows):
        return None
    check_number(f"reward function {name!r}", given, completions)
    if "completion_ids" not in columns:
        raise ValueError(f"reward function {name!r}: rewards per token need the column completion_ids, got none")
    made: list[list[float]] = []
    for i, (row, ids) in enumerate(zip(rows, columns["completion_ids"], strict=True)):
        if row is None or len(row) != len(ids):
            got = "one number" if row is None else f"{len(row)} numbers"
            raise ValueError(
                f"reward function {name!r}: rewards per token need one number for each of the {len(ids)} tokens of "
                f"completion {i} ({completions[i]!r:.200}), got {got}; the column completion_ids has the tokens"
            )
        made.append(row)
    return made


def _numbers(row: Any) -> list[float] | None:
    """A row of rewards per token as floats; None where it is one number."""
    if getattr(row, "ndim", 0) == 1:  # an array or a tensor
        row = row.tolist()
    return [float(x) for x in row] if isinstance(row, list | tuple) else None
