"""Rows to tokens: prompts to sample from, completions to imitate, pairs to compare.

Rows are those of `load_rows`, or dicts; a tokenizer is one of Hugging Face, or anything that is called like one.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlloss._checks import check_count
from rlloss._typing import Float
from rlloss.loop.chat import Chat
from rlloss.loop.columns import Item, Text, completion_items, pair_items, placed, prompt_of
from rlloss.loop.encoding import prompt_tokens, sequence_tokens
from rlloss.loop.rows import load_rows
from rlloss.loop.truncation import Limits, TruncationMode, report_cut, truncated

if TYPE_CHECKING:
    import datasets

__all__ = ["Pair", "Prompt", "Tokens", "completions", "load_rows", "pairs", "prompts"]

logger = logging.getLogger("rlloss")


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, its text or messages as given, and the row's other columns for reward functions."""

    ids: list[int]
    text: str | list[dict[str, Any]]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """One sequence; `loss_mask[t]` says that token t itself counts (`rlloss.shift` aligns it with the model's rows).

    `ref_logprobs[t]` is the reference's log-prob of token t, where `with_ref_logprobs` has computed it.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    ref_logprobs: Float[Tensor, " T"] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Pair:
    """Two sequences after the same prompt."""

    chosen: Tokens
    rejected: Tokens


def prompts(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]", tokenizer: Any, *, max_prompt_length: int | None = None
) -> list[Prompt]:
    """The `prompt` column as tokens: a text as it is, messages through the chat template up to the assistant's answer.

    Rows of `pairs` have the prompt that `pairs` makes of them: the messages before two answers, the beginning of two
    dialogues. `max_prompt_length` keeps the END of longer prompts and logs how many were cut.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> prompts([{"prompt": "2+2=", "answer": "4"}], letters, max_prompt_length=3)
    [Prompt(ids=[43, 50, 61], text='2+2=', columns={'answer': '4'})]
    """
    if max_prompt_length is not None:
        check_count("prompts", "max_prompt_length", max_prompt_length)
    given = list(placed("prompts", rows))
    texts = [prompt_of(where, row) for where, row in given]
    wheres = (where for where, _ in given)
    items = [Text(w, text) if isinstance(text, str) else Chat(w, text) for w, text in zip(wheres, texts, strict=True)]
    ids = prompt_tokens(tokenizer, items)
    if max_prompt_length is not None:
        report_cut("prompts", "sequences", "max_prompt_length", max_prompt_length, map(len, ids))
        ids = [one[-max_prompt_length:] for one in ids]
    columns = [{name: value for name, value in row.items() if name != "prompt"} for _, row in given]
    return [Prompt(*fields) for fields in zip(ids, texts, columns, strict=True)]


def completions(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]",
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> list[Tokens]:
    """Sequences to imitate, whose mask holds what the model must learn to write, its end of sequence or turn included.

    A row has `prompt` and `completion`, also called `response` (texts, or messages; a text may answer messages), or
    `messages` (every assistant turn is trained), or only `text` (all of it is), or is one of `pairs`, of which the
    chosen answer is trained.

    `max_length` cuts the end of longer sequences, or with `truncation_mode="keep_end"` their beginning;
    `max_prompt_length` keeps the END of longer prompts. What was cut is logged, with the trained tokens that were lost.
    An end of sequence that a text already carries is not doubled.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> completions([{"prompt": "2+2=", "completion": "4"}], letters)
    [Tokens(input_ids=[50, 43, 50, 61, 52, 0], loss_mask=[False, False, False, False, True, True])]
    """
    limits = Limits(max_length, max_prompt_length, truncation_mode)
    limits.check("completions")
    items = completion_items("completions", rows)
    return _tokens("completions", limits, tokenizer, items)


def pairs(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]",
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: TruncationMode = "keep_start",
) -> list[Pair]:
    r"""Chosen and rejected sequences, whose masks hold the completions alone.

    `chosen` and `rejected` are texts after a `prompt` (text or messages), messages that answer a prompt of messages, or
    whole conversations: then their common beginning is the prompt. So it is of two dialogues in one text, up to the
    last "\n\nAssistant:" in it, where there is no column `prompt`. Pairs of identical tokens are kept, since their
    gradient is zero, and their number is logged.

    Lengths are cut as by `completions`; with `truncation_mode="keep_end"` both sides lose the same tokens of the
    prompt.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> [pair] = pairs([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], letters)
    >>> pair.rejected.input_ids
    [50, 43, 50, 61, 53, 0]
    """
    limits = Limits(max_length, max_prompt_length, truncation_mode)
    limits.check("pairs")
    items = [item for where, row in placed("pairs", rows) for item in pair_items(where, row)]
    tokens = _tokens("pairs", limits, tokenizer, items, per_example=2)
    made = [Pair(*pair) for pair in zip(tokens[::2], tokens[1::2], strict=True)]
    same = sum(pair.chosen.input_ids == pair.rejected.input_ids for pair in made)
    if same:
        logger.warning(
            "pairs: %d of %d pairs have identical chosen and rejected tokens (zero gradient)", same, len(made)
        )
    return made


def _tokens(who: str, limits: Limits, tokenizer: Any, items: Sequence[Item], per_example: int = 1) -> list[Tokens]:
    encoded = sequence_tokens(tokenizer, items)
    places = [item.place for item in items]
    return [Tokens(*one) for one in truncated(who, limits, places, encoded, per_example=per_example)]
