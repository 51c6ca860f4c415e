"""Sequences cut to a length at either end, with a count of what was lost."""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rlloss._checks import check_choice, check_count

__all__ = ["Encoded", "Limits", "NothingTrainedError", "TruncationMode", "report_cut", "truncated"]

logger = logging.getLogger("rlloss")

Encoded = tuple[list[int], list[bool]]
TruncationMode = Literal["keep_start", "keep_end"]


class NothingTrainedError(ValueError):
    """Rows of which the limits leave nothing to train; `rows` are their numbers, from 0."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Limits(NamedTuple):
    """How long sequences may be.

    Args:
        max_length: Tokens of prompt and completion together.
        max_prompt_length: Tokens before the first trained one, of which the END is kept; applied first.
        truncation_mode: `keep_start` cuts what exceeds `max_length` from the end of the completion, `keep_end` from the
            beginning of the prompt, and of the completion where that alone is too long.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"

    def check(self, who: str) -> None:
        """Raises ValueError unless every limit is one."""
        for name in ("max_length", "max_prompt_length"):
            if getattr(self, name) is not None:
                check_count(who, name, getattr(self, name))
        check_choice(who, "truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))


def truncated(
    who: str,
    limits: Limits,
    places: Sequence[str],
    sequences: Sequence[Encoded],
    *,
    per_example: int = 1,
    what: str = "sequences",
) -> list[Encoded]:
    """The sequences within their limits; those that would train nothing raise, naming the first one's place.

    The `per_example` sequences of one example follow each other. Under `keep_end` all of them lose the tokens of the
    prompt that the longest must lose, so that it stays one prompt.

    >>> limits = Limits(max_length=3, truncation_mode="keep_end")
    >>> truncated("pairs", limits, ["row 1"], [([5, 6, 7, 8], [False, False, True, True])])
    [([6, 7, 8], [False, True, True])]
    """
    prompts = [_prompt_length(mask) for _, mask in sequences]
    if (limit := limits.max_prompt_length) is not None:
        starts = [max(0, length - limit) for length in prompts]
        sequences = [(ids[s:], mask[s:]) for (ids, mask), s in zip(sequences, starts, strict=True)]
    made = list(sequences)
    if limits.max_length is not None:
        examples = [sequences[i : i + per_example] for i in range(0, len(sequences), per_example)]
        made = [one for example in examples for one in _within(limits, limits.max_length, example)]
    # nothing predicts the first token, so a mask that holds only that one trains nothing
    empty = [i for i, (_, mask) in enumerate(made) if not any(mask[1:])]
    if empty:
        rows = sorted({i // per_example for i in empty})
        others = f"; so it is with {len(rows)} of {len(made) // per_example} rows" if len(rows) > 1 else ""
        message = f"{places[empty[0]]}: {_nothing_trained(limits, *sequences[empty[0]])}{others}"
        raise NothingTrainedError(message, rows)
    if limits.max_prompt_length is not None:
        report_cut(who, what.replace("sequences", "prompts"), "max_prompt_length", limits.max_prompt_length, prompts)
    if limits.max_length is not None:
        _report_length(who, what, limits.max_length, sequences, made)
    return made


def report_cut(who: str, what: str, name: str, limit: int, lengths: Iterable[int], also: str = "") -> None:
    """Logs how many lengths exceed a limit, if any do."""
    lengths = list(lengths)
    cut = sum(length > limit for length in lengths)
    if cut:
        logger.warning(
            "%s: %d of %d %s are longer than %s=%d and were cut (longest: %d tokens)%s",
            *(who, cut, len(lengths), what, name, limit, max(lengths), also),
        )


def _within(limits: Limits, max_length: int, example: Sequence[Encoded]) -> list[Encoded]:
    if limits.truncation_mode == "keep_start":
        return [(ids[:max_length], mask[:max_length]) for ids, mask in example]
    excess = [max(0, len(ids) - max_length) for ids, _ in example]
    shared = min(max(excess), *(_prompt_length(mask) for _, mask in example))
    starts = [max(shared, own) for own in excess]
    return [(ids[s:], mask[s:]) for (ids, mask), s in zip(example, starts, strict=True)]


def _prompt_length(mask: list[bool]) -> int:
    return mask.index(True) if True in mask else len(mask)


def _report_length(who: str, what: str, limit: int, whole: Sequence[Encoded], made: Sequence[Encoded]) -> None:
    trained, kept = (sum(sum(mask[1:]) for _, mask in sequences) for sequences in (whole, made))
    also = f"; {trained - kept} of {trained} trained tokens were lost"
    pairs = zip(whole, made, strict=True)
    partners = sum(len(ids) <= limit and len(cut) < len(ids) for (ids, _), (cut, _) in pairs)
    if partners:
        also += f", and {partners} beside them lost the same beginning of their prompt"
    report_cut(who, what, "max_length", limit, (len(ids) for ids, _ in whole), also)


def _nothing_trained(limits: Limits, ids: list[int], mask: list[bool]) -> str:
    trained = [t for t in range(1, len(mask)) if mask[t]]
    message = f"of its {len(ids)} tokens none is trained"
    if not trained:
        return f"{message}; remove the row"
    if limits.truncation_mode == "keep_end":
        return (
            f"{message} within the last max_length={limits.max_length}: the last is token {trained[-1]}; raise "
            "max_length or remove the row"
        )
    return (
        f"{message} within max_length={limits.max_length}: the first is token {trained[0]}; raise max_length, cut the "
        "prompt by max_prompt_length or truncation_mode='keep_end', or remove the row"
    )
