"""Rows to tokens: prompts to sample from, completions to imitate, pairs to compare.

Rows are those of `load_rows`, or dicts; a tokenizer is one of Hugging Face, or anything that is called like one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rlloss._checks import check_count, nearest
from rlloss.loop.chat import Chat, chat_tokens, checked_messages, generation_prompts, token_ids
from rlloss.loop.rows import load_rows, place

if TYPE_CHECKING:
    import datasets

__all__ = ["Pair", "Prompt", "Tokens", "completions", "load_rows", "pairs", "prompts"]

logger = logging.getLogger("rlloss")

_Encoder = Callable[[Any, list[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, its text or messages as given, and the row's other columns for reward functions."""

    ids: list[int]
    text: str | list[dict[str, Any]]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """One sequence; `loss_mask[t]` says that token t itself counts (`rlloss.shift` aligns it with the model's rows)."""

    input_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Pair:
    """Two sequences after the same prompt."""

    chosen: Tokens
    rejected: Tokens


class _Text(NamedTuple):
    """A raw prompt and its completion; a text that is trained from its beginning has the empty prompt."""

    place: str
    prompt: str
    completion: str = ""


def prompts(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]", tokenizer: Any, *, max_prompt_length: int | None = None
) -> list[Prompt]:
    """The `prompt` column as tokens: a text as it is, messages through the chat template up to the assistant's answer.

    `max_prompt_length` keeps the END of longer prompts and logs how many were cut.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> prompts([{"prompt": "2+2=", "answer": "4"}], letters, max_prompt_length=3)
    [Prompt(ids=[43, 50, 61], text='2+2=', columns={'answer': '4'})]
    """
    if max_prompt_length is not None:
        check_count("prompts", "max_prompt_length", max_prompt_length)
    placed = list(_placed("prompts", rows))
    texts = [_content(where, row, "prompt") for where, row in placed]
    wheres = (where for where, _ in placed)
    items = [_Text(w, text) if isinstance(text, str) else Chat(w, text) for w, text in zip(wheres, texts, strict=True)]
    ids = _in_order(tokenizer, items, _prompt_ids, generation_prompts)
    if max_prompt_length is not None:
        _report_cut("prompts", "max_prompt_length", max_prompt_length, ids)
        ids = [one[-max_prompt_length:] for one in ids]
    columns = [{name: value for name, value in row.items() if name != "prompt"} for _, row in placed]
    return [Prompt(*fields) for fields in zip(ids, texts, columns, strict=True)]


def completions(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]", tokenizer: Any, *, max_length: int | None = None
) -> list[Tokens]:
    """Sequences to imitate, whose mask holds what the model must learn to write, its end of sequence or turn included.

    A row has `prompt` and `completion` (texts, or messages; a text may answer messages), or `messages` (every
    assistant turn is trained), or only `text` (all of it is).

    `max_length` cuts the end of longer sequences and logs how many were cut. An end of sequence that a text already
    carries is not doubled.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> completions([{"prompt": "2+2=", "completion": "4"}], letters)
    [Tokens(input_ids=[50, 43, 50, 61, 52, 0], loss_mask=[False, False, False, False, True, True])]
    """
    items = [_completion(where, row) for where, row in _placed("completions", rows)]
    return _tokens("completions", tokenizer, items, max_length)


def pairs(
    rows: "datasets.Dataset | Iterable[Mapping[str, Any]]", tokenizer: Any, *, max_length: int | None = None
) -> list[Pair]:
    """Chosen and rejected sequences, whose masks hold the completions alone.

    `chosen` and `rejected` are texts after a `prompt` (text or messages), messages that answer a prompt of messages, or
    whole conversations: then their common beginning is the prompt. Pairs of identical tokens are kept, since their
    gradient is zero, and their number is logged.

    `max_length` cuts the end of longer sequences and logs how many were cut.

    >>> def letters(texts, add_special_tokens):
    ...     return {"input_ids": [[ord(c) for c in text] for text in texts]}
    >>> letters.eos_token_id = 0
    >>> [pair] = pairs([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], letters)
    >>> pair.rejected.input_ids
    [50, 43, 50, 61, 53, 0]
    """
    items = [item for where, row in _placed("pairs", rows) for item in _pair(where, row)]
    tokens = _tokens("pairs", tokenizer, items, max_length)
    made = [Pair(*pair) for pair in zip(tokens[::2], tokens[1::2], strict=True)]
    same = sum(pair.chosen.input_ids == pair.rejected.input_ids for pair in made)
    if same:
        logger.warning(
            "pairs: %d of %d pairs have identical chosen and rejected tokens (zero gradient)", same, len(made)
        )
    return made


