"""Per-token statistics of logits and their gradient: one program per row, which reads it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import loaded, store
from rlloss_kernels.gpu.head import Flags, close_sums, merged_sums
from rlloss_kernels.gpu.rows import ActiveRows, Matrix, check_ids, flat, logits_at, row_at
from rlloss_kernels.gpu.softmax import SUMS, absorbed, closed, coefficients, logit_gradient, no_sums
from rlloss_kernels.shards import Shard, gathered

BLOCK = 8192  # columns at a time
CHUNK = 32768  # columns of a program in the backward pass, which has enough to do where rows are few


def forward(
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    shard: Shard,
    flags: Flags,
    statistics: Tensor,
    state: Tensor,
) -> None:
    """Fills in statistics [5, N] and State [5, N] of rows inside `loss_mask`."""
    tokens, matrix, ids = ids.numel(), Matrix.of(logits), ids.flatten()
    if not tokens:
        return
    valid = torch.ones((), dtype=torch.int32, device=ids.device)
    sums = torch.zeros((len(SUMS), tokens), dtype=torch.float32, device=ids.device) if shard.is_part else state
    _forward_kernel[(tokens,)](
        *matrix.operands,
        ids,
        flat(loss_mask, ids),
        flat(temperature, ids),
        statistics,
        state,
        sums,
        valid,
        *matrix.strides,
        tokens,
        columns,
        shard.first,
        shard.total,
        matrix.has_place,
        loss_mask is not None,
        temperature is not None,
        shard.is_part,
        *flags,
        BLOCK,
        num_warps=8,
    )
    check_ids(valid, shard.total)
    if shard.is_part:
        number, positions = torch.full_like(valid, tokens).view(1), torch.arange(tokens, device=ids.device)
        sums = merged_sums(gathered(sums, shard.group), number)
        close_sums(sums, ActiveRows(number, positions, ids, None), shard.total, flags, statistics, state)
        if loss_mask is not None:
            for x in (statistics, state):
                x.masked_fill_(~loss_mask.flatten(), 0)


def backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    shard: Shard,
    flags: Flags,
) -> Tensor:
    """The gradient of the logits for upstream gradients `grad` [5, N]."""
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tokens, width, matrix, ids = ids.numel(), logits.shape[-1], Matrix.of(logits), ids.flatten()
    if not tokens:
        return result
    chunks = triton.cdiv(width, CHUNK)
    _backward_kernel[(tokens * chunks,)](
        *matrix.operands,
        ids,
        flat(loss_mask, ids),
        flat(temperature, ids),
        grad.contiguous(),
        state,
        result,
        *matrix.strides,
        tokens,
        columns,
        shard.first,
        shard.total,
        width,
        chunks,
        matrix.has_place,
        loss_mask is not None,
        temperature is not None,
        *flags,
        BLOCK // 2,
        CHUNK,
        num_warps=8,
    )
    return result


@triton.jit(do_not_specialize=["tokens", "first", "total"])
def _forward_kernel(
    logits,
    place,
    ids,
    mask,
    temperature,
    statistics,
    state,
    sums,
    valid,
    stride,
    step,
    tokens,
    columns,
    first,
    total,
    HAS_PLACE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_PART: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    counts = True
    if HAS_MASK:
        counts = tl.load(mask + i) != 0
    if counts:
        own = tl.load(ids + i)
        if (own < 0) | (own >= total):
            tl.store(valid, 0)
        own -= first
        row = row_at(logits, place, stride, i, HAS_PLACE)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        parts = no_sums(1)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            z = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, True)
            parts = absorbed(z, c >= 0, c == own, start, parts, ENTROPY, SQUARE, TOTAL)
        if whole < columns:
            c = whole + tl.arange(0, BLOCK)[None, :]
            z = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, False)
            parts = absorbed(z, c < columns, c == own, whole, parts, ENTROPY, SQUARE, TOTAL)
        n = tl.zeros([], tl.int64) + tokens
        at = i + tl.arange(0, 1)
        if IS_PART:
            counted = tl.zeros([1], tl.float32) + columns
            store(sums + at, n, at >= 0, parts + (counted,), 7)  # noqa: RUF005
        else:
            found = closed(parts, columns, ENTROPY, SQUARE, TOTAL)
            store(state + at, n, at >= 0, found[0:5], 5)
            store(statistics + at, n, at >= 0, found[5:10], 5)


@triton.jit(do_not_specialize=["tokens", "first", "total", "chunks"])
def _backward_kernel(
    logits,
    place,
    ids,
    mask,
    temperature,
    grad,
    state,
    result,
    stride,
    step,
    tokens,
    columns,
    first,
    total,
    width,
    chunks,
    HAS_PLACE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) // chunks
    start_of_chunk = (tl.program_id(0) % chunks) * CHUNK
    last = tl.minimum(start_of_chunk + CHUNK, width)
    out = result + i * width
    n = tl.zeros([], tl.int64) + tokens
    at = i + tl.arange(0, 1)
    of_output = loaded(grad + at, n, at >= 0, 5)
    used = (of_output[0] != 0) | (of_output[2] != 0)
    if ENTROPY:
        used = used | (of_output[1] != 0)
    if SQUARE:
        used = used | (of_output[3] != 0)
    if TOTAL:
        used = used | (of_output[4] != 0)
    active = tl.max(tl.where(used, 1, 0)) != 0
    if HAS_MASK:
        active = active & (tl.load(mask + i) != 0)
    if active:
        own = tl.load(ids + i) - first
        row = row_at(logits, place, stride, i, HAS_PLACE)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        of_state = loaded(state + at, n, at >= 0, 5)
        numbers = coefficients(of_state, of_output, total, 1.0 / heat, ENTROPY, SQUARE, TOTAL)
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            z = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, False)
            dz = logit_gradient(z, c == own, numbers, ENTROPY, SQUARE, TOTAL)
            tl.store(out + c, tl.where(c < columns, dz, 0.0), mask=c < last)
    else:
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            tl.store(out + c, tl.zeros([1, BLOCK], tl.float32), mask=c < last)
