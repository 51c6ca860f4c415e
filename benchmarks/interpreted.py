"""Triton's interpreter, for runs without a GPU."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Rounds to the nearest bfloat16 where the interpreter cuts, is silent about infinities, and is less slow."""
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def rounded(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return cut(x, source, target, mode)
        near = torch.from_numpy(np.array(x, dtype=np.float32)).to(torch.bfloat16)
        return near.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)

    changes = {
        "_convert_float": rounded,
        "_get_np_dtype": found_once(interpreter._get_np_dtype),
        "_patch_lang": patched_once(interpreter._patch_lang),
    }
    with patch.multiple(interpreter, **changes), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        yield


def found_once(numpy_type: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Remembers NumPy's types, where the interpreter makes a table of all of them for every operation."""
    import triton.language as tl

    known = cache(numpy_type)
    return lambda x: known(x.scalar) if type(x.scalar) is tl.dtype else numpy_type(x)


def patched_once(patch_language: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Patches triton.language once per launch, and then restores all of it.

    The interpreter does so for every call between functions, and restores what the kernel itself made it patch.
    """
    import triton.language as tl

    scopes: dict[frozenset[int], Any] = {}

    def restore() -> None:
        while scopes:
            scopes.popitem()[1].restore()

    def patched(function: Any) -> Any:
        languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if languages not in scopes:
            scopes[languages] = patch_language(function)
        return SimpleNamespace(restore=restore)

    return patched