def _placed(who: str, rows: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, row in enumerate(rows):
        where = f"{who}: {place(rows, index)}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a dict of columns, got {type(row).__name__}; load_rows reads files")
        yield where, row


def _content(where: str, row: Mapping[str, Any], field: str) -> str | list[dict[str, Any]]:
    """A field that is a non-empty text or a list of messages."""
    if field not in row:
        raise ValueError(
            f"{where}: no column {field!r} among {list(row)}{nearest(field, row)}; "
            f"rename yours with load_rows(..., columns={{{field!r}: ...}})"
        )
    value = row[field]
    if isinstance(value, list):
        return checked_messages(where, field, value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: field {field!r} must be a non-empty text or a list of messages, got {value!r:.60}; "
            f"fill it, or drop such rows: rows.filter(lambda row: (row[{field!r}] or '').strip())"
        )
    return value


def _completion(where: str, row: Mapping[str, Any]) -> _Text | Chat:
    is_split = "prompt" in row and "completion" in row
    if is_split and "messages" in row:
        raise ValueError(
            f"{where}: has both 'messages' and 'prompt' with 'completion'; drop one with rows.remove_columns(...)"
        )
    if is_split:
        return _answer(where, _content(where, row, "prompt"), row, "completion")
    if "messages" in row:
        messages = _content(where, row, "messages")
        if isinstance(messages, str):
            raise ValueError(
                f"{where}: field 'messages' must be a list of messages, got a text; name the column 'text'"
            )
        return Chat(where, messages)
    if "text" in row and not {"prompt", "completion"} & set(row):
        text = _content(where, row, "text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: field 'text' must be a text, got messages; name the column 'messages'")
        return _Text(where, "", text)
    raise ValueError(
        f"{where}: needs the columns 'prompt' and 'completion', or 'messages', or only 'text'; got {list(row)}; "
        "rename yours with load_rows(..., columns={'completion': ...})"
    )


def _answer(where: str, prompt: str | list[dict[str, Any]], row: Mapping[str, Any], field: str) -> _Text | Chat:
    """The sequence of a prompt and the completion in `field`."""
    answer = _content(where, row, field)
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return _Text(where, prompt, answer)
        raise ValueError(
            f"{where}: the prompt is a text but {field!r} holds messages; give the prompt as "
            "[{'role': 'user', 'content': ...}]"
        )
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if messages[0]["role"] != "assistant" or prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: {field!r} must answer the prompt with the assistant's message, got {messages[0]['role']!r} "
            f"after {prompt[-1]['role']!r}"
        )
    return Chat(where, prompt + messages, first=len(prompt))


def _pair(where: str, row: Mapping[str, Any]) -> tuple[_Text | Chat, _Text | Chat]:
    chosen, rejected = _content(where, row, "chosen"), _content(where, row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{where}: one of 'chosen' and 'rejected' is a text and the other holds messages; use one form"
        )
    prompt = _content(where, row, "prompt") if "prompt" in row or isinstance(chosen, str) else None
    if isinstance(chosen, list) and isinstance(rejected, list):
        are_answers = chosen[0]["role"] == rejected[0]["role"] == "assistant"
        if prompt is None or not are_answers or (isinstance(prompt, list) and chosen[: len(prompt)] == prompt):
            first = _common_prompt(where, prompt, chosen, rejected)
            return Chat(where, chosen, first), Chat(where, rejected, first)
    assert prompt is not None
    return _answer(where, prompt, row, "chosen"), _answer(where, prompt, row, "rejected")


