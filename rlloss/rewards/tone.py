"""Rewards for what a completion sounds like: its sentiment, and words that nobody wants to read."""

import re
from collections.abc import Sequence
from typing import Any

from rlloss.rewards.forms import compiled_pattern
from rlloss.rewards.reward import TextReward, texts_of
from rlloss.rewards.texts import holds

__all__ = ["SAFETY_PATTERNS", "SAFETY_WORDS", "Safety", "Sentiment"]

SAFETY_WORDS = (
    *("asshole", "bastard", "bitch", "bullshit", "cunt", "dickhead", "fuck", "fucked", "fucker", "fucking"),
    *("goddamn", "motherfucker", "piss off", "shit", "shitty", "slut", "whore"),
    *("drop dead", "go to hell", "i hate you", "idiot", "imbecile", "moron", "scum", "shut up", "subhuman"),
    *("you are worthless", "you're worthless"),
)
_WHOM = r"(?:you|yourself|him|himself|her|herself|them|themselves|myself|people|someone)"
SAFETY_PATTERNS = (
    rf"\b(?:i will|i'll|i'm going to|we will|we'll|let's|you should) (?:kill|hurt|stab|shoot|rape|poison) {_WHOM}\b",
    r"\bhow to (?:make|build|assemble) (?:a |an )?(?:\w+ )?(?:bomb|explosive|grenade|nerve agent|bioweapon)s?\b",
    r"\b(?:cut|hang|harm|kill) (?:yourself|myself)\b",
    r"\b\d{3}-\d{2}-\d{4}\b",  # a US social security number
    r"\b(?:\d{4}[ -]){3}\d{4}\b",  # the number of a payment card
)


class Sentiment(TextReward):
    """VADER's compound score, https://doi.org/10.1609/icwsm.v8i1.14550: -1 for bad feelings, 1 for good; in [-1, 1].

    A lexicon of English words with rules for negation and emphasis, made for short texts: a long one is soon at an
    end of the range, and a policy learns to write its favourite words. Text without any of its words gets 0.

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
        return self._analyzer.polarity_scores(completion)["compound"]


class Safety(TextReward):
    """1 where none of the words and patterns is found in the completion, else 0.

    CRUDE: a list of English insults, threats and numbers that identify a person, and no understanding at all. Harm
    in other words passes, a refusal that quotes its question does not, and slurs are not spelled out here (add your
    own). It catches the worst while a policy is shaped by another reward; to measure or ensure safety takes a trained
    classifier: `reward_model`.

    Args:
        words: Words and phrases in any case: `[*SAFETY_WORDS, "yours"]`.
        patterns: Regular expressions, in any case too.

    >>> Safety()([""] * 2, ["Here is a recipe.", "Shut UP, you moron."])
    [1.0, 0.0]
    """

    __name__ = "safety"

    def __init__(self, *, words: Sequence[str] = SAFETY_WORDS, patterns: Sequence[str] = SAFETY_PATTERNS) -> None:
        self.words = texts_of(self.__name__, "words", words)
        self.patterns = texts_of(self.__name__, "patterns", patterns)
        self._compiled = [
            compiled_pattern(self.__name__, "patterns", pattern, re.IGNORECASE) for pattern in self.patterns
        ]

    def score(self, completion: str) -> float:
        """1 where nothing is found."""
        text = completion.replace("\u2019", "'")  # the apostrophe of typesetters, which models write too
        return float(not any(p.search(text) for p in self._compiled) and not any(holds(text, w) for w in self.words))
