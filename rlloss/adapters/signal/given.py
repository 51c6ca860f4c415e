"""What a caller passes, copied before it waits in a queue: the caller may fill the same tensors anew at once."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

__all__ = ["copied", "prompts_given"]


def copied(given: Any) -> Any:
    """A copy of tensors, arrays, and lists and dicts of them; anything else as it is.

    >>> rows = [[1, 2], [3]]
    >>> copied(rows) == rows, copied(rows)[0] is rows[0]
    (True, False)
    """
    if isinstance(given, torch.Tensor):
        return given.detach().clone()
    if isinstance(given, Mapping):
        return {key: copied(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [value if isinstance(value, int | float | str) else copied(value) for value in given]
    return given.copy() if hasattr(given, "__array__") else given


def prompts_given(prompts: Any) -> list[Any]:
    """A copy of a list of prompts, each a text, messages or a list of ids; a ValueError for one prompt without a list.

    >>> prompts_given("2+2=")
    Traceback (most recent call last):
    ValueError: sample: prompts must be a list of prompts, got one text; pass ['2+2=']
    """
    if isinstance(prompts, str):
        raise ValueError(f"sample: prompts must be a list of prompts, got one text; pass [{prompts!r:.60}]")
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(given, list | tuple):
        raise ValueError(f"sample: prompts must be a list of prompts, got {type(prompts).__name__}; pass [prompt]")
    for one, what in ((Integral, "the token ids"), (Mapping, "the messages")):
        if given and all(isinstance(prompt, one) for prompt in given):
            raise ValueError(f"sample: prompts must be a list of prompts, got {what} of one; pass [prompt]")
    return [copied(prompt) if (ids := _ids(prompt)) is None else ids for prompt in given]


def _ids(prompt: Any) -> list[int] | None:
    """Token ids as a list; None of what is to be encoded."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    return (
        [int(i) for i in ids] if isinstance(ids, list | tuple) and all(isinstance(i, Integral) for i in ids) else None
    )
