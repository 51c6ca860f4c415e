"""The gradients of hidden states and a head: each tile of logits is made again and turned into its gradient.

A range of columns at a time, a kernel writes the gradient of all rows' logits, of which `gpu.gradient_products` makes
the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import loaded, store
from rlloss_kernels.gpu.gradient_products import GradientProducts, store_gradient
from rlloss_kernels.gpu.head import Flags
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.products import block_and_group, finished, products, rows_of_block
from rlloss_kernels.gpu.rows import ActiveRows, active_rows, compacted
from rlloss_kernels.gpu.softmax import coefficients, logit_gradient
from rlloss_kernels.head import Head
from rlloss_kernels.shards import Shard

_ROWS = 128  # of a program that makes coefficients


def backward(
    grad: Tensor,
    state: Tensor,
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    flags: Flags,
    scratch_bytes: int | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names, for upstream gradients [5, N]."""
    grad = grad.contiguous()
    rows = active_rows(ids, loss_mask, temperature, shard.total, grad, first=shard.first)
    operands = Operands((head, compacted(hidden, rows)))
    sums = GradientProducts(operands, rows, scratch_bytes, needs)
    found = _coefficients(grad, state, rows, shard.total, flags)
    for column, dz in sums.ranges():
        groups = triton.cdiv(dz.shape[1], operands.cut.columns)
        _gradient_kernel[operands.programs(groups)](
            *operands.matrices,
            *rows.operands,
            found,
            dz,
            *sums.outputs,
            *operands.numbers,
            *dz.shape,
            column,
            sums.columns,
            *operands.flags,
            rows.temperature is not None,
            *flags,
            sums.bias_parts is not None,
            **operands.constants,
        )
    return sums.gradients(hidden, shard)


def _coefficients(grad: Tensor, state: Tensor, rows: ActiveRows, vocabulary: int, flags: Flags) -> Tensor:
    """Shift, scale, slope, square, uniform and target [6, N] of the active rows."""
    tokens = grad.shape[1]
    found = torch.empty((6, tokens), dtype=torch.float32, device=grad.device)
    if tokens:
        _coefficient_kernel[(triton.cdiv(tokens, _ROWS),)](
            grad,
            state,
            *rows.operands,
            rows.positions,
            found,
            tokens,
            vocabulary,
            rows.temperature is not None,
            *flags,
            _ROWS,
        )
    return found


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _coefficient_kernel(
    grad,
    state,
    ids,
    temperature,
    count,
    positions,
    found,
    tokens,
    vocabulary,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    r, is_row, _, heat = rows_of_block(row, tl.load(count), ids, temperature, ROWS, HAS_TEMPERATURE)
    n = tl.zeros([], tl.int64) + tokens
    p = tl.load(positions + r, mask=is_row, other=0)
    of_state, of_output = loaded(state + p, n, is_row, 5), loaded(grad + p, n, is_row, 5)
    numbers = coefficients(of_state, of_output, vocabulary, 1.0 / heat, ENTROPY, SQUARE, TOTAL)
    store(found + r, n, is_row, numbers, 6)


@triton.jit(do_not_specialize=["rows_at_most", "first", "bias_stride"])
def _gradient_kernel(
    h,
    w,
    bias,
    ids,
    temperature,
    count,
    found,
    dz,
    of_target,
    bias_parts,
    h_stride,
    w_stride,
    width,
    scale,
    softcap,
    rows_at_most,
    columns,
    first,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    SUMS_COLUMNS: tl.constexpr,
    BULK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PANEL: tl.constexpr,
):
    rows = tl.load(count)
    blocks = tl.cdiv(rows, ROWS)
    groups = tl.cdiv(columns, COLUMNS)
    last = first + columns
    n = tl.zeros([], tl.int64) + rows_at_most
    for item in range(tl.program_id(0), blocks * groups, tl.num_programs(0)):
        block, group = block_and_group(item, blocks, groups, PANEL)
        row, column = block * ROWS, first + group * COLUMNS
        halves = products(h, h_stride, w, w_stride, width, row, rows, column, last, ROWS, COLUMNS, DEPTH, BULK)
        r, is_row, own, heat = rows_of_block(row, rows, ids, temperature, ROWS, HAS_TEMPERATURE)
        place = own - first
        for i in tl.static_range(2):
            numbers = loaded(found + r, n, is_row, 6)
            start = group * COLUMNS + i * (COLUMNS // 2)
            inside = start + tl.arange(0, COLUMNS // 2)
            c = first + inside
            z, slope = finished(halves[i], c, last, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE)
            is_target = inside[None, :] == place[:, None]
            d = slope * logit_gradient(z, is_target, numbers, ENTROPY, SQUARE, TOTAL)
            parts = bias_parts + (tl.zeros([], tl.int64) + block) * bias_stride
            store_gradient(d, is_target, r, is_row, place, start, columns, dz, of_target, parts, SUMS_COLUMNS)
