"""A frozen head in two matrix products: the direction of a log-prob's gradient is summed up beside the statistics.

The kernel of the forward pass also writes its weights exp(z - offset), a range of columns at a time, and their product
with the head's weight is PyTorch's. The offset is the largest logit of the columns before: where one of these columns
lies so far above it that the weights could leave the range of floats, the weights of that block of rows are made
again. Everybody decides that on the device, and nearly always there is nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.gpu.functions import INF, LOWEST, sigmoid
from rlloss_kernels.gpu.gradient_products import columns_at_a_time
from rlloss_kernels.gpu.head import Weights, close_sums, head_sums, merged_sums, partial_sums
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.rows import HostCount, active_rows, contiguous_rows, flat
from rlloss_kernels.head import Head
from rlloss_kernels.sums import add_product

_NO_SUMS = (False, False, False)
_RISE = tl.constexpr(60.0)  # e^60 times a weight is far from the largest float
_BLOCK = 1024


def forward(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    scratch_bytes: int | None,
    statistics: Tensor,
    state: Tensor,
    direction: Tensor,
) -> None:
    """Fills in statistics, state and the derivatives [N, H] of the log-probs by the hidden states."""
    rows = active_rows(ids, loss_mask, temperature, head.vocabulary)
    h, count = contiguous_rows(hidden, rows, loss_mask is None), HostCount(rows)
    tokens, width = h.shape
    if not tokens:
        return
    operands = Operands((head, h))
    cut, blocks = operands.cut, operands.blocks
    # whole groups, so that their sums are merged in one order, however many rows there are
    columns = triton.cdiv(columns_at_a_time(head, tokens, scratch_bytes), cut.group) * cut.group
    offset = head_sums(operands, rows, _NO_SUMS, min(cut.columns, head.vocabulary))[0].clone()
    growth, jumped = torch.empty_like(offset), torch.empty(blocks, dtype=torch.int32, device=h.device)
    memory = count.memory(tokens * columns, dtype=head.operand_dtype, device=h.device)
    scratch, sums, total = Scratch(h, head.dtype), None, None
    for column in range(0, head.vocabulary, columns):
        last = min(column + columns, head.vocabulary)
        weights = memory[: tokens * (last - column)].view(tokens, last - column)
        parts = partial_sums(operands, rows, _NO_SUMS, column, last, Weights(weights, offset))
        before = parts[:0] if sums is None else sums[None, : parts.shape[1]]
        sums = merged_sums(torch.cat([before, parts]), rows.number)
        _offset_kernel[(blocks,)](sums, offset, growth, jumped, rows.number, cut.rows)
        partial_sums(operands, rows, _NO_SUMS, column, last, Weights(weights, offset, jumped))
        if total is None:
            active = count.read()
            total = torch.zeros((active, width), dtype=torch.float32, device=h.device)
        if len(total):
            _rescale_kernel[(len(total),)](total, growth, rows.number, width, _BLOCK)
            add_product(total, weights[: len(total)], head.operand(column, last - column, scratch), scratch)
    assert sums is not None
    assert total is not None
    close_sums(sums, rows, head.vocabulary, _NO_SUMS, statistics, state)
    if len(total):
        weight = head.weight
        _direction_kernel[(len(total),)](
            total,
            offset,
            state,
            weight,
            *rows.operands,
            rows.positions,
            direction,
            state.shape[1],
            weight.stride(0),
            weight.stride(1),
            width,
            float(head.logit_scale),
            0.0 if head.softcap is None else float(head.softcap),
            rows.temperature is not None,
            head.softcap is not None,
            _BLOCK,
        )


def backward(
    grad: Tensor,
    state: Tensor,
    direction: Tensor,
    head: Head,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """The gradient [N, H] of hidden: logsumexp is z_y - log p_y, so its gradient is what z_y's has more."""
    result, (tokens, width), ids = torch.empty_like(direction), direction.shape, ids.flatten()
    if tokens:
        weight = head.weight
        _backward_kernel[(tokens,)](
            grad.contiguous(),
            state,
            direction,
            weight,
            ids,
            flat(loss_mask, ids),
            flat(temperature, ids),
            result,
            tokens,
            weight.stride(0),
            weight.stride(1),
            width,
            float(head.logit_scale),
            0.0 if head.softcap is None else float(head.softcap),
            loss_mask is not None,
            temperature is not None,
            head.softcap is not None,
            _BLOCK,
        )
    return result


