"""Single answers with thumbs up or down, and the mismatched pairs that KTO's KL is estimated from."""

import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlloss.loop.columns import check_column, completion_items
from rlloss.loop.data import Tokens
from rlloss.loop.encoding import sequence_tokens
from rlloss.loop.rows import place
from rlloss.loop.truncation import Encoded, Limits, TruncationMode, truncated

if TYPE_CHECKING:
    import datasets

__all__ = ["Labelled", "labelled"]

logger = logging.getLogger("rlloss")


@dataclass(frozen=True)
class Labelled:
    """A sequence with its label, and its prompt followed by the answer to another one."""

    tokens: Tokens
    desirable: bool
    mismatched: Tokens


def labelled(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]",
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> list[Labelled]:
    """Rows of `completions` with a column `label`: True (or 1) for thumbs up, False (or 0) for thumbs down.

    Each prompt is also paired with the answer of the next row that has another prompt, for `rlloss.kto_kl`. That is
    fixed here, so that neither batch size nor shuffling matters. Where all prompts are one, it is the next row's
    answer, which is logged. Lengths are cut as by `completions`.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> rows = [{"prompt": p, "completion": c, "label": p == "A"} for p, c in ("Aa", "Bb")]
    >>> first, second = labelled(rows, letters)
    >>> first.desirable, second.desirable, first.mismatched.input_ids == [ord("A"), ord("b"), 0]
    (True, False, True)
    """
    who = "labelled"
    limits = Limits(max_length, max_prompt_length, truncation_mode)
    limits.check(who)
    rows = rows if isinstance(rows, Sized) else list(rows)
    labels = [_label(f"{who}: {place(rows, i)}", row) for i, row in enumerate(rows)]
    items = completion_items(who, rows)
    encoded = sequence_tokens(tokenizer, items)
    places = [item.place for item in items]
    own = truncated(who, limits, places, encoded)
    others = truncated(who, limits, places, _mismatched(encoded), what="mismatched sequences")
    made = zip(own, labels, others, strict=True)
    return [Labelled(Tokens(*tokens), label, Tokens(*mismatched)) for tokens, label, mismatched in made]


def _label(where: str, row: Any) -> bool:
    if isinstance(row, Mapping):
        check_column(where, "label", row)
    label = row["label"] if isinstance(row, Mapping) else None
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(f"{where}: 'label' must be True or False (or 1 or 0), got {label!r}")
    return bool(label)


def _mismatched(sequences: Sequence[Encoded]) -> list[Encoded]:
    """Each prompt before the answer of the next row that has another one."""
    firsts = [mask.index(True) for _, mask in sequences]
    prompts = [ids[:first] for (ids, _), first in zip(sequences, firsts, strict=True)]
    made = []
    for prompt, other in zip(prompts, _next_with_another_prompt(prompts), strict=True):
        ids, mask = sequences[other]
        made.append((prompt + ids[firsts[other] :], [False] * len(prompt) + mask[firsts[other] :]))
    return made


def _next_with_another_prompt(prompts: Sequence[list[int]]) -> list[int]:
    """For each row the next one, around the end, whose prompt is another."""
    n = len(prompts)
    if all(prompt == prompts[0] for prompt in prompts):
        if n:
            logger.warning("labelled: all %d rows have the same prompt; kto_kl will see other answers to it", n)
        return [(i + 1) % n for i in range(n)]
    others = [0] * n
    following = next(i for i in range(n) if prompts[i] != prompts[-1])
    for i in reversed(range(n)):
        after = (i + 1) % n
        following = after if prompts[after] != prompts[i] else following
        others[i] = following
    return others
