"""How a reward function is called, wherever it stands, and what it must return: one finite number per completion."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["RewardFunction", "called", "check_number", "finite_numbers", "name_of", "parts_of"]

RewardFunction = Callable[..., Sequence[float] | Sequence[Sequence[float]]]

_LARGEST = torch.finfo(torch.float32).max  # rewards end in float32


def called(
    function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> Any:
    """What a function returns of the arguments that it takes, by name where it has their names.

    >>> called(lambda completions: [len(c) for c in completions], ["2+2?"], ["four"], {"answer": ["4"]})
    [4]
    """
    parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    wanted = {name: column for name, column in columns.items() if takes_all or name in parameters}
    if "completions" not in parameters:
        return function(prompts, completions, **wanted)
    if takes_all or "prompts" in parameters:
        wanted["prompts"] = prompts
    return function(completions=completions, **wanted)


def finite_numbers(who: str, given: Any, completions: Sequence[str]) -> list[float]:
    """One finite number per completion, or a ValueError that says what came in its place.

    >>> finite_numbers("length", [1.0, 2], ["a", "bc"])
    [1.0, 2.0]
    """
    try:
        values = list(given)
    except TypeError as error:
        raise ValueError(f"{who}: must return one number per completion, got {given!r:.200}") from error
    check_number(who, values, completions)
    numbers = []
    for i, (value, completion) in enumerate(zip(values, completions, strict=True)):
        number = _number(value)
        if number is None or not abs(number) <= _LARGEST:  # a NaN compares False
            raise ValueError(
                f"{who}: returned {value!r:.60} for completion {i} ({completion!r:.200}); return a finite number, such "
                "as 0.0 for an answer without a score"
            )
        numbers.append(number)
    return numbers


def check_number(who: str, given: Sequence[Any], completions: Sequence[str]) -> None:
    """Raises ValueError unless a function returned as much as it got.

    >>> check_number("length", [1.0], ["a"])
    """
    if len(given) != len(completions):
        raise ValueError(f"{who}: got {len(completions)} completions but returned {len(given)} rewards")


def name_of(function: RewardFunction) -> str:
    """What logs and errors call a function.

    >>> name_of(len)
    'len'
    """
    return getattr(function, "__name__", type(function).__name__)


def parts_of(function: RewardFunction) -> Iterator[RewardFunction]:
    """A function and, where it is made of others (its `reward_parts`), those too.

    >>> len(list(parts_of(len)))
    1
    """
    yield function
    for part in getattr(function, "reward_parts", ()):
        yield from parts_of(part)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
