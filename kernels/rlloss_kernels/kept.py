"""Logits of a few ids per token: those that a truncated sampler (top-k, top-p, min-p) had kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Tokens, statistics_dtype
from rlloss_kernels.tile import undisturbed

__all__ = ["kept_logits"]

SCRATCH_BYTES = 64 << 20
_COLUMNS = 4096  # of the weight's gradient at a time


def kept_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, kept_ids: Tensor, *, scratch_bytes: int | None = None
) -> Tensor:
    """The logits hidden weight^T + bias at `kept_ids` [*tokens, K], in float32; -inf where an id is negative."""
    return _forward(hidden, weight, bias, kept_ids, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes)


@torch.library.custom_op("rlloss_kernels::kept_forward", mutates_args=())
@undisturbed
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, kept_ids: Tensor, scratch_bytes: int) -> Tensor:
    z = _no_logits(hidden, kept_ids).fill_(-torch.inf)
    flat = z.view(-1, kept_ids.shape[-1])
    kept = kept_ids.flatten(0, -2) >= 0
    for block, h, w in _blocks(hidden, weight, kept_ids, kept, scratch_bytes):
        products = torch.bmm(w, h[:, :, None]).squeeze(2)
        products = products if bias is None else products + bias[block.ids]
        flat[block.positions] = torch.where(kept[block.positions], products, -torch.inf)
    return z


@torch.library.custom_op("rlloss_kernels::kept_backward", mutates_args=())
@undisturbed
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept_ids: Tensor,
    scratch_bytes: int,
    needs: list[bool],
) -> list[Tensor]:
    to_hidden, to_weight, to_bias = needs
    dz = torch.where(kept_ids < 0, 0, grad).flatten(0, -2)
    d_hidden = hidden.new_zeros((len(dz), hidden.shape[-1]))
    if to_hidden:
        for block, _, w in _blocks(hidden, weight, kept_ids, dz != 0, scratch_bytes):
            at = block.positions
            d_hidden[at] = torch.bmm(dz[at, None, :], w).squeeze(1).to(hidden.dtype)
    d_weight = _by_id(dz, hidden, weight, kept_ids) if to_weight else None
    results = [d_hidden.view(hidden.shape), d_weight, None]
    if to_bias and bias is not None:
        total = torch.zeros(len(weight), dtype=dz.dtype, device=dz.device)
        results[2] = total.index_put_((kept_ids.clamp(min=0).flatten().long(),), dz.flatten(), accumulate=True)
        results[2] = results[2].to(bias.dtype)
    return [x for x, needed in zip(results, needs, strict=True) if needed and x is not None]


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, kept_ids: Tensor, scratch_bytes: int) -> Tensor:
    return _no_logits(hidden, kept_ids)


@_backward.register_fake
def _(grad: Tensor, *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(args[:3], args[-1], strict=True) if needed]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scratch_bytes = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = iter(_backward(grad, *ctx.saved_tensors, ctx.scratch_bytes, needs))
    return *(next(results) if needed else None for needed in needs), None, None


_forward.register_autograd(_autograd, setup_context=_save)


def _blocks(
    hidden: Tensor, weight: Tensor, kept_ids: Tensor, counts: Tensor, scratch_bytes: int
) -> Iterator[tuple[Tokens, Tensor, Tensor]]:
    """Rows with anything that `counts` [N, K], their hidden states, and the weight's rows of their ids (0 for none)."""
    dtype, count = statistics_dtype(hidden.dtype), kept_ids.shape[-1]
    rows, positions = Rows(hidden), counts.any(1).nonzero().squeeze(1)
    ids = kept_ids.flatten(0, -2)[positions].clamp(min=0).long()
    size = max(1, scratch_bytes // (2 * count * hidden.shape[-1] * dtype.itemsize))
    for _, block in Tokens(positions, ids, None).blocks(size):
        yield block, rows.gather(block, dtype), weight[block.ids].to(dtype)


def _by_id(dz: Tensor, hidden: Tensor, weight: Tensor, kept_ids: Tensor) -> Tensor:
    """The weight's gradient, summed in the logits' dtype over the tokens that kept an id, a range of ids at a time."""
    ids, dz = kept_ids.flatten().long(), dz.flatten()
    entries_that_count = dz.nonzero().squeeze(1)
    order = ids[entries_that_count].sort(stable=True)
    bounds = torch.arange(0, len(weight) + _COLUMNS, _COLUMNS, device=dz.device)
    starts = torch.searchsorted(order.values, bounds).tolist()
    result, h = torch.zeros_like(weight), hidden.flatten(0, -2)
    for column, first, last in zip(range(0, len(weight), _COLUMNS), starts, starts[1:], strict=False):
        total = torch.zeros_like(result[column : column + _COLUMNS], dtype=dz.dtype)
        for start in range(first, last, _COLUMNS):
            entries = entries_that_count[order.indices[start : min(start + _COLUMNS, last)]]
            rows = h[entries // kept_ids.shape[-1]].to(dz.dtype) * dz[entries, None]
            total.index_put_((ids[entries] - column,), rows, accumulate=True)
        result[column : column + _COLUMNS] = total
    return result


def _no_logits(hidden: Tensor, kept_ids: Tensor) -> Tensor:
    return hidden.new_empty(kept_ids.shape, dtype=statistics_dtype(hidden.dtype))
