"""What the gradient of the logits, a range of columns at a time, becomes: the gradients of hidden states and a head.

The two products are PyTorch's. The weight's gradient is written once, and that of the hidden states grows in float32.
What a row's target has of its gradient is by far the largest part: it reaches the hidden state apart from the products,
unrounded.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.rows import ActiveRows, HostCount
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
        operands: Its first head is the one that learns, from active rows, one after the other.
    """

    def __init__(self, operands: Operands, rows: ActiveRows, scratch_bytes: int | None, needs: list[bool]):
        self.head, self.h, self.rows = operands.heads[0], operands.hidden[0], rows
        head, tokens, device = self.head, operands.tokens, self.h.device
        self.columns = columns_at_a_time(head, tokens, scratch_bytes)
        self.count, self.known = HostCount(rows), None
        self.scratch = Scratch(self.h, head.dtype)
        self.buffer = self.count.memory(tokens * self.columns, dtype=head.operand_dtype, device=device)
        self.of_target = torch.zeros(tokens, dtype=torch.float32, device=device)
        self.wants_hidden, to_weight, to_bias = needs
        self.d_hidden: Tensor | None = None
        self.d_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if to_weight else None
        if self.d_weight is not None:
            self.d_weight[head.vocabulary :] = 0
        self.d_bias = torch.zeros(len(head.weight), dtype=torch.float32, device=device) if to_bias else None
        shape = operands.blocks, self.columns
        self.bias_parts = torch.zeros(shape, dtype=torch.float32, device=device) if to_bias else None

    def ranges(self) -> Iterator[tuple[int, Tensor]]:
        """Each range's first column, and memory [N, width] where a kernel then writes the gradient of its logits."""
        for column in range(0, self.head.vocabulary, self.columns):
            width = min(self.columns, self.head.vocabulary - column)
            dz = self.buffer[: len(self.h) * width].view(len(self.h), width)
            if len(self.h):
                yield column, dz
            self._add(column, dz)

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """What a kernel writes beside it: the gradients of the targets, and sums over the rows of every block."""
        return self.of_target, self.of_target if self.bias_parts is None else self.bias_parts

    def _add(self, column: int, dz: Tensor) -> None:
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


@triton.jit
def store_gradient(
    d, is_target, r, is_row, place, start, columns, dz, of_target, bias_parts, SUMS_COLUMNS: tl.constexpr
):
    """Writes the gradient `d` [R, C] of the logits of rows `r`, from column `start` of a range of `columns` on.

    It is 0 at the target, column `place` of the range, whose own is written apart from it. `bias_parts` takes the sums
    over these rows.
    """
    COLUMNS: tl.constexpr = d.shape[1]
    inside = start + tl.arange(0, COLUMNS)
    is_here = is_row[:, None] & (inside < columns)[None, :]
    if SUMS_COLUMNS:
        tl.store(bias_parts + inside, tl.sum(tl.where(is_here, d, 0.0), 0), mask=inside < columns)
    of_row, at = tl.sum(tl.where(is_target, d, 0.0), 1), place - start
    tl.store(of_target + r, of_row, mask=is_row & (at >= 0) & (at < COLUMNS) & (place < columns))
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
