"""Tiles of logits for Triton kernels: the product, its rows, what follows it, and in which order programs take them."""

import triton
import triton.language as tl

from rlloss_kernels.gpu.functions import WIDE, tanh


@triton.jit
def products(
    h,
    h_stride,
    w,
    w_stride,
    width,
    row,
    rows,
    column,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BULK: tl.constexpr,
):
    """Rows `row` on of h times columns `column` on of w^T in float32: a left and a right half [ROWS, COLUMNS // 2].

    What follows a product takes as many registers again, which there are for one half at a time. Past the last of the
    `rows` and `columns` it repeats that one, or reads what lies there: nobody uses these.
    """
    HALF: tl.constexpr = COLUMNS // 2
    left, right = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    # not used with BULK, and then not computed
    r = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None] * h_stride
    c = tl.minimum(column + tl.arange(0, HALF), columns - 1).to(tl.int64)[:, None] * w_stride
    d = tl.minimum(column + HALF + tl.arange(0, HALF), columns - 1).to(tl.int64)[:, None] * w_stride
    for k in range(0, width, DEPTH):
        if BULK:
            a = h.load([row, k])
            b = w.load([column, k])
            e = w.load([column + HALF, k])
        else:
            along = k + tl.arange(0, DEPTH)[None, :]
            a = tl.load(h + r + along, mask=along < width, other=0.0)
            b = tl.load(w + c + along, mask=along < width, other=0.0)
            e = tl.load(w + d + along, mask=along < width, other=0.0)
        if WIDE:
            a, b, e = a.to(tl.float32), b.to(tl.float32), e.to(tl.float32)
        left = tl.dot(a, b.T, left, input_precision="tf32x3")
        right = tl.dot(a, e.T, right, input_precision="tf32x3")
    return left, right


@triton.jit
def finished(
    z,
    c,
    columns,
    bias,
    scale,
    softcap,
    heat,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Logits from products [R, C] of the columns `c`, and their derivative by the products but for the temperature."""
    if HAS_BIAS:
        z += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    z *= scale
    slope = scale
    if HAS_SOFTCAP:
        t = tanh(z / softcap)
        z = t * softcap
        slope = (1.0 - t * t) * scale
    if HAS_TEMPERATURE:
        z = z / heat[:, None]
    return z, slope


@triton.jit
def rows_of_block(row, rows, ids, temperature, ROWS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    """The numbers of the rows from `row` on, whether they are among the first `rows`, their ids and temperatures."""
    r = row + tl.arange(0, ROWS)
    is_row = r < rows
    heat = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        heat = tl.load(temperature + r, mask=is_row, other=1.0)
    return r, is_row, tl.load(ids + r, mask=is_row, other=-1), heat


@triton.jit
def block_and_group(item, blocks, groups, PANEL: tl.constexpr):
    """Which block of rows and which group of columns an item of work is.

    PANEL blocks of rows go through all groups together, so that the weight is read from memory once for all of them.
    """
    panel = item // (PANEL * groups)
    tall = tl.minimum(blocks - panel * PANEL, PANEL)
    inside = item - panel * PANEL * groups
    return panel * PANEL + inside % tall, inside // tall
