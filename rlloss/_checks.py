"""Input checks: one error that teaches, from metadata only (shape, dtype, device), so that no check ever syncs."""

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

_MASK_HINT = "write `mask.bool()` if every non-zero entry counts, and pass real-valued weights as token_weights"


def check_mask(who: str, name: str, mask: Tensor, *, ndim: tuple[int, ...] = (1, 2)) -> None:
    """Raises ValueError unless `mask` is a bool tensor of an allowed rank."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{who}: {name} must be a bool tensor (True = counts), got {got}; {_MASK_HINT}")
    if mask.ndim not in ndim:
        ranks = " or ".join(f"{n}-D" for n in ndim)
        raise ValueError(f"{who}: {name} must be {ranks}, got shape {list(mask.shape)}")


def check_full_precision(who: str, name: str, x: Tensor) -> None:
    """Raises ValueError unless `x` is float32 or float64."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{who}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{who}: {name} must be float32 or float64, got {x.dtype}; half precision is off by up to 0.05 nats, "
            "which is 5% of a ratio: rlloss.token_logprobs and rlloss.linear_logprobs return float32 from any model"
        )


def check_like(who: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless the float tensor `x` has the shape and device of `like`."""
    check_full_precision(who, name, x)
    if x.shape != like.shape:
        raise ValueError(f"{who}: {name} must have the shape of {like_name}, {list(like.shape)}, got {list(x.shape)}")
    check_device(who, name, x, like_name, like)


def check_device(who: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless `x` lies on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{who}: {name} is on {x.device} but {like_name} is on {like.device}; move one of them")


def check_range(
    who: str,
    name: str,
    value: float | int,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    open_low: bool = False,
) -> None:
    """Raises ValueError unless `low <= value <= high` (`low < value` when `open_low`)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (open_low and value == low):  # a NaN compares False
        bracket = "(" if open_low else "["
        raise ValueError(f"{who}: {name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}")


def check_flag(who: str, name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{who}: {name} must be True or False, got {value!r}")


def check_choice(who: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, with the nearest legal word, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{who}: {name} must be one of {choices}, got {value!r}{nearest(value, choices)}")


def nearest(word: object, choices: Iterable[str]) -> str:
    """The tail of an error message: `; did you mean 'x'?`, or nothing where no choice is close."""
    close = difflib.get_close_matches(str(word), list(choices), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def check_tokens_layout(who: str, loss_mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError unless `loss_mask` is `[B, T]`, or packed `[N]` with integer boundaries `cu_seqlens`."""
    check_mask(who, "loss_mask", loss_mask)
    if cu_seqlens is None:
        if loss_mask.ndim == 1:
            raise ValueError(
                f"{who}: a packed loss_mask {list(loss_mask.shape)} needs cu_seqlens (the boundaries [0, ..., N]); "
                "padded tensors are [B, T]"
            )
        return
    if loss_mask.ndim != 1:
        raise ValueError(
            f"{who}: cu_seqlens goes with packed [N] tensors, got loss_mask of shape {list(loss_mask.shape)}"
        )
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(
            f"{who}: cu_seqlens must be int32 or int64 boundaries [0, ..., N], got {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{who}: cu_seqlens must be int32 or int64 boundaries [0, ..., N] of shape [S + 1], "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    check_device(who, "cu_seqlens", cu_seqlens, "loss_mask", loss_mask)


def check_count(who: str, name: str, value: int) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{who}: {name} must be an integer of at least 1, got {value!r}")


def check_seed(who: str, name: str, value: int) -> None:
    """Raises ValueError unless `value` is an integer of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{who}: {name} must be an integer in [0, 2^32), got {value!r}")