def _common_prompt(
    where: str, prompt: str | list[dict[str, Any]] | None, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> int:
    """How many messages of two whole conversations are their prompt."""
    shorter = min(len(chosen), len(rejected)) - 1  # the last message is an answer even where the two are identical
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(prompt, list):
        if not chosen[: len(prompt)] == prompt == rejected[: len(prompt)] or first < len(prompt):
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' must begin with the {len(prompt)} messages of 'prompt' and go on, "
                "or hold the assistant's answer alone"
            )
        first = len(prompt)
    elif isinstance(prompt, str) and all(message.get("content") != prompt for message in chosen[:first]):
        raise ValueError(
            f"{where}: the text of 'prompt' is no message of the common beginning of 'chosen' and 'rejected'; "
            "drop the column with rows.remove_columns('prompt'), or give the prompt as messages"
        )
    roles = [messages[first]["role"] for messages in (chosen, rejected)]
    if first == 0 or roles != ["assistant", "assistant"]:
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' part at message {first + 1} (of {roles[0]} and {roles[1]}); the "
            "messages before the answers must be identical and not empty, or stand in a column 'prompt'"
        )
    return first


def _tokens(who: str, tokenizer: Any, items: Sequence[_Text | Chat], max_length: int | None) -> list[Tokens]:
    if max_length is not None:
        check_count(who, "max_length", max_length)
    made = _in_order(tokenizer, items, _text_tokens, chat_tokens)
    if max_length is not None:
        _report_cut(who, "max_length", max_length, [ids for ids, _ in made])
    for item, (ids, mask) in zip(items, made, strict=True):
        # Nothing predicts the first token, so a mask that holds only that one trains nothing.
        if not any(mask[1:max_length]):
            trained = next((t for t in range(1, len(mask)) if mask[t]), None)
            lost = "" if trained is None else f" within max_length={max_length}: the first is token {trained}"
            raise ValueError(
                f"{item.place}: of its {len(ids)} tokens none is trained{lost}; shorten the prompt, raise max_length "
                "or remove the row"
            )
    return [Tokens(ids[:max_length], mask[:max_length]) for ids, mask in made]


def _in_order(tokenizer: Any, items: Sequence[_Text | Chat], of_texts: _Encoder, of_chats: _Encoder) -> list[Any]:
    """Texts and chats are each encoded together, since tokenizers are fast on batches, and put back in order."""
    texts = iter(of_texts(tokenizer, [item for item in items if isinstance(item, _Text)]))
    chats = iter(of_chats(tokenizer, [item for item in items if isinstance(item, Chat)]))
    return [next(texts if isinstance(item, _Text) else chats) for item in items]


def _text_tokens(tokenizer: Any, texts: Sequence[_Text]) -> Iterator[tuple[list[int], list[bool]]]:
    eos = tokenizer.eos_token_id if texts else None
    if texts and eos is None:
        raise ValueError(
            f"{texts[0].place}: the tokenizer has no eos_token, so the model would never learn to stop; "
            "set tokenizer.eos_token"
        )
    before = _prompt_ids(tokenizer, texts)  # of the empty prompt: what the tokenizer puts before any text
    after = token_ids(tokenizer, [text.completion for text in texts], special=False)
    for prompt, ids in zip(before, after, strict=True):
        completion = ids if ids[-1:] == [eos] else [*ids, eos]
        yield prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _prompt_ids(tokenizer: Any, texts: Sequence[_Text]) -> list[list[int]]:
    made = token_ids(tokenizer, [text.prompt for text in texts], special=True)
    for text, ids in zip(texts, made, strict=True):
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # a single one is a BOS that is also the EOS
            raise ValueError(
                f"{text.place}: the prompt's tokens end with the end-of-sequence token {ids[-1]}, after which a model "
                "writes nothing; load the tokenizer with add_eos_token=False, or take the token out of the text"
            )
    return made


def _report_cut(who: str, name: str, limit: int, sequences: Sequence[list[int]]) -> None:
    longest = max(map(len, sequences), default=0)
    if longest > limit:
        cut = sum(len(ids) > limit for ids in sequences)
        logger.warning(
            "%s: %d of %d sequences are longer than %s=%d and were cut (longest: %d tokens)",
            *(who, cut, len(sequences), name, limit, longest),
        )
