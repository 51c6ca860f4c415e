"""Statistics of hidden states under a head: the logits stay in registers.

A persistent kernel leaves, for every row and every group of columns, the running sums of `gpu.softmax`; two small ones
merge them in the order of the columns and close them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import loaded, store
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.products import block_and_group, finished, products, rows_of_block
from rlloss_kernels.gpu.rows import ActiveRows, active_rows, contiguous_rows
from rlloss_kernels.gpu.softmax import SUMS, absorbed, closed, joined, no_sums, sum_rows
from rlloss_kernels.head import Head
from rlloss_kernels.shards import Shard, gathered

Flags = tuple[bool, bool, bool]  # whether entropy, sum_p2 and mean_logprob are wanted
_ROWS = 128  # of a program that merges or closes


class Weights(NamedTuple):
    """exp(z - offset) of every column but the target's, times the slope of a softcap, and where it has to be made."""

    values: Tensor  # [N, columns]
    offset: Tensor  # [N]
    only: Tensor | None = None  # of blocks of rows, those where it is other than 0; statistics then are left alone


def partial_sums(
    operands: Operands, rows: ActiveRows, flags: Flags, first: int, last: int, weights: Weights | None
) -> Tensor:
    """The sums [groups, k, N] of every group of columns from `first` to `last`, of which the first k are kept.

    Args:
        weights: What is to be written beside them.
    """
    groups, kept = triton.cdiv(last - first, operands.cut.group), sum_rows(*flags)
    parts = torch.empty((groups, kept, operands.tokens), dtype=torch.float32, device=rows.ids.device)
    if not parts.numel():
        return parts
    _forward_kernel[operands.programs(groups)](
        *operands.matrices,
        *rows.operands,
        parts,
        parts if weights is None else weights.values,
        parts if weights is None else weights.offset,
        parts if weights is None or weights.only is None else weights.only,
        *operands.numbers,
        operands.tokens,
        first,
        last - first,
        *operands.flags,
        rows.temperature is not None,
        *flags,
        kept,
        weights is not None,
        weights is not None and weights.only is not None,
        operands.cut.tiles,
        **operands.constants,
    )
    return parts


def head_sums(operands: Operands, rows: ActiveRows, flags: Flags, columns: int) -> Tensor:
    """The sums [7, N], in the order of SUMS, of the first so many columns of the logits; 0 where not wanted."""
    return merged_sums(partial_sums(operands, rows, flags, 0, columns, None), rows.number)


def merged_sums(parts: Tensor, count: Tensor) -> Tensor:
    """The sums [7, N] over all parts [groups, k, N], merged in their order; 0 for those that `parts` left out."""
    groups, kept, tokens = parts.shape
    sums = torch.zeros((len(SUMS), tokens), dtype=torch.float32, device=parts.device)
    if tokens:
        _merge_kernel[(triton.cdiv(tokens, _ROWS),)](parts, sums, count, tokens, groups, kept, _ROWS)
    return sums


def close_sums(
    sums: Tensor, rows: ActiveRows, vocabulary: int, flags: Flags, statistics: Tensor, state: Tensor
) -> None:
    """Fills in statistics [5, N] and State [5, N] at the positions of the active rows, which `sums` [7, N] are of."""
    tokens = sums.shape[1]
    if tokens:
        _close_kernel[(triton.cdiv(tokens, _ROWS),)](
            sums, rows.positions, rows.number, statistics, state, tokens, vocabulary, *flags, _ROWS
        )


def forward(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    flags: Flags,
    statistics: Tensor,
    state: Tensor,
) -> None:
    """Fills in statistics [5, N] and State [5, N] of the tokens inside `loss_mask`."""
    rows = active_rows(ids, loss_mask, temperature, shard.total, first=shard.first)
    operands = Operands((head, contiguous_rows(hidden, rows, loss_mask is None)))
    sums = head_sums(operands, rows, flags, head.vocabulary)
    if shard.is_part:
        sums = merged_sums(gathered(sums, shard.group), rows.number)
    close_sums(sums, rows, shard.total, flags, statistics, state)


