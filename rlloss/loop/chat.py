"""Chat messages to tokens: a conversation as the template renders it, and which of its tokens the assistant wrote."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

from jinja2 import TemplateError

__all__ = ["Chat", "chat_tokens", "checked_messages", "generation_prompts", "token_ids"]

Messages = list[dict[str, Any]]
_CHUNK = (
    1024  # conversations per tokenizer call: fast, and the encodings of a large dataset never lie in memory at once
)


class Chat(NamedTuple):
    """A conversation whose assistant turns from message `first` on are trained; `place` names its row in errors."""

    place: str
    messages: Messages
    first: int = 0


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts, with or without the special tokens (BOS) that the tokenizer puts around a text."""
    chunks = (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK))
    return [ids for chunk in chunks for ids in tokenizer(list(chunk), add_special_tokens=special)["input_ids"]]


def checked_messages(place: str, field: str, value: Sequence[Any], *, last: bool = True) -> Messages:
    """The messages without their None entries (Arrow fills absent keys), or a ValueError naming the first bad one.

    `last=False` lets the last one be empty.
    """
    if not value:
        raise ValueError(f"{place}: field {field!r} holds no messages; remove the row or fill the field")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"{place}: message {number} of field {field!r}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            got = (
                f"keys {list(message)}" if isinstance(message, Mapping) else f"{type(message).__name__} {message!r:.60}"
            )
            raise ValueError(f"{where} must be {{'role': ..., 'content': ...}}, got {got}; convert the rows first")
        message = {key: entry for key, entry in message.items() if entry is not None}
        content = message.get("content")
        is_read = last or number < len(value)
        if is_read and not (isinstance(content, str) and content.strip()) and not message.get("tool_calls"):
            raise ValueError(
                f"{where} ({message['role']}) needs a non-empty text as content, got {content!r:.60}; "
                "drop the message or fill it"
            )
        messages.append(message)
    return messages


def generation_prompts(tokenizer: Any, chats: Sequence[Chat]) -> list[list[int]]:
    """Token ids of conversations up to where the assistant's answer begins."""
    texts = []
    for chat in chats:
        if chat.messages[-1]["role"] == "assistant":
            raise ValueError(
                f"{chat.place}: the prompt ends with the assistant's message, which would show the policy its answer; "
                "end with the turn to be answered"
            )
        texts.append(_rendered(tokenizer, chat, len(chat.messages), generation_prompt=True))
    return token_ids(tokenizer, texts, special=False)


