"""The gradients of hidden states and a head: each tile of logits is made again and turned into its gradient.

A range of columns at a time, a kernel writes the gradient of all rows' logits, and the two products that remain are
PyTorch's. The weight's gradient is written once, and that of the hidden states grows in float32. What a row's target
has of its gradient is by far the largest part: it reaches the hidden state apart from the products, unrounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.gpu.functions import processors
from rlloss_kernels.gpu.head import Flags
from rlloss_kernels.gpu.products import block_and_group, finished, products
from rlloss_kernels.gpu.rows import ActiveRows, HostCount, Matrix, active_rows, compacted
from rlloss_kernels.gpu.softmax import coefficients, logit_gradient
from rlloss_kernels.gpu.tiling import Tiling, bulk_loads, operand, tiling
from rlloss_kernels.head import Head
from rlloss_kernels.shards import Shard, summed_
from rlloss_kernels.sums import add_product

SCRATCH_BYTES = 192 << 20  # of the gradient of the logits
_COLUMNS = 4096  # at least, so that what the hidden states' gradient has so far is seldom read and written
_ROWS = 128
_BLOCK = 1024


def columns_at_a_time(head: Head, tokens: int, scratch_bytes: int | None) -> int:
    """How many columns of the gradient of the logits are made at a time: of a given budget as many as it holds."""
    row = max(tokens, 1) * head.operand_dtype.itemsize
    columns = max(_COLUMNS, SCRATCH_BYTES // row) if scratch_bytes is None else scratch_bytes // row
    return max(1, min(max(columns // 256, 1) * 256, head.vocabulary))


class GradientProducts:
    """What the gradient of the logits, a range of columns at a time, adds up to; those parts that `needs` names.

    Args:
        h: `[N, H]`, the active rows, one after the other.
        columns: The widest range.
    """

    def __init__(self, head: Head, h: Tensor, rows: ActiveRows, columns: int, needs: list[bool], blocks: int):
        self.head, self.h, self.rows, self.needs = head, h, rows, needs
        self.count, self.known = HostCount(rows), None
        self.scratch = Scratch(h, head.dtype)
        device, dtype = h.device, head.operand_dtype
        self.buffer = self.count.memory(len(h) * columns, dtype=dtype, device=device)
        self.of_target = torch.zeros(len(h), dtype=torch.float32, device=device)
        to_hidden, to_weight, to_bias = needs
        self.d_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if to_weight else None
        if self.d_weight is not None:
            self.d_weight[head.vocabulary :] = 0
        self.d_bias = torch.zeros(len(head.weight), dtype=torch.float32, device=device) if to_bias else None
        self.bias_parts = torch.zeros(blocks, columns, dtype=torch.float32, device=device) if to_bias else None
        self.d_hidden: Tensor | None = None
        self.wants_hidden = to_hidden

    def range(self, width: int) -> Tensor:
        """Memory [N, width] for the gradient of the logits, 0 at the targets."""
        return self.buffer[: len(self.h) * width].view(len(self.h), width)

    def end(self, column: int, dz: Tensor) -> None:
        """Takes what a kernel has written for the columns from `column` on."""
        width = dz.shape[1]
        if self.known is None:
            self.known = self.count.read()
            if self.wants_hidden:
                self.d_hidden = self.h.new_zeros((self.known, self.h.shape[1]), dtype=torch.float32)
        if self.d_bias is not None and self.bias_parts is not None:
            self.d_bias[column : column + width] = self.bias_parts[:, :width].sum(0)
        if self.d_weight is not None and not self.known:
            self.d_weight[column : column + width] = 0
        if not self.known:
            return
        low = dz[: self.known]
        if self.d_hidden is not None:
            add_product(self.d_hidden, low, self.head.operand(column, width, self.scratch), self.scratch)
        if self.d_weight is not None:
            _target_kernel[(triton.cdiv(self.known, _ROWS),)](
                dz, self.of_target, self.rows.ids, self.rows.number, column, width, _ROWS
            )
            h, d_w = self.h[: self.known].to(dz.dtype), self.d_weight[column : column + width]
            if d_w.dtype is dz.dtype:
                torch.mm(low.t(), h, out=d_w)
            else:
                d_w.copy_(torch.mm(low.t(), h))

    def gradients(self, like: Tensor, shard: Shard) -> list[Tensor]:
        """Those that are needed; that of hidden in the shape of `like`, 0 where rows are not active."""
        results = []
        if self.wants_hidden:
            # partial sums over the columns of a shard are added up before they are rounded
            whole = torch.zeros(like.shape, dtype=torch.float32 if shard.is_part else like.dtype, device=like.device)
            if self.d_hidden is not None and self.d_hidden.numel():
                weight = self.head.weight
                _hidden_kernel[(len(self.d_hidden),)](
                    self.d_hidden,
                    self.of_target,
                    weight,
                    self.rows.ids,
                    self.rows.positions,
                    self.rows.number,
                    whole,
                    weight.stride(0),
                    weight.stride(1),
                    like.shape[-1],
                    self.head.vocabulary,
                    _BLOCK,
                )
            if shard.is_part:
                summed_(whole, shard.group)
            results.append(whole.to(like.dtype))
        if self.d_weight is not None:
            results.append(self.d_weight)
        if self.d_bias is not None:
            results.append(self.d_bias.to(self.head.weight.dtype))
        return results


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
    h = compacted(Matrix.of(hidden), rows, hidden.shape[-1])
    cut, columns = tiling(h), columns_at_a_time(head, len(h), scratch_bytes)
    sums = GradientProducts(head, h, rows, columns, needs, triton.cdiv(len(h), cut.rows))
    found = _coefficients(grad, state, rows, shard.total, flags)
    for column in range(0, head.vocabulary, columns):
        dz = sums.range(min(columns, head.vocabulary - column))
        if len(h):
            _launch(head, h, rows, found, flags, column, dz, sums, cut)
        sums.end(column, dz)
    return sums.gradients(hidden, shard)


def _coefficients(grad: Tensor, state: Tensor, rows: ActiveRows, vocabulary: int, flags: Flags) -> Tensor:
    """Shift, scale, slope, square, uniform and target [6, N] of the active rows."""
    tokens = grad.shape[1]
    found = torch.empty((6, tokens), dtype=torch.float32, device=grad.device)
    if tokens:
        _coefficient_kernel[(triton.cdiv(tokens, _ROWS),)](
            grad,
            state,
            rows.positions,
            rows.ids if rows.temperature is None else rows.temperature,
            rows.number,
            found,
            tokens,
            vocabulary,
            rows.temperature is not None,
            *flags,
            _ROWS,
        )
    return found


def _launch(
    head: Head,
    h: Tensor,
    rows: ActiveRows,
    found: Tensor,
    flags: Flags,
    column: int,
    dz: Tensor,
    sums: GradientProducts,
    cut: Tiling,
) -> None:
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    bulk = bulk_loads(h, weight)
    items = triton.cdiv(len(h), cut.rows) * triton.cdiv(dz.shape[1], cut.columns)
    parts = sums.bias_parts
    _gradient_kernel[(min(processors(h.device), items),)](
        operand(h, cut.rows, cut.depth, bulk),
        operand(weight, cut.columns // 2, cut.depth, bulk),
        weight if head.bias is None else head.bias,
        rows.ids,
        rows.ids if rows.temperature is None else rows.temperature,
        rows.number,
        found,
        dz,
        sums.of_target,
        found if parts is None else parts,
        h.stride(0),
        weight.stride(0),
        h.shape[1],
        len(h),
        column,
        dz.shape[1],
        0 if parts is None else parts.stride(0),
        float(head.logit_scale),
        0.0 if head.softcap is None else float(head.softcap),
        head.bias is not None,
        head.softcap is not None,
        rows.temperature is not None,
        *flags,
        parts is not None,
        bulk,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.panel,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _coefficient_kernel(
    grad,
    state,
    positions,
    temperature,
    count,
    found,
    tokens,
    vocabulary,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = r < tl.load(count)
    n = tl.zeros([], tl.int64) + tokens
    p = tl.load(positions + r, mask=is_row, other=0)
    heat = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        heat = tl.load(temperature + r, mask=is_row, other=1.0)
    scale, slope, square, uniform, target = coefficients(
        tl.load(state + n + p, mask=is_row, other=0.0),
        tl.load(state + 2 * n + p, mask=is_row, other=0.0),
        tl.load(state + 3 * n + p, mask=is_row, other=0.0),
        tl.load(state + 4 * n + p, mask=is_row, other=0.0),
        tl.load(grad + p, mask=is_row, other=0.0),
        tl.load(grad + n + p, mask=is_row, other=0.0),
        tl.load(grad + 2 * n + p, mask=is_row, other=0.0),
        tl.load(grad + 3 * n + p, mask=is_row, other=0.0),
        tl.load(grad + 4 * n + p, mask=is_row, other=0.0),
        vocabulary,
        1.0 / heat,
        ENTROPY,
        SQUARE,
        TOTAL,
    )
    tl.store(found + r, tl.load(state + p, mask=is_row, other=0.0), mask=is_row)
    tl.store(found + n + r, scale, mask=is_row)
    tl.store(found + 2 * n + r, slope, mask=is_row)
    tl.store(found + 3 * n + r, square, mask=is_row)
    tl.store(found + 4 * n + r, uniform, mask=is_row)
    tl.store(found + 5 * n + r, target, mask=is_row)


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
    rows_at_most,
    first,
    columns,
    bias_stride,
    scale,
    softcap,
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
        column = first + group * COLUMNS
        halves = products(h, h_stride, w, w_stride, width, block * ROWS, rows, column, last, ROWS, COLUMNS, DEPTH, BULK)
        r = block * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        own = tl.load(ids + r, mask=is_row, other=-1)
        heat = tl.full([ROWS], 1.0, tl.float32)
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + r, mask=is_row, other=1.0)
        shift = tl.load(found + r, mask=is_row, other=0.0)
        factor = tl.load(found + n + r, mask=is_row, other=0.0)
        slope, square, uniform = heat, heat, heat
        if ENTROPY:
            slope = tl.load(found + 2 * n + r, mask=is_row, other=0.0)
        if SQUARE:
            square = tl.load(found + 3 * n + r, mask=is_row, other=0.0)
        if TOTAL:
            uniform = tl.load(found + 4 * n + r, mask=is_row, other=0.0)
        at_target = tl.load(found + 5 * n + r, mask=is_row, other=0.0)
        for i in tl.static_range(2):
            inside = group * COLUMNS + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            c = first + inside
            z, by_product = finished(
                halves[i], c, last, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            is_target = c[None, :] == own[:, None]
            d = by_product * logit_gradient(
                z, is_target, shift, factor, slope, square, uniform, at_target, ENTROPY, SQUARE, TOTAL
            )
            is_here = is_row[:, None] & (inside < columns)[None, :]
            if SUMS_COLUMNS:
                parts = bias_parts + (tl.zeros([], tl.int64) + block) * bias_stride + inside
                tl.store(parts, tl.sum(tl.where(is_here, d, 0.0), 0), mask=inside < columns)
            of_row = tl.sum(tl.where(is_target, d, 0.0), 1)
            at = own - (column + i * (COLUMNS // 2))
            tl.store(of_target + r, of_row, mask=is_row & (at >= 0) & (at < COLUMNS // 2) & (own < last))
            out = dz + r.to(tl.int64)[:, None] * columns + inside[None, :]
            tl.store(out, tl.where(is_target, 0.0, d), mask=is_here)


@triton.jit(do_not_specialize=["column", "width"])
def _target_kernel(dz, of_target, ids, count, column, width, ROWS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = r < tl.load(count)
    place = tl.load(ids + r, mask=is_row, other=0).to(tl.int64) - column
    is_here = is_row & (place >= 0) & (place < width)
    tl.store(dz + r.to(tl.int64) * width + place, tl.load(of_target + r, mask=is_row, other=0.0), mask=is_here)


@triton.jit(do_not_specialize=["width", "columns"])
def _hidden_kernel(
    d_hidden, of_target, weight, ids, positions, count, result, w_stride, w_step, width, columns, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    if r < tl.load(count):
        p = tl.load(positions + r)
        own = tl.load(ids + r).to(tl.int64)
        g = tl.load(of_target + r)
        for start in range(0, width, BLOCK):
            k = start + tl.arange(0, BLOCK)
            is_here = (k < width) & (own >= 0) & (own < columns)  # another shard's target has no part in this
            w = tl.load(weight + own * w_stride + k * w_step, mask=is_here, other=0.0).to(tl.float32)
            others = tl.load(d_hidden + r * width + k, mask=k < width, other=0.0)
            tl.store(result + p * width + k, others + g * w, mask=k < width)