@triton.jit(do_not_specialize=["rows_at_most", "first"])
def _forward_kernel(
    h,
    w,
    bias,
    ids,
    temperature,
    count,
    parts,
    weights,
    offset,
    only,
    h_stride,
    w_stride,
    width,
    scale,
    softcap,
    rows_at_most,
    first,
    columns,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    KEPT: tl.constexpr,
    KEEPS_WEIGHTS: tl.constexpr,
    ONLY_WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    BULK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PANEL: tl.constexpr,
):
    rows = tl.load(count)
    blocks = tl.cdiv(rows, ROWS)
    groups = tl.cdiv(columns, COLUMNS * TILES)
    last = first + columns
    for item in range(tl.program_id(0), blocks * groups, tl.num_programs(0)):
        block, group = block_and_group(item, blocks, groups, PANEL)
        start = first + group * COLUMNS * TILES
        stop = tl.minimum(start + COLUMNS * TILES, last)
        if ONLY_WEIGHTS:
            stop = tl.where(tl.load(only + block) != 0, stop, start)
        r, is_row, own, heat = rows_of_block(block * ROWS, rows, ids, temperature, ROWS, HAS_TEMPERATURE)
        sums = no_sums(ROWS)
        for tile in range(tl.cdiv(stop - start, COLUMNS)):
            column = start + tile * COLUMNS
            halves = products(
                h, h_stride, w, w_stride, width, block * ROWS, rows, column, last, ROWS, COLUMNS, DEPTH, BULK
            )
            for i in tl.static_range(2):
                inside = (group * TILES + tile) * COLUMNS + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
                c = first + inside
                z, slope = finished(
                    halves[i], c, last, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
                )
                is_target = c[None, :] == own[:, None]
                if not ONLY_WEIGHTS:
                    before = tl.minimum(column + i * (COLUMNS // 2), last) - start
                    sums = absorbed(z, (c < last)[None, :], is_target, before, sums, ENTROPY, SQUARE, TOTAL)
                if KEEPS_WEIGHTS:
                    e = tl.exp(z - tl.load(offset + r, mask=is_row, other=0.0)[:, None])
                    if HAS_SOFTCAP:
                        e *= slope / scale
                    out = weights + r.to(tl.int64)[:, None] * columns + inside[None, :]
                    tl.store(out, tl.where(is_target, 0.0, e), mask=is_row[:, None] & (inside < columns)[None, :])
        if not ONLY_WEIGHTS:
            n = tl.zeros([], tl.int64) + rows_at_most
            counted = tl.zeros([ROWS], tl.float32) + (stop - start)
            store(parts + group * (KEPT * n) + r, n, is_row, sums + (counted,), KEPT)  # noqa: RUF005


@triton.jit(do_not_specialize=["tokens", "groups"])
def _merge_kernel(parts, sums, count, tokens, groups, KEPT: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.load(count)
    if tl.program_id(0) * ROWS < rows:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        n = tl.zeros([], tl.int64) + tokens
        zero = tl.zeros([ROWS], tl.float32)
        total = no_sums(ROWS) + (zero,)  # noqa: RUF005
        for group in range(groups):
            part = loaded(parts + group * (KEPT * n) + r, n, is_row, KEPT) + (zero, zero, zero, zero)  # noqa: RUF005
            total = joined(total, part[0:7])
        store(sums + r, n, is_row, total, 7)


@triton.jit(do_not_specialize=["tokens", "vocabulary"])
def _close_kernel(
    sums,
    positions,
    count,
    statistics,
    state,
    tokens,
    vocabulary,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.load(count)
    if tl.program_id(0) * ROWS < rows:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        n = tl.zeros([], tl.int64) + tokens
        found = closed(loaded(sums + r, n, is_row, 6), vocabulary, ENTROPY, SQUARE, TOTAL)
        p = tl.load(positions + r, mask=is_row, other=0)
        store(state + p, n, is_row, found[0:5], 5)
        store(statistics + p, n, is_row, found[5:10], 5)
