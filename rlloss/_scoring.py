"""What every way of scoring tokens against ids checks, and one temperature per token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_device, check_mask, nearest

__all__ = [
    "ABSENT",
    "by_name",
    "check_bytes",
    "check_head",
    "check_impl",
    "check_positive",
    "check_scored",
    "check_vocab_size",
    "kept_that_count",
    "token_temperature",
]

ABSENT: Any = None  # typed as a tensor: what was asked for needs no narrowing by type checkers

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_temperature(who: str, temperature: float | Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One temperature per token, in the dtype of the statistics; None for 1."""
    if not isinstance(temperature, Tensor):
        check_positive(who, "temperature", temperature)
        return None if temperature == 1 else torch.full(ids.shape, temperature, dtype=dtype, device=ids.device)
    check_device(who, "temperature", temperature, "ids", ids)
    if not temperature.is_floating_point() or temperature.requires_grad:
        raise ValueError(
            f"{who}: temperature must be a number or a float tensor without gradient, got {temperature.dtype} with "
            f"requires_grad={temperature.requires_grad}"
        )
    if temperature.shape not in ((), ids.shape, ids.shape[:1]):
        raise ValueError(
            f"{who}: temperature must have the shape of ids, {list(ids.shape)}, or one entry per row, "
            f"[{ids.shape[0]}], got {list(temperature.shape)}"
        )
    if temperature.ndim < ids.ndim and temperature.ndim:
        temperature = temperature[:, None]
    return temperature.to(dtype).expand(ids.shape)


def by_name(found: Tensor, known: Sequence[str], ids: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The named outputs in the shape of the ids, of one row for each that is `known`."""
    return {name: found[known.index(name)].view(ids.shape) for name in outputs}


def check_vocab_size(who: str, vocab_size: int | None, columns: int) -> None:
    """Raises ValueError for a vocabulary that is larger than the head."""
    if vocab_size is not None and (isinstance(vocab_size, bool) or vocab_size not in range(1, columns + 1)):
        raise ValueError(
            f"{who}: vocab_size must be an integer from 1 to the {columns} columns of the logits, got {vocab_size!r}"
        )


def kept_that_count(
    who: str, kept_ids: Tensor, ids: Tensor, loss_mask: Tensor | None, outputs: Sequence[str]
) -> Tensor:
    """The kept ids, none outside the mask; ValueError for some that do not belong to `ids`."""
    if not isinstance(kept_ids, Tensor) or kept_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{who}: kept_ids must be an int32 or int64 tensor, got {getattr(kept_ids, 'dtype', kept_ids)}"
        )
    if kept_ids.shape[:-1] != ids.shape or kept_ids.ndim != ids.ndim + 1 or kept_ids.shape[-1] == 0:
        raise ValueError(
            f"{who}: kept_ids must be [*ids.shape, K] = {[*ids.shape, 'K']}, got {list(kept_ids.shape)}; fill the "
            "places of tokens that kept fewer with -1"
        )
    check_device(who, "kept_ids", kept_ids, "ids", ids)
    if "mean_logprob" in outputs:
        raise ValueError(f"{who}: mean_logprob is over the whole vocabulary, of which kept_ids leaves a part; drop one")
    return kept_ids if loss_mask is None else torch.where(loss_mask[..., None], kept_ids, -1)


def check_bytes(who: str, **sizes: int | None) -> None:
    """Raises ValueError for a budget that is no number of bytes."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise ValueError(f"{who}: {name} must be a number of bytes, got {size!r}")


def check_impl(who: str, impl: str, known: Sequence[str], why_not_triton: Callable[[], str | None]) -> None:
    """Raises ValueError for an implementation that is not `known`, and for Triton where something keeps it away."""
    check_choice(who, "impl", impl, known)
    if impl != "triton" or torch.compiler.is_compiling():  # a compiler traces no search for packages and devices
        return
    if reason := why_not_triton():
        raise ValueError(f"{who}: impl='triton' is impossible here: {reason}; impl='auto' takes plain PyTorch")


def check_positive(who: str, name: str, value: float) -> None:
    """Raises ValueError for a number that is not above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{who}: {name} must be a positive number, got {value!r}")


def check_scored(
    who: str,
    name: str,
    x: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    outputs: Sequence[str],
    known: Sequence[str],
) -> None:
    """Raises ValueError for tensors that do not belong together or outputs that are not `known`."""
    for role, tensor in ((name, x), ("ids", ids)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{who}: {role} must be a tensor, got {type(tensor).__name__}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{who}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{who}: ids must be int32 or int64, got {ids.dtype}")
    if ids.ndim not in (1, 2) or x.shape[:-1] != ids.shape or x.shape[-1] == 0:
        raise ValueError(
            f"{who}: {name} must be [*ids.shape, {'V' if name.endswith('logits') else 'H'}] with ids [B, T] or [N], "
            f"got {name} {list(x.shape)} and ids {list(ids.shape)}; row i is scored against ids[i], and rlloss.shift "
            "aligns them"
        )
    check_device(who, "ids", ids, name, x)
    if loss_mask is not None:
        check_mask(who, "loss_mask", loss_mask)
        if loss_mask.shape != ids.shape:
            raise ValueError(
                f"{who}: loss_mask must have the shape of ids, {list(ids.shape)}, got {list(loss_mask.shape)}"
            )
        check_device(who, "loss_mask", loss_mask, name, x)
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"{who}: outputs must be a sequence of names such as ('logprobs',), got {outputs!r}")
    for output in outputs:
        if output not in known:
            raise ValueError(f"{who}: outputs must be among {list(known)}, got {output!r}{nearest(output, known)}")


def check_head(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError for a head that does not fit to `hidden`."""
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{who}: weight must be a tensor, got {type(weight).__name__}; of a module pass its weight and bias"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{who}: weight must be [V, H] with the width H={hidden.shape[-1]} of hidden, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if x.dtype != hidden.dtype:
            raise ValueError(
                f"{who}: hidden is {hidden.dtype} but {name} is {x.dtype}; convert one, as in "
                f"hidden.to(weight.dtype): nothing is cast behind your back, not even inside torch.autocast"
            )
        check_device(who, name, x, "hidden", hidden)
