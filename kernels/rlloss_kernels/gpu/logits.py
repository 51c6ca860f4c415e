"""Per-token statistics of logits and their gradient: one program per row, which reads it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.head import Flags, close_sums, merged_sums
from rlloss_kernels.gpu.rows import ActiveRows, Matrix, check_ids
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
    tokens, matrix, flat = ids.numel(), Matrix.of(logits), ids.flatten()
    if not tokens:
        return
    valid = torch.ones((), dtype=torch.int32, device=ids.device)
    sums = torch.zeros((len(SUMS), tokens), dtype=torch.float32, device=ids.device) if shard.is_part else state
    _forward_kernel[(tokens,)](
        matrix.data,
        flat if matrix.place is None else matrix.place,
        flat,
        flat if loss_mask is None else loss_mask.flatten().view(torch.uint8),
        flat if temperature is None else temperature.flatten(),
        statistics,
        state,
        sums,
        valid,
        matrix.stride,
        matrix.step,
        tokens,
        columns,
        shard.first,
        shard.total,
        matrix.place is not None,
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
        close_sums(sums, ActiveRows(number, positions, flat, None), shard.total, flags, statistics, state)
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
    tokens, width, matrix, flat = ids.numel(), logits.shape[-1], Matrix.of(logits), ids.flatten()
    if not tokens:
        return result
    chunks = triton.cdiv(width, CHUNK)
    _backward_kernel[(tokens * chunks,)](
        matrix.data,
        flat if matrix.place is None else matrix.place,
        flat,
        flat if loss_mask is None else loss_mask.flatten().view(torch.uint8),
        flat if temperature is None else temperature.flatten(),
        grad.contiguous(),
        state,
        result,
        matrix.stride,
        matrix.step,
        tokens,
        columns,
        shard.first,
        shard.total,
        width,
        chunks,
        matrix.place is not None,
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
        at = i
        if HAS_PLACE:
            at = tl.load(place + i)
        row = logits + at * stride
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        parts = no_sums(1)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):  # without a mask, so that a thread loads 16 bytes at a time
            c = start + tl.arange(0, BLOCK)[None, :]
            z = tl.load(row + c.to(tl.int64) * step).to(tl.float32)
            if HAS_TEMPERATURE:
                z = z / heat
            parts = absorbed(z, c >= 0, c == own, start, parts, ENTROPY, SQUARE, TOTAL)
        if whole < columns:
            c = whole + tl.arange(0, BLOCK)[None, :]
            z = tl.load(row + c.to(tl.int64) * step, mask=c < columns, other=0.0).to(tl.float32)
            if HAS_TEMPERATURE:
                z = z / heat
            parts = absorbed(z, c < columns, c == own, whole, parts, ENTROPY, SQUARE, TOTAL)
        shift, target, mass, moment, square, total_ = parts
        n = tl.zeros([], tl.int64) + tokens
        at = i + tl.arange(0, 1)
        if IS_PART:
            tl.store(sums + at, shift)
            tl.store(sums + n + at, target)
            tl.store(sums + 2 * n + at, mass)
            tl.store(sums + 3 * n + at, moment)
            tl.store(sums + 4 * n + at, square)
            tl.store(sums + 5 * n + at, total_)
            tl.store(sums + 6 * n + at, tl.zeros([1], tl.float32) + columns)
        else:
            log_mass, x, spread, concentration, logp, entropy, logsumexp, sum_p2, mean_logprob = closed(
                shift, target, mass, moment, square, total_, columns, ENTROPY, SQUARE, TOTAL
            )
            tl.store(state + at, shift)
            tl.store(state + n + at, log_mass)
            tl.store(state + 2 * n + at, x)
            tl.store(statistics + at, logp)
            tl.store(statistics + 2 * n + at, logsumexp)
            if ENTROPY:
                tl.store(state + 3 * n + at, spread)
                tl.store(statistics + n + at, entropy)
            if SQUARE:
                tl.store(state + 4 * n + at, concentration)
                tl.store(statistics + 3 * n + at, sum_p2)
            if TOTAL:
                tl.store(statistics + 4 * n + at, mean_logprob)


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
    rows = tl.zeros([], tl.int64) + tokens
    at = i + tl.arange(0, 1)
    g_logp = tl.load(grad + at)
    g_logsumexp = tl.load(grad + 2 * rows + at)
    g_entropy, g_sum_p2, g_mean = tl.zeros_like(g_logp), tl.zeros_like(g_logp), tl.zeros_like(g_logp)
    if ENTROPY:
        g_entropy = tl.load(grad + rows + at)
    if SQUARE:
        g_sum_p2 = tl.load(grad + 3 * rows + at)
    if TOTAL:
        g_mean = tl.load(grad + 4 * rows + at)
    used = (g_logp != 0) | (g_logsumexp != 0) | (g_entropy != 0) | (g_sum_p2 != 0) | (g_mean != 0)
    active = tl.max(tl.where(used, 1, 0)) != 0
    if HAS_MASK:
        active = active & (tl.load(mask + i) != 0)
    if active:
        own = tl.load(ids + i) - first
        source = i
        if HAS_PLACE:
            source = tl.load(place + i)
        row = logits + source * stride
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        spread, concentration = tl.zeros_like(g_logp), tl.zeros_like(g_logp)
        if ENTROPY:
            spread = tl.load(state + 3 * rows + at)
        if SQUARE:
            concentration = tl.load(state + 4 * rows + at)
        shift = tl.load(state + at)
        scale, slope, square, uniform, target = coefficients(
            tl.load(state + rows + at),
            tl.load(state + 2 * rows + at),
            spread,
            concentration,
            g_logp,
            g_entropy,
            g_logsumexp,
            g_sum_p2,
            g_mean,
            total,
            1.0 / heat,
            ENTROPY,
            SQUARE,
            TOTAL,
        )
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            z = tl.load(row + c.to(tl.int64) * step, mask=c < columns, other=-float("inf")).to(tl.float32)
            if HAS_TEMPERATURE:
                z = z / heat
            dz = logit_gradient(z, c == own, shift, scale, slope, square, uniform, target, ENTROPY, SQUARE, TOTAL)
            tl.store(out + c, tl.where(c < columns, dz, 0.0), mask=c < last)
    else:
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            tl.store(out + c, tl.zeros([1, BLOCK], tl.float32), mask=c < last)
