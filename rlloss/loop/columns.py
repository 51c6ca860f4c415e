"""Which columns of a row hold the prompt and the answers, in every form that public data has them."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rlloss._checks import nearest
from rlloss.loop.chat import Chat, Messages, checked_messages
from rlloss.loop.dialogues import ASSISTANT, dialogue_prompt
from rlloss.loop.rows import place

__all__ = [
    "ALIASES",
    "Item",
    "Text",
    "check_column",
    "completion_items",
    "pair_items",
    "pair_texts",
    "placed",
    "prompt_of",
]

logger = logging.getLogger("rlloss")

# Other names of a column. No further one is guessed: load_rows(..., columns=...) renames.
ALIASES = {"completion": ("response",)}


class Text(NamedTuple):
    """A raw prompt and its completion; a text that is trained from its beginning has the empty prompt."""

    place: str
    prompt: str
    completion: str = ""


Item = Text | Chat


def placed(who: str, rows: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row after its place in errors."""
    for index, row in enumerate(rows):
        where = f"{who}: {place(rows, index)}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a dict of columns, got {type(row).__name__}; load_rows reads files")
        yield where, row


def check_column(where: str, name: str, columns: Collection[str]) -> None:
    """Raises ValueError, with the nearest name, where there is no column of that name."""
    if name not in columns:
        raise ValueError(
            f"{where}: no column {name!r} among {list(columns)}{nearest(name, columns)}; "
            f"rename yours with load_rows(..., columns={{{name!r}: ...}})"
        )


def prompt_of(where: str, row: Mapping[str, Any]) -> str | Messages:
    """The prompt: the column of that name, or what two answers to it show of it.

    Two whole conversations hold it as messages, which then count even where a column holds its text too: it is the
    prompt that `pair_items` reads, through the chat template.
    """
    sides = [row.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(side, list) for side in sides) and not isinstance(row.get("prompt"), list):
        # the answers are not read, so that one may be empty
        chosen, rejected = (checked_messages(where, name, row[name], last=False) for name in ("chosen", "rejected"))
        if "prompt" not in row or not _are_answers(chosen, rejected):
            prompt = _content(where, row, "prompt") if "prompt" in row else None
            return chosen[: _common_prompt(where, prompt, chosen, rejected)]
    if all(isinstance(side, str) for side in sides) and "prompt" not in row:
        return _dialogue_prompt(where, row)
    return _content(where, row, "prompt")


def completion_items(who: str, rows: Iterable[Any]) -> list[Item]:
    """The sequences to imitate; of pairs the chosen ones, which is logged."""
    given = list(placed(who, rows))
    chosen = sum(_is_pair(row) for _, row in given)
    if chosen:
        logger.warning("%s: %d of %d rows are pairs, of which the chosen answer is taken", who, chosen, len(given))
    return [pair_items(where, row)[0] if _is_pair(row) else _completion(where, row) for where, row in given]


def pair_items(where: str, row: Mapping[str, Any]) -> tuple[Item, Item]:
    """The chosen and the rejected sequence, after the same prompt."""
    chosen, rejected = _sides(where, row)
    if isinstance(chosen, str) and "prompt" not in row:
        prompt, *answers = pair_texts(where, row)
        return Text(where, prompt, answers[0]), Text(where, prompt, answers[1])
    prompt = _content(where, row, "prompt") if "prompt" in row else None
    if isinstance(chosen, list) and isinstance(rejected, list):
        is_whole = isinstance(prompt, list) and chosen[: len(prompt)] == prompt
        if prompt is None or not _are_answers(chosen, rejected) or is_whole:
            first = _common_prompt(where, prompt, chosen, rejected)
            return Chat(where, chosen, first), Chat(where, rejected, first)
    assert prompt is not None
    return _answered(where, prompt, chosen, "chosen"), _answered(where, prompt, rejected, "rejected")