def chat_tokens(
    tokenizer: Any, chats: Sequence[Chat], *, or_last: bool = False
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of conversations and the mask of what the assistant must learn to write: content and end of turn.

    The template's own `{% generation %}` marks decide where it has them. Otherwise the turn of message i is what
    messages[:i+1] add to messages[:i] with the generation prompt, and a template for which one is not the beginning of
    the other is refused.

    Of a last message that is empty, marks may hold nothing. `or_last` then takes the last token of the conversation:
    for models that score one, and not to train a policy, which would learn to write what its template writes.
    """
    for chat in chats:
        if not _turns(chat):
            roles = sorted({message["role"] for message in chat.messages[chat.first :]})
            raise ValueError(
                f"{chat.place}: no message has the role 'assistant', so nothing is trained; roles: {roles}"
            )
    if chats and _has_generation_marks(tokenizer, chats[0].place):
        return (_marked(tokenizer, chat, or_last) for chat in chats)
    chunks = (chats[i : i + _CHUNK] for i in range(0, len(chats), _CHUNK))
    return chain.from_iterable(_by_prefixes(tokenizer, chunk, or_last) for chunk in chunks)


def _turns(chat: Chat) -> list[int]:
    return [i for i, m in enumerate(chat.messages) if i >= chat.first and m["role"] == "assistant"]


def _check_template(tokenizer: Any, place: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place}: chat messages need a chat template and the tokenizer has none; set tokenizer.chat_template to a "
            "Jinja template, take the tokenizer of an instruction-tuned model, or give the row as plain text"
        )


def _has_generation_marks(tokenizer: Any, place: str) -> bool:
    _check_template(tokenizer, place)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # named templates, of which the tokenizer knows the default
        template = tokenizer.get_chat_template()
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def _applied(tokenizer: Any, chat: Chat, count: int, **options: Any) -> Any:
    _check_template(tokenizer, chat.place)
    try:
        return tokenizer.apply_chat_template(chat.messages[:count], **options)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{chat.place}: the chat template refuses messages 1 to {count}: {error}; "
            f"roles: {[message['role'] for message in chat.messages[:count]]}"
        ) from error


def _rendered(tokenizer: Any, chat: Chat, count: int, *, generation_prompt: bool) -> str:
    return _applied(tokenizer, chat, count, tokenize=False, add_generation_prompt=generation_prompt)


def _marked(tokenizer: Any, chat: Chat, or_last: bool) -> tuple[list[int], list[bool]]:
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _applied(tokenizer, chat, len(chat.messages), **options)
    ids, marks = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    runs = [list(run) for _, run in groupby(range(len(marks)), key=lambda t: marks[t])]
    runs = [run for run in runs if marks[run[0]]]
    turns = sum(message["role"] == "assistant" for message in chat.messages)
    if or_last and len(runs) == turns - 1 and not str(chat.messages[-1].get("content") or "").strip():
        return ids, [False] * (len(ids) - 1) + [True]
    # transformers drops, or extends to the end, a span whose first or last character belongs to no token.
    if len(runs) != turns:
        raise ValueError(
            f"{chat.place}: the template's {{% generation %}} marks give {len(runs)} spans of tokens for {turns} "
            "assistant messages; begin and end each block on visible text, once per message"
        )
    trained = set(chain.from_iterable(runs[turns - len(_turns(chat)) :]))
    return ids, [t in trained for t in range(len(ids))]


def _by_prefixes(tokenizer: Any, chats: Sequence[Chat], or_last: bool) -> Iterator[tuple[list[int], list[bool]]]:
    asked: dict[tuple[int, int, bool], str] = {}
    for row, chat in enumerate(chats):
        if _turns(chat)[0] == 0:
            raise ValueError(f"{chat.place}: the first message is the assistant's; put the turn it answers before it")
        counts = [(count, is_open) for i in _turns(chat) for count, is_open in ((i, True), (i + 1, False))]
        for count, is_open in dict.fromkeys([*counts, (len(chat.messages), False)]):
            asked[row, count, is_open] = _rendered(tokenizer, chat, count, generation_prompt=is_open)
    ids = dict(zip(asked, token_ids(tokenizer, list(asked.values()), special=False), strict=True))
    for row, chat in enumerate(chats):
        whole = ids[row, len(chat.messages), False]
        mask = [False] * len(whole)
        for i in _turns(chat):
            before, after = ids[row, i, True], ids[row, i + 1, False]
            _check_prefix(tokenizer, f"{chat.place}: message {i + 1}", before, after)
            _check_prefix(tokenizer, f"{chat.place}: message {i + 1}", after, whole)
            start, end = len(before), _end_of_turn(tokenizer, after, len(before))
            mask[start:end] = [True] * (end - start)
        if or_last and True not in mask:
            mask[-1] = True
        yield whole, mask


def _check_prefix(tokenizer: Any, place: str, prefix: list[int], ids: list[int]) -> None:
    if ids[: len(prefix)] == prefix:
        return
    parts = next((t for t, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), len(ids))
    was, became = (repr(tokenizer.decode(x[parts : parts + 8])) for x in (prefix, ids))
    raise ValueError(
        f"{place}: the chat template is not prefix-stable: token {parts} onwards reads {was} where the conversation "
        f"ends there and {became} where it goes on, so the assistant's tokens cannot be told; put the assistant's text "
        "between {% generation %} and {% endgeneration %} in the template, or give rows of prompt and completion"
    )


def _end_of_turn(tokenizer: Any, ids: list[int], start: int) -> int:
    """Where the turn ends: a line break that the template sets after its end-of-turn token is nobody's to learn."""
    for t in range(len(ids) - 1, start - 1, -1):
        if ids[t] in tokenizer.added_tokens_decoder:
            return len(ids) if tokenizer.decode(ids[t + 1 :]).strip() else t + 1
    return len(ids)
