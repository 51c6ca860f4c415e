"""Single answers with thumbs up or down, and the mismatched pairs that KTO's KL is estimated from."""

import logging
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlloss._checks import nearest
from rlloss.loop.data import Tokens, completions
from rlloss.loop.rows import place

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
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]", tokenizer: Any, *, max_length: int | None = None
) -> list[Labelled]:
    """Rows of `completions` with a column `label`: True (or 1) for thumbs up, False (or 0) for thumbs down.

    Each prompt is also paired with the answer of the next row that has another prompt, for `rlloss.kto_kl`. That is
    fixed here, so that neither batch size nor shuffling matters. Where all prompts are one, it is the next row's
    answer, which is logged. `max_length` cuts the end of longer sequences.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> rows = [{"prompt": p, "completion": c, "label": p == "A"} for p, c in ("Aa", "Bb")]
    >>> first, second = labelled(rows, letters)
    >>> first.desirable, second.desirable, first.mismatched.input_ids == [ord("A"), ord("b"), 0]
    (True, False, True)
    """
    rows = rows if isinstance(rows, Sized) else list(rows)
    labels = [_label(f"labelled: {place(rows, i)}", row) for i, row in enumerate(rows)]
    tokens = completions(rows, tokenizer, max_length=max_length)
    prompts = [_split(one)[0] for one in tokens]
    others = _next_with_another_prompt(prompts)
    made = []
    for i, other in enumerate(others):
        answer = _split(tokens[other])[1]
        ids, mask = prompts[i] + answer.input_ids, [False] * len(prompts[i]) + answer.loss_mask
        made.append(Labelled(tokens[i], labels[i], Tokens(ids[:max_length], mask[:max_length])))
    return made


def _label(where: str, row: Any) -> bool:
    if isinstance(row, Mapping) and "label" not in row:
        raise ValueError(
            f"{where}: no column 'label' among {list(row)}{nearest('label', row)}; "
            "rename yours with load_rows(..., columns={'label': ...})"
        )
    label = row["label"] if isinstance(row, Mapping) else None
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(f"{where}: 'label' must be True or False (or 1 or 0), got {label!r}")
    return bool(label)


def _split(tokens: Tokens) -> tuple[list[int], Tokens]:
    """What stands before the first trained token, and the rest."""
    first = tokens.loss_mask.index(True)
    return tokens.input_ids[:first], Tokens(tokens.input_ids[first:], tokens.loss_mask[first:])


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
