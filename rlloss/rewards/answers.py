"""Rewards for the right answer: the same text, or the same number."""

import re
import unicodedata
from fractions import Fraction
from typing import Any

from rlloss._checks import check_flag, check_range
from rlloss.rewards.reward import AnswerReward

__all__ = ["ExactMatch", "NumericAnswer", "number_in"]


class ExactMatch(AnswerReward):
    """1 where the completion is the text in the column `answer`, else 0.

    Both are compared after Unicode's NFC, so that one text has one spelling. An answer may also be a number.

    Args:
        strip: Leaves white space at both ends aside.
        case: False leaves upper and lower case aside.

    >>> ExactMatch(case=False)(["2+2?", "Capital of France?"], [" 4 ", "paris"], answer=["4", "Paris"])
    [1.0, 1.0]
    """

    __name__ = "exact_match"

    def __init__(self, *, strip: bool = True, case: bool = True) -> None:
        check_flag(self.__name__, "strip", strip)
        check_flag(self.__name__, "case", case)
        self.strip, self.case = strip, case

    def score(self, completion: str, answer: Any) -> float:
        """1 for the same text."""
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(
                f"exact_match: the column 'answer' must hold texts or numbers, got {type(answer).__name__} "
                f"{answer!r:.60}; convert it when the rows are loaded"
            )
        return float(self._form(completion) == self._form(str(answer)))

    def _form(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return unicodedata.normalize("NFC", text if self.case else text.casefold())


class NumericAnswer(AnswerReward):
    r"""1 where the completion's number is that of the column `answer`, else 0; without a number 0.

    The number of a text is its last one; a LaTeX box, or a line `#### 42` that holds nothing else, goes before what
    else the text says. So the answer may be GSM8K's whole solution. Read are signs, decimals, commas that group
    thousands, exponents (1e-3) and fractions (3/4, \frac{3}{4}); currency and percent signs are units and count for
    nothing, so that 50% is 50. A minus between two numbers is a difference, and digits in a word (H2O) are no number.
    Numbers are compared as exact fractions, however long.

    Args:
        tolerance: How far the two numbers may lie apart.

    >>> reward = NumericAnswer()
    >>> texts = ["so $1,234.50 in all.", r"\boxed{-7}, for 3 reasons", "many"]
    >>> reward(["?"] * 3, texts, answer=["1234.5", -7, "#### 9"])
    [1.0, 1.0, 0.0]
    """

    __name__ = "numeric_answer"

    def __init__(self, *, tolerance: float = 0.0) -> None:
        check_range(self.__name__, "tolerance", tolerance, 0)
        self.tolerance = tolerance

    def score(self, completion: str, answer: Any) -> float:
        """1 for the same number."""
        right = number_in(str(answer)) if isinstance(answer, str | int | float) else None
        if right is None:
            raise ValueError(
                f"numeric_answer: the column 'answer' must hold a number, got {answer!r:.200}; drop such rows, or take "
                "exact_match for answers that are words"
            )
        given = number_in(completion)
        return float(given is not None and abs(given - right) <= self.tolerance)


_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(
    rf"""[A-Za-z_][A-Za-z0-9_]*(?:\.\d+)*            # a word, with the digits that belong to it
    | (?:(?<![\w.)\]}}])(?P<sign>[-+−]))? [$€£]?     # no sign after what it subtracts from
      (?: \\[dt]?frac\{{(?P<over>{_PLAIN})\}}\{{(?P<under>{_PLAIN})\}}
        | (?P<number>{_PLAIN})(?:\s?/\s?(?P<divisor>{_PLAIN}))? )""",  # noqa: RUF001 (the minus sign of Unicode)
    re.VERBOSE,
)
_GSM8K = re.compile(r"^[ \t]*####[ \t]*([-+−]?[$€£]?[\d.,]*\d)[ \t.%]*$", re.MULTILINE)  # noqa: RUF001
_DIGITS, _EXPONENT = 1000, 4  # longer ones nobody means, and a policy could stop the run by them


def number_in(text: str) -> Fraction | None:
    r"""The number that a text gives as its answer, by the rules of `NumericAnswer`; None where it has none.

    >>> number_in(r"3 + 4 = 7, so \boxed{\frac{7}{2}} of 10"), number_in("none")
    (Fraction(7, 2), None)
    """
    text = _final(text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))
    last = None
    for match in _NUMBER.finditer(text):
        if match["number"] or match["over"]:
            last = match
    if last is None:
        return None
    over = _value(last["number"] or last["over"])
    under = _value(last["divisor"] or last["under"] or "1")
    if over is None or not under:
        return None
    return over / under if last["sign"] in (None, "+") else -over / under


def _value(digits: str) -> Fraction | None:
    exponent = digits.lower().partition("e")[2]
    too_long = len(digits) > _DIGITS or len(exponent) > _EXPONENT
    return None if too_long else Fraction(digits.replace(",", ""))


def _final(text: str) -> str:
    """What stands in the last box or on the last `####` line, whichever comes later; else the whole text."""
    start = text.rfind("\\boxed{")
    lines = [match for match in _GSM8K.finditer(text) if match.start() > start]
    if lines:
        return lines[-1][1]
    if start < 0:
        return text
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]
