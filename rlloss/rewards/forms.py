"""Rewards for the form of a completion: a pattern, JSON, tags."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rlloss._checks import check_flag
from rlloss.rewards.reward import TextReward, texts_of

__all__ = ["Format", "Json", "Regex", "compiled_pattern"]

_THINK_THEN_ANSWER = "<think>...</think><answer>...</answer>"


class Regex(TextReward):
    """1 where the pattern is found in the completion, else 0.

    Args:
        pattern: As Python's `re` reads it; `(?i)` at its beginning leaves case aside.
        full: The pattern must match the whole completion.

    >>> Regex(pattern=r"[0-9]+")(["", ""], ["about 4", "four"])
    [1.0, 0.0]
    """

    __name__ = "regex"

    def __init__(self, *, pattern: str, full: bool = False) -> None:
        check_flag(self.__name__, "full", full)
        compiled = compiled_pattern(self.__name__, "pattern", pattern)
        self.pattern, self.full = pattern, full
        self._match = compiled.fullmatch if full else compiled.search

    def score(self, completion: str) -> float:
        """1 for a match."""
        return float(self._match(completion) is not None)


class Json(TextReward):
    """1 where the whole completion is one JSON value, white space around it aside, else 0.

    NaN and Infinity are no JSON. A bare number or text is: ask for keys where an object is meant.

    Args:
        required_keys: What an object must have at its top; an empty list asks for any object, None for any value.

    >>> Json(required_keys=["name"])([""] * 3, ['{"name": "Ada", "of": {}}', '{"of": {"name": 1}}', "7"])
    [1.0, 0.0, 0.0]
    """

    __name__ = "json"

    def __init__(self, *, required_keys: Sequence[str] | None = None) -> None:
        keys = None if required_keys is None else texts_of(self.__name__, "required_keys", required_keys)
        self.required_keys = keys

    def score(self, completion: str) -> float:
        """1 for JSON with the keys."""
        try:
            value = json.loads(completion, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        if self.required_keys is None:
            return 1.0
        return float(isinstance(value, dict) and value.keys() >= set(self.required_keys))


class Format(TextReward):
    """1 where the completion has the form of a template, else 0.

    `...` in the template stands for a text that is not empty and holds no other part of the template; white space at
    both ends and between tags is free. Where the chat template has already written the first tag, leave it out:
    `"...</think><answer>...</answer>"`.

    Args:
        template: Tags with `...` between them; `<think>...</think><answer>...</answer>` where neither is given.
        pattern: A regular expression in its place, for the whole completion; its `.` also matches line breaks.

    >>> Format()([""] * 2, ["<think>2 and 2</think> <answer>4</answer>", "<answer>4</answer>"])
    [1.0, 0.0]
    """

    __name__ = "format"

    def __init__(self, *, template: str | None = None, pattern: str | None = None) -> None:
        if template is not None and pattern is not None:
            raise ValueError(f"format: takes a template or a pattern, got both, {template!r} and {pattern!r}; drop one")
        self.template = _THINK_THEN_ANSWER if template is None and pattern is None else template
        self.pattern = pattern
        self._compiled = compiled_pattern(
            self.__name__, "pattern", _template_pattern(self.template) if pattern is None else pattern, re.DOTALL
        )

    def score(self, completion: str) -> float:
        """1 for the form."""
        return float(self._compiled.fullmatch(completion.strip()) is not None)


def compiled_pattern(who: str, name: str, pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The regular expression of an option, or a ValueError that says what is wrong with it.

    >>> compiled_pattern("regex", "pattern", "(")
    Traceback (most recent call last):
    ValueError: regex: pattern '(' is no regular expression: missing ), unterminated subpattern at position 0
    """
    try:
        return re.compile(pattern, flags)
    except (re.error, TypeError) as error:
        raise ValueError(f"{who}: {name} {pattern!r} is no regular expression: {error}") from error


def _template_pattern(template: Any) -> str:
    """The template as a regular expression whose time is linear in the completion."""
    if not isinstance(template, str) or "..." not in template:
        raise ValueError(f"format: template must hold `...` where the text goes, got {template!r}")
    parts = [part.strip() for part in re.split(r"(<[^<>]+>|\.\.\.)", template)]
    parts = [part for part in parts if part]
    for one, two in pairwise(parts):
        if one == two == "...":
            raise ValueError(f"format: template {template!r} has two texts with nothing between them; put a tag there")
    tags = "|".join(re.escape(part) for part in parts if part != "...") or "(?!)"  # which matches nothing
    text = rf"\s*(?!{tags})\S(?:(?!{tags}).)*"
    pattern = ""
    for before, part in zip(["...", *parts], parts, strict=False):
        gap = "" if "..." in (before, part) else r"\s*"  # a text brings its own white space
        pattern += gap + (text if part == "..." else re.escape(part))
    return pattern


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
