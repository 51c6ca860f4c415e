"""Rewards for how a completion is written: its length, its repetitions, its words."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from rlloss._checks import check_choice, check_count, check_flag, check_range
from rlloss.rewards.reward import Columns, Reward, TextReward, texts_of

__all__ = ["DistinctN", "Keywords", "Length", "Repetition", "check_words", "composed", "holds", "spelled"]

_UNITS = ("words", "characters", "tokens")


class UnitReward(Reward):
    """A reward that takes completions apart: at white space, into characters, or into the policy's own tokens.

    A language that writes no spaces has no such words: take its tokens or characters.
    """

    unit: str

    def pieces(self, completions: Sequence[str], columns: Columns) -> Sequence[Sequence[Any]]:
        """The units of each completion."""
        if self.unit == "tokens":
            # as lists, since tensors of one number are never the same one
            return [torch.as_tensor(ids).tolist() for ids in self.column("completion_ids", columns, len(completions))]
        return [completion.split() for completion in completions] if self.unit == "words" else completions


class Length(UnitReward):
    """1 for a length within [min_length, max_length], falling in a straight line outside; in [0, 1].

        n / min_length below;   max(0, 2 - n / max_length) above, which is 0 from twice max_length on

    Args:
        min_length: The shortest that earns 1; 0 for no bound.
        max_length: The longest that earns 1; None for no bound.
        unit: "words" (split at white space), "characters", or "tokens" (of the column completion_ids).

    >>> Length(min_length=2, max_length=4)([""] * 4, ["one", "one two", "1 2 3 4 5", ""])
    [0.5, 1.0, 0.75, 0.0]
    """

    __name__ = "length"

    def __init__(self, *, min_length: int = 10, max_length: int | None = 200, unit: str = "words") -> None:
        check_range(self.__name__, "min_length", min_length, 0)
        if max_length is not None:
            check_range(self.__name__, "max_length", max_length, max(min_length, 1))
        check_choice(self.__name__, "unit", unit, _UNITS)
        self.min_length, self.max_length, self.unit = min_length, max_length, unit

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        return [self._score(len(pieces)) for pieces in self.pieces(completions, columns)]

    def _score(self, length: int) -> float:
        if length < self.min_length:
            return length / self.min_length
        if self.max_length is None or length <= self.max_length:
            return 1.0
        return max(0.0, 2 - length / self.max_length)


class Repetition(UnitReward):
    """Minus the share of a completion's n-grams that it had already written: 0 for none, to -1; in [-1, 0].

        distinct n-grams / all n-grams - 1

    A completion without n-grams repeats nothing and gets 0.

    Args:
        n: Units per n-gram.
        unit: As for `Length`.

    >>> Repetition(n=2)([""] * 2, ["to be or not to be", "a b c"])
    [-0.19999999999999996, 0.0]
    """

    __name__ = "repetition"

    def __init__(self, *, n: int = 3, unit: str = "words") -> None:
        check_count(self.__name__, "n", n)
        check_choice(self.__name__, "unit", unit, _UNITS)
        self.n, self.unit = n, unit

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        shares = (_distinct_share(pieces, self.n) for pieces in self.pieces(completions, columns))
        return [0.0 if share is None else share - 1 for share in shares]


class DistinctN(UnitReward):
    """Distinct-n, https://arxiv.org/abs/1510.03055: the share of a completion's n-grams that differ; in [0, 1].

        distinct n-grams / all n-grams

    It is `Repetition` plus 1, but for a completion without n-grams, which says nothing and gets 0.

    Args:
        n: Units per n-gram.
        unit: As for `Length`.

    >>> DistinctN(n=1)([""] * 2, ["a a a b", ""])
    [0.5, 0.0]
    """

    __name__ = "distinct_n"

    def __init__(self, *, n: int = 2, unit: str = "words") -> None:
        check_count(self.__name__, "n", n)
        check_choice(self.__name__, "unit", unit, _UNITS)
        self.n, self.unit = n, unit

    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        return [_distinct_share(pieces, self.n) or 0.0 for pieces in self.pieces(completions, columns)]


class Keywords(TextReward):
    """The share of the words that are present, minus the share of the forbidden words that are; in [-1, 1].

    Words and completions are compared after Unicode's NFC, and any white space is one space.

    Args:
        words: Words or phrases to write.
        forbidden: Words or phrases to leave out.
        case: True tells upper and lower case apart.
        whole: False also finds a word inside another, and in languages that write no spaces.

    >>> Keywords(words=["please", "thank you"], forbidden=["no"])([""] * 2, ["Yes, please!", "No. Thank you, please."])
    [0.5, 0.0]
    """

    __name__ = "keywords"

    def __init__(
        self, *, words: Sequence[str] = (), forbidden: Sequence[str] = (), case: bool = False, whole: bool = True
    ) -> None:
        check_flag(self.__name__, "case", case)
        check_flag(self.__name__, "whole", whole)
        self.words = texts_of(self.__name__, "words", words)
        self.forbidden = texts_of(self.__name__, "forbidden", forbidden)
        if not self.words and not self.forbidden:
            raise ValueError("keywords: needs words or forbidden words, got none; pass keywords(words=['because'])")
        check_words(self.__name__, [*self.words, *self.forbidden])
        self.case, self.whole = case, whole

    def score(self, completion: str) -> float:
        """The share of words, minus that of forbidden ones."""
        text = spelled(completion, case=self.case)
        return self._share(self.words, text) - self._share(self.forbidden, text)

    def _share(self, words: Sequence[str], text: str) -> float:
        found = (holds(text, spelled(word, case=self.case), whole=self.whole) for word in words)
        return sum(found) / max(len(words), 1)


def spelled(text: str, *, case: bool = False) -> str:
    r"""A text as words are looked for in it: in Unicode's NFC, white space as one space, without case unless told.

    >>> spelled("Thank\n you")
    'thank you'
    """
    return composed(" ".join(text.split()), case=case)


def composed(text: str, *, case: bool) -> str:
    """A text in Unicode's NFC, so that one text has one spelling; without upper and lower case unless told.

    >>> composed("Paris", case=False)
    'paris'
    """
    text = unicodedata.normalize("NFC", text)
    return text if case else unicodedata.normalize("NFC", text.casefold())


def holds(text: str, word: str, *, whole: bool = True) -> bool:
    """Whether a text holds a word or phrase, both as `spelled` writes them.

    >>> holds("the cat sat.", "cat"), holds("concatenate", "cat")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None if whole else word in text


def check_words(who: str, words: Sequence[str]) -> None:
    """Raises ValueError for a word that is white space alone, which every text would hold.

    >>> check_words("keywords", ["yes"])
    """
    for word in words:
        if not word.strip():
            raise ValueError(f"{who}: a word must be more than white space, got {word!r}; look for it by regex")


def _distinct_share(pieces: Sequence[Any], n: int) -> float | None:
    """The share of distinct n-grams; None where there is none."""
    ngrams = list(zip(*(pieces[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else None
