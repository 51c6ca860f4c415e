"""What every named reward is: keyword-only options, then `(prompts, completions, **columns)` to a number each."""

import inspect
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from rlloss._checks import nearest

__all__ = ["AnswerReward", "Reward", "TextReward", "texts_of"]

Columns = Mapping[str, Sequence[Any]]


class Reward(ABC):
    """A reward function with options, in the loop's form: one number per completion.

    Prompts are texts or lists of chat messages, completions texts, and the columns those of the prompts' rows.
    `__name__` is what logs call it; set it on an instance to tell two of a kind apart.
    """

    __name__: str

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """The rewards of all completions, in their order."""
        if len(prompts) != len(completions):
            raise ValueError(
                f"{self.__name__}: needs one prompt per completion, got {len(prompts)} prompts for {len(completions)} "
                "completions; repeat a prompt for each of its completions"
            )
        for i, completion in enumerate(completions):
            if not isinstance(completion, str):
                raise ValueError(
                    f"{self.__name__}: completion {i} must be a text, got {type(completion).__name__} "
                    f"{completion!r:.60}; of chat messages, pass the content of the assistant's"
                )
        return self.scores(prompts, completions, columns)

    @abstractmethod
    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""

    def column(self, name: str, columns: Columns, number: int) -> Sequence[Any]:
        """The column of that name, one entry for each of the `number` completions."""
        if name not in columns:
            raise ValueError(
                f"{self.__name__}: needs the column {name!r}, got {sorted(columns)}{nearest(name, columns)}; "
                f"rename yours with load_rows(..., columns={{{name!r}: ...}})"
            )
        if len(columns[name]) != number:
            raise ValueError(
                f"{self.__name__}: the column {name!r} must have an entry for each of the {number} completions, got "
                f"{len(columns[name])}"
            )
        return columns[name]

    def __repr__(self) -> str:
        options = inspect.signature(type(self)).parameters
        return f"{self.__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in options)})"


class TextReward(Reward):
    """A reward that reads the completion alone."""

    @abstractmethod
    def score(self, completion: str) -> float:
        """The reward of one completion."""

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        return [self.score(completion) for completion in completions]


class AnswerReward(Reward):
    """A reward that compares the completion with the right answer, which the row holds in the column `answer`."""

    @abstractmethod
    def score(self, completion: str, answer: Any) -> float:
        """The reward of one completion."""

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        answers = self.column("answer", columns, len(completions))
        return [self.score(completion, answer) for completion, answer in zip(completions, answers, strict=True)]


def texts_of(who: str, name: str, value: Sequence[str]) -> tuple[str, ...]:
    """The texts of a list option as a tuple; a single text is no list of texts.

    >>> texts_of("keywords", "words", ["yes"])
    ('yes',)
    """
    if isinstance(value, str) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{who}: {name} must be a list of non-empty texts, got {value!r:.100}")
    return tuple(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def _shown(value: Any) -> str:
    is_plain = value is None or isinstance(value, str | int | float | tuple | dict)
    return _SHORT.repr(value) if is_plain else type(value).__name__
