"""Rewards for what a completion sounds like: its sentiment, and words that nobody wants to read."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rlloss.rewards.forms import compiled_pattern
from rlloss.rewards.reward import TextReward, texts_of
from rlloss.rewards.texts import check_words, holds, spelled

__all__ = ["SAFETY_PATTERNS", "SAFETY_WORDS", "Safety", "Sentiment"]

SAFETY_WORDS = (
    *("asshole", "bastard", "bitch", "bullshit", "cunt", "dickhead", "fuck", "fucked", "fucker", "fucking"),
    *("goddamn", "motherfucker", "piss off", "shit", "shitty", "slut", "whore"),
    *("drop dead", "go to hell", "i hate you", "idiot", "imbecile", "moron", "scum", "shut up", "subhuman"),
    *("you are worthless", "you're worthless"),
)
_WHOM = r"(?:you|yourself|him|himself|her|herself|them|themselves|myself|people|someone)"
_PHRASES = (
    rf"\b(?:i will|i'll|i'm going to|we will|we'll|let's|you should) (?:kill|hurt|stab|shoot|rape|poison) {_WHOM}\b",
    r"\bhow to (?:make|build|assemble) (?:a |an )?(?:\w+ )?(?:bomb|explosive|grenade|nerve agent|bioweapon)s?\b",
    r"\b(?:cut|hang|harm|kill) (?:yourself|myself)\b",
)
SAFETY_PATTERNS = (
    *(phrase.replace(" ", r"\s+") for phrase in _PHRASES),
    r"\b\d{3}-\d{2}-\d{4}\b",  # a US social security number
    r"\b(?:\d{4}[ -]){3}\d{4}\b",  # the number of a payment card
)
_WORDS = 500


class Sentiment(TextReward):
    """VADER's compound score, https://doi.org/10.1609/icwsm.v8i1.14550: -1 for bad feelings, 1 for good; in [-1, 1].

    A lexicon of English words with rules for negation and emphasis, made for short texts: a long one is soon at an
    end of the range, and a policy learns to write its favourite words. Text without any of its words gets 0. The first
    500 words are read and no more: its rules take time that grows with their number squared.

    It needs vaderSentiment: `pip install "rlloss[rewards]"`.
    """

    __name__ = "sentiment"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError('sentiment: needs vaderSentiment; pip install "rlloss[rewards]"') from error
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, completion: str) -> float:
        """The compound score."""
        words = list(islice(re.finditer(r"\S+", completion), _WORDS))
        return self._analyzer.polarity_scores(completion[: words[-1].end()] if words else "")["compound"]


class Safety(TextReward):
    """1 where none of the words and patterns is found in the completion, else 0.

    CRUDE: a list of English insults, threats and numbers that identify a person, and no understanding at all. Harm
    in other words passes, a refusal that quotes its question does not, and slurs are not spelled out here (add your
    own). It catches the worst while a policy is shaped by another reward; to measure or ensure safety takes a trained
    classifier: `reward_model`.

    Both look at Unicode's NFC, words as `Keywords` does.

    Args:
        words: Words and phrases in any case: `[*SAFETY_WORDS, "yours"]`.
        patterns: Regular expressions, in any case too.

    >>> Safety()([""] * 2, ["Here is a recipe.", "Shut UP, you moron."])
    [1.0, 0.0]
    """

    __name__ = "safety"

    def __init__(self, *, words: Sequence[str] = SAFETY_WORDS, patterns: Sequence[str] = SAFETY_PATTERNS) -> None:
        self.words = texts_of(self.__name__, "words", words)
        check_words(self.__name__, self.words)
        self.patterns = texts_of(self.__name__, "patterns", patterns)
        self._compiled = [
            compiled_pattern(self.__name__, "patterns", pattern, re.IGNORECASE) for pattern in self.patterns
        ]

    def score(self, completion: str) -> float:
        """1 where nothing is found."""
        # the apostrophe of typesetters, which models write too
        text = unicodedata.normalize("NFC", completion.replace("\u2019", "'"))
        if any(pattern.search(text) for pattern in self._compiled):
            return 0.0
        text = spelled(text)
        return float(not any(holds(text, spelled(word)) for word in self.words))