@triton.jit
def _offset_kernel(sums, offset, growth, jumped, count, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = r < tl.load(count)
    shift = tl.load(sums + r, mask=is_row, other=0.0)
    old = tl.load(offset + r, mask=is_row, other=0.0)
    any_far = tl.max(tl.where(shift - old > _RISE, 1, 0))
    new = tl.where(any_far != 0, shift, old)
    tl.store(offset + r, new, mask=is_row)
    tl.store(growth + r, tl.exp(old - new), mask=is_row)
    tl.store(jumped + tl.program_id(0), any_far)


@triton.jit(do_not_specialize=["width"])
def _rescale_kernel(total, growth, count, width, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    if r < tl.load(count):
        g = tl.load(growth + r)
        if g != 1.0:
            for start in range(0, width, BLOCK):
                k = start + tl.arange(0, BLOCK)
                x = tl.load(total + r * width + k, mask=k < width, other=0.0)
                tl.store(total + r * width + k, x * g, mask=k < width)


@triton.jit
def _target_slope(state, p, tokens, heat, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The derivative of the target's logit, after the temperature, by its product."""
    slope = scale / heat
    if HAS_SOFTCAP:
        n = tl.zeros([], tl.int64) + tokens
        z = (tl.load(state + p) + tl.load(state + n + p) - tl.load(state + 2 * n + p)) * heat / softcap
        slope *= 1.0 - z * z
    return slope


@triton.jit(do_not_specialize=["tokens", "width"])
def _direction_kernel(
    total,
    offset,
    state,
    weight,
    ids,
    temperature,
    count,
    positions,
    direction,
    tokens,
    w_stride,
    w_step,
    width,
    scale,
    softcap,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if r < tl.load(count):
        n = tl.zeros([], tl.int64) + tokens
        p = tl.load(positions + r)
        own = tl.load(ids + r).to(tl.int64)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + r)
        shift, log_mass, x = tl.load(state + p), tl.load(state + n + p), tl.load(state + 2 * n + p)
        mass = tl.exp((shift - tl.load(offset + r)) + log_mass)
        q = tl.where(x == INF, 0.0, sigmoid(x))  # a forbidden target learns nothing
        of_target = q * _target_slope(state, p, tokens, heat, scale, softcap, HAS_SOFTCAP)
        of_others = tl.where((log_mass == -INF) | (shift == LOWEST), 0.0, q * scale / heat / mass)
        for start in range(0, width, BLOCK):
            k = start + tl.arange(0, BLOCK)
            w = tl.load(weight + own * w_stride + k * w_step, mask=k < width, other=0.0).to(tl.float32)
            others = tl.load(total + r * width + k, mask=k < width, other=0.0)
            tl.store(direction + p * width + k, of_target * w - of_others * others, mask=k < width)


@triton.jit(do_not_specialize=["tokens", "width"])
def _backward_kernel(
    grad,
    state,
    direction,
    weight,
    ids,
    mask,
    temperature,
    result,
    tokens,
    w_stride,
    w_step,
    width,
    scale,
    softcap,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    n = tl.zeros([], tl.int64) + tokens
    g_logp, g_logsumexp = tl.load(grad + i), tl.load(grad + 2 * n + i)
    if HAS_MASK:
        counts = tl.load(mask + i) != 0
        g_logp, g_logsumexp = tl.where(counts, g_logp, 0.0), tl.where(counts, g_logsumexp, 0.0)
    along, of_target = g_logp - g_logsumexp, 0.0
    own = n * 0
    if g_logsumexp != 0:
        own = tl.load(ids + i).to(tl.int64)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        of_target = g_logsumexp * _target_slope(state, i, tokens, heat, scale, softcap, HAS_SOFTCAP)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        d = tl.zeros([BLOCK], tl.float32)
        if along != 0:
            d += along * tl.load(direction + i * width + k, mask=k < width, other=0.0).to(tl.float32)
        if g_logsumexp != 0:
            d += of_target * tl.load(weight + own * w_stride + k * w_step, mask=k < width, other=0.0).to(tl.float32)
        tl.store(result + i * width + k, d, mask=k < width)