def pair_texts(where: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of a pair of dialogues, which laid together again are the dialogues."""
    chosen, rejected = _sides(where, row)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' must be dialogues written as one text, got messages; pairs, prompts and "
            "completions read those as they are"
        )
    prompt = _dialogue_prompt(where, row)
    answers = {name: row[name][len(prompt) :] for name in ("chosen", "rejected")}
    for name, answer in answers.items():
        if not answer.strip():
            raise ValueError(
                f"{where}: {name!r} ends with {ASSISTANT!r}, so its answer is empty; drop such rows: rows.filter("
                f"lambda row: all(row[side].rpartition({ASSISTANT!r})[2].strip() for side in ('chosen', 'rejected')))"
            )
    return prompt, answers["chosen"], answers["rejected"]


def _is_pair(row: Mapping[str, Any]) -> bool:
    """Whether the chosen answer is all that a row has to imitate."""
    others = {"completion", *ALIASES["completion"], "messages", "text"}
    return {"chosen", "rejected"} <= set(row) and not others & set(row)


def _completion(where: str, row: Mapping[str, Any]) -> Item:
    completion = _spelled(where, row, "completion")
    is_split = "prompt" in row and completion in row
    if is_split and "messages" in row:
        raise ValueError(
            f"{where}: has both 'messages' and 'prompt' with {completion!r}; drop one with rows.remove_columns(...)"
        )
    if is_split:
        return _answered(where, _content(where, row, "prompt"), _content(where, row, completion), completion)
    if "messages" in row:
        messages = _content(where, row, "messages")
        if isinstance(messages, str):
            raise ValueError(
                f"{where}: field 'messages' must be a list of messages, got a text; name the column 'text'"
            )
        return Chat(where, messages)
    if "text" in row and not {"prompt", completion} & set(row):
        text = _content(where, row, "text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: field 'text' must be a text, got messages; name the column 'messages'")
        return Text(where, "", text)
    raise ValueError(
        f"{where}: needs the columns 'prompt' and 'completion', or 'response', or 'messages', or only 'text', or "
        f"'chosen' and 'rejected'; got {list(row)}; rename yours with load_rows(..., columns={{'completion': ...}})"
    )


def _spelled(where: str, row: Mapping[str, Any], name: str) -> str:
    """What a column of `ALIASES` is called in this row."""
    found = [spelling for spelling in (name, *ALIASES[name]) if spelling in row]
    if len(found) > 1:
        raise ValueError(
            f"{where}: {' and '.join(map(repr, found))} are two names of one column; drop one with "
            "rows.remove_columns(...)"
        )
    return found[0] if found else name


def _content(where: str, row: Mapping[str, Any], field: str) -> str | Messages:
    """A field that is a non-empty text or a list of messages."""
    check_column(where, field, row)
    value = row[field]
    if isinstance(value, list):
        return checked_messages(where, field, value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{where}: field {field!r} must be a non-empty text or a list of messages, got {value!r:.60}; "
            f"fill it, or drop such rows: rows.filter(lambda row: (row[{field!r}] or '').strip())"
        )
    return value


def _sides(where: str, row: Mapping[str, Any]) -> tuple[str | Messages, str | Messages]:
    chosen, rejected = _content(where, row, "chosen"), _content(where, row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{where}: one of 'chosen' and 'rejected' is a text and the other holds messages; use one form"
        )
    return chosen, rejected


def _answered(where: str, prompt: str | Messages, answer: str | Messages, field: str) -> Item:
    """The sequence of a prompt and its answer, which stood in `field`."""
    if isinstance(prompt, str):
        if isinstance(answer, str):
            return Text(where, prompt, answer)
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


def _are_answers(chosen: Messages, rejected: Messages) -> bool:
    return chosen[0]["role"] == rejected[0]["role"] == "assistant"


def _dialogue_prompt(where: str, row: Mapping[str, Any]) -> str:
    prompt = dialogue_prompt(row["chosen"], row["rejected"])
    if prompt is None:
        raise ValueError(
            f"{where}: no column 'prompt' among {list(row)}, and 'chosen' and 'rejected' share no beginning that ends "
            f"with {ASSISTANT!r} and would be the prompt of two dialogues: {row['chosen']!r:.40} and "
            f"{row['rejected']!r:.40}; name the column of the prompt with load_rows(..., columns={{'prompt': ...}})"
        )
    return prompt


def _common_prompt(where: str, prompt: str | Messages | None, chosen: Messages, rejected: Messages) -> int:
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
