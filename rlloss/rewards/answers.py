"""Rewards for the right answer: the same text, or the same number."""

from typing import Any

import numpy as np

from rlloss._checks import check_flag, check_range
from rlloss.rewards.numbers import answer_number, number_in
from rlloss.rewards.reward import AnswerReward
from rlloss.rewards.texts import composed

__all__ = ["ExactMatch", "NumericAnswer"]


class ExactMatch(AnswerReward):
    """1 where the completion is the text in the column `answer`, else 0.

    Both are compared after Unicode's NFC, so that one text has one spelling. An answer may also be a number: 4.0 is "4"
    as well as "4.0".

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
        texts = _spellings(answer)
        if not texts:
            raise ValueError(
                f"exact_match: the column 'answer' must hold texts or numbers, got {type(answer).__name__} "
                f"{answer!r:.60}; convert it when the rows are loaded"
            )
        return float(self._form(completion) in map(self._form, texts))

    def _form(self, text: str) -> str:
        return composed(text.strip() if self.strip else text, case=self.case)


class NumericAnswer(AnswerReward):
    r"""1 where the completion's number is that of the column `answer`, else 0; without a number 0.

    A completion's number is its last one, but where it has a LaTeX box, or a line `#### 42` with nothing else: there,
    and in an answer, one number must stand alone, with words and units (`x = 5`, `12\text{ cm}^2`) and no other sign
    of mathematics. So `(1, 2)`, `2\sqrt{3}`, `3x` or `4!` are no numbers, in a box earn 0, and as answers raise; an
    answer may be GSM8K's whole solution.

    Read are signs, decimals, thousands grouped by commas or spaces, exponents (1e-3, 5 \times 10^{-3}), fractions
    (3/4, \frac34, \frac{-3}{4}), mixed numbers (1 1/2) and words of scale (3 million). Currency and percent signs are
    units and count for nothing, so that 50% is 50. A minus between two numbers is a difference, and digits in a word
    (H2O) are no number. Numbers are compared as exact fractions, however long.

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
        texts = _spellings(answer)
        right = answer_number(texts[0]) if texts else None
        if right is None:
            raise ValueError(
                f"numeric_answer: the column 'answer' must hold a number, alone, got {answer!r:.200}; drop such rows, "
                "or take exact_match for answers that are words or formulas"
            )
        given = number_in(completion)
        return float(given is not None and abs(given - right) <= self.tolerance)


def _spellings(answer: Any) -> list[str]:
    """A text as it is, a number as it is written; none of anything else."""
    if getattr(answer, "ndim", None) == 0:  # a scalar of NumPy or torch, in whose precision 0.1 is written 0.1
        answer = np.asarray(answer)[()]
    if isinstance(answer, str):
        return [answer]
    if isinstance(answer, bool | np.bool_) or not isinstance(answer, int | float | np.integer | np.floating):
        return []
    is_whole = isinstance(answer, int | np.integer)
    return [str(answer)] if is_whole else [str(answer), np.format_float_positional(answer, trim="-")]
