"""Prompts as a scoring model reads them, whatever the policy's own tokenizer makes of them."""

from collections.abc import Mapping
from typing import Any

__all__ = ["is_chat", "messages_of", "plain_text", "prompt_ids"]


def is_chat(prompt: Any, tokenizer: Any) -> bool:
    """Whether a chat template writes the prompt: it is messages, and the tokenizer has one.

    >>> is_chat("2+2?", None)
    False
    """
    return not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is not None


def messages_of(prompt: Any) -> list[dict[str, Any]]:
    """The messages of a prompt, or a ValueError that names the first one whose content is no text.

    >>> messages_of([{"role": "user", "content": None}])
    Traceback (most recent call last):
    ValueError: prompt: message 1 (user) needs a text as content, got None; write its parts as one text, or drop the row
    """
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt: must be a text or a list of messages, got {type(prompt).__name__} {prompt!r:.60}")
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"prompt: message {number} must be {{'role': ..., 'content': ...}}, got {message!r:.60}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f"prompt: message {number} ({message.get('role')}) needs a text as content, got {content!r:.60}; write "
                "its parts as one text, or drop the row"
            )
    return [dict(message) for message in prompt]


def plain_text(prompt: Any) -> str:
    r"""A prompt without a template: a text as it is, of messages what they say, line by line.

    >>> plain_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}])
    'Be brief.\n2+2?'
    """
    return prompt if isinstance(prompt, str) else "\n".join(m.get("content") or "" for m in messages_of(prompt))


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, as `rlloss.loop.prompts` makes them; it may be empty, unlike one to sample from."""
    from rlloss.loop.data import prompts

    if not is_chat(prompt, tokenizer):
        prompt = plain_text(prompt)
        if not prompt.strip():
            return list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    return prompts([{"prompt": prompt}], tokenizer)[0].ids
