"""Prompts as a scoring model reads them, whatever the policy's own tokenizer makes of them."""

from typing import Any

__all__ = ["is_chat", "plain_text", "prompt_ids"]


def is_chat(prompt: Any, tokenizer: Any) -> bool:
    """Whether a chat template writes the prompt: it is messages, and the tokenizer has one.

    >>> is_chat("2+2?", None)
    False
    """
    return not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is not None


def plain_text(prompt: Any) -> str:
    r"""A prompt without a template: a text as it is, of messages what they say, line by line.

    >>> plain_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}])
    'Be brief.\n2+2?'
    """
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The tokens of a prompt, as `rlloss.loop.prompts` makes them; it may be empty, unlike one to sample from."""
    from rlloss.loop.data import prompts

    if not is_chat(prompt, tokenizer):
        prompt = plain_text(prompt)
        if not prompt.strip():
            return list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    return prompts([{"prompt": prompt}], tokenizer)[0].ids
