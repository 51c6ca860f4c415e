"""Reward functions in the field's form: (prompts, completions, **columns) -> one number per completion."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss._checks import check_range

__all__ = ["RewardFunction", "Rewards"]

RewardFunction = Callable[..., Sequence[float]]


class Rewards:
    """One reward function or a weighted sum of several, with every return value checked.

    >>> def length(prompts, completions, **columns):
    ...     return [float(len(c)) for c in completions]
    >>> Rewards([length, length], weights=[1.0, 0.5])(["p", "p"], ["abc", ""], {})[0].tolist()
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
            check_range("Rewards", "weight", weight)
        self.names = [_name(f) for f in self.functions]

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted rewards `[B]`, and each function's unweighted mean by name."""
        total, means = torch.zeros(len(completions)), {}
        for function, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            values = self._checked(function(prompts, completions, **columns), name, completions)
            means[f"reward/{name}"] = float(values.mean())
            total += weight * values
        return total, means if len(self.functions) > 1 else {}

    def _checked(self, values: Any, name: str, completions: Sequence[str]) -> Tensor:
        try:
            rewards = torch.tensor([float(v) for v in values], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward function {name!r}: must return one number per completion, got {values!r:.200}"
            ) from error
        if len(rewards) != len(completions):
            raise ValueError(
                f"reward function {name!r}: got {len(completions)} completions but returned {len(rewards)} rewards"
            )
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"reward function {name!r}: returned {rewards[bad[0]].item()} for completion {bad[0]} "
                f"({completions[bad[0]]!r:.200}); return a finite number, such as 0.0 for an answer without a score"
            )
        return rewards


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
