"""Rewards made of rewards: clipped, scaled, normalised, and the conservative ensemble."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlloss._checks import check_choice, check_range
from rlloss.advantages.running import RunningRewardNorm
from rlloss.output import Moments
from rlloss.rewards.call import RewardFunction, called, finite_numbers, name_of
from rlloss.rewards.reward import Columns, Reward

__all__ = ["Ensemble", "Normalized", "clipped", "normalized", "scaled"]

_LARGEST = sys.float_info.max


def clipped(function: RewardFunction, low: float = -math.inf, high: float = math.inf) -> Reward:
    """The reward, held within [low, high].

    >>> clipped(lambda prompts, completions: [-3.0, 0.5], -1, 1)(["", ""], ["", ""])
    [-1.0, 0.5]
    """
    check_range("clipped", "low", low, high=_LARGEST)
    check_range("clipped", "high", high, max(low, -_LARGEST))
    return _Changed("clipped", function, lambda x: float(min(max(x, low), high)), {"low": low, "high": high})


def scaled(function: RewardFunction, factor: float, shift: float = 0.0) -> Reward:
    """`factor * reward + shift`.

    >>> scaled(lambda prompts, completions: [-3.0, 0.5], 2, 1)(["", ""], ["", ""])
    [-5.0, 2.0]
    """
    for name, number in {"factor": factor, "shift": shift}.items():
        check_range("scaled", name, number, -_LARGEST, _LARGEST)
    return _Changed("scaled", function, lambda x: factor * x + shift, {"factor": factor, "shift": shift})


def normalized(function: RewardFunction, *, center: bool = True, eps: float = 1e-8) -> "Normalized":
    """The reward in units of all rewards seen so far: see `Normalized`.

    >>> normalized(lambda prompts, completions: [1.0, 2.0, 3.0], eps=0.0)([""] * 3, [""] * 3)
    [-1.0, 0.0, 1.0]
    """
    return Normalized(function, center=center, eps=eps)


class Normalized(nn.Module):
    """A reward by `RunningRewardNorm`: a call joins its rewards to all that were seen and gives them in their units.

    About 0 with a standard deviation of 1, and not bounded: `clipped(normalized(...), -5, 5)`.

    The statistics are state, and the only one of this module. `train_online` saves them with its checkpoints, wherever
    in a combination of rewards they stand. In eval mode a call only reads them, and the loop's evaluations do so.

    Args:
        function: The reward; a weighted sum is normalised as a whole, its parts one by one.
        center: False divides without taking the mean away.
        eps: Added to the variance.
    """

    def __init__(self, function: RewardFunction, *, center: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        self.reward_parts = (function,)  # in a tuple, since it is no part of this module: its state is its own
        self.norm = RunningRewardNorm(center=center, eps=eps)
        self.__name__ = f"normalized_{name_of(function)}"

    def forward(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The normalised rewards of all completions."""
        numbers = _numbers(self.__name__, self.reward_parts[0], prompts, completions, columns)
        rewards = torch.tensor(numbers, dtype=torch.float64)
        if self.training:
            self.norm.update(Moments.of(rewards, torch.ones_like(rewards, dtype=torch.bool)))
        return self.norm(rewards).tolist()


class Ensemble(Reward):
    """Several rewards of one thing as one that does not trust them where they part, https://arxiv.org/abs/2310.02743.

        mean                 1/K sum_k r_k
        min                  min_k r_k
        mean_minus_std       mean - std_coef sqrt(1/K sum_k (r_k - mean)^2)
        mean_minus_variance  mean - std_coef 1/K sum_k (r_k - mean)^2

    A policy that learns to exploit one reward model gains little where the others do not agree. The paper's
    uncertainty-weighted optimisation is the last; the root keeps the unit of the rewards. The functions must share a
    scale: `normalized`.

    Args:
        functions: The K rewards.
        reduce: One of the four.
        std_coef: How many standard deviations, or variances, the last two subtract.

    >>> one, two = lambda prompts, completions: [1.0, 1.0], lambda prompts, completions: [1.0, 3.0]
    >>> Ensemble([one, two], reduce="mean_minus_std", std_coef=0.5)(["", ""], ["", ""])
    [1.0, 1.5]
    """

    def __init__(self, functions: Sequence[RewardFunction], *, reduce: str = "mean", std_coef: float = 1.0) -> None:
        if callable(functions) or not functions:
            raise ValueError(f"Ensemble: needs a list of reward functions, got {functions!r:.100}")
        check_choice("Ensemble", "reduce", reduce, ("mean", "min", "mean_minus_std", "mean_minus_variance"))
        check_range("Ensemble", "std_coef", std_coef, 0, _LARGEST)
        self.functions, self.reduce, self.std_coef = tuple(functions), reduce, std_coef
        self.reward_parts = self.functions
        self.__name__ = f"ensemble_{reduce}"

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        given = [_numbers(self.__name__, f, prompts, completions, columns) for f in self.functions]
        return [self._reduced(row) for row in zip(*given, strict=True)]

    def _reduced(self, rewards: Sequence[float]) -> float:
        if self.reduce == "min":
            return min(rewards)
        mean = statistics.fmean(rewards)
        if self.reduce == "mean":
            return mean
        spread = statistics.pstdev if self.reduce == "mean_minus_std" else statistics.pvariance
        return mean - self.std_coef * spread(rewards, mean)


class _Changed(Reward):
    """A reward whose numbers are changed one by one."""

    def __init__(
        self, verb: str, function: RewardFunction, change: Callable[[float], float], options: dict[str, float]
    ) -> None:
        self.reward_parts = (function,)
        self._change, self._verb, self._options = change, verb, options
        self.__name__ = f"{verb}_{name_of(function)}"

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        numbers = _numbers(self.__name__, self.reward_parts[0], prompts, completions, columns)
        return [self._change(x) for x in numbers]

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={number!r}" for name, number in self._options.items())
        return f"{self._verb}({self.reward_parts[0]!r}, {options})"


def _numbers(
    who: str, function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str], columns: Columns
) -> list[float]:
    """What a function returned, one finite number per completion."""
    who, given = f"{who}: {name_of(function)}", called(function, prompts, completions, columns)
    if isinstance(given, list | tuple) and any(isinstance(x, list | tuple) or getattr(x, "ndim", 0) for x in given):
        raise ValueError(f"{who}: rewards per token cannot be combined, got {given!r:.200}; return one per completion")
    return finite_numbers(who, given, completions)
