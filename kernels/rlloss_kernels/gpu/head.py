"""Statistics of hidden states under a head: the logits stay in registers.

A persistent kernel leaves, for every row and every group of columns, the running sums of `gpu.softmax`; two small ones
merge them in the order of the columns and close them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import processors
from rlloss_kernels.gpu.products import block_and_group, finished, products
from rlloss_kernels.gpu.rows import ActiveRows, Matrix, active_rows, compacted
from rlloss_kernels.gpu.softmax import SUMS, absorbed, closed, joined, no_sums, sum_rows
from rlloss_kernels.gpu.tiling import bulk_loads, operand, tiling
from rlloss_kernels.head import Head
from rlloss_kernels.shards import Shard, gathered

Flags = tuple[bool, bool, bool]  # whether entropy, sum_p2 and mean_logprob are wanted
_ROWS = 128  # of a program that merges or closes


def contiguous_rows(hidden: Tensor, rows: ActiveRows, are_all: bool) -> Tensor:
    """The hidden states of the active rows [N, H]: the tensor itself where all are active and its rows are regular."""
    matrix, width = Matrix.of(hidden), hidden.shape[-1]
    if are_all and matrix.place is None and matrix.step == 1:
        return hidden.view(-1, width)
    return compacted(matrix, rows, width)


def head_sums(
    head: Head,
    h: Tensor,
    rows: ActiveRows,
    flags: Flags,
    *,
    first: int = 0,
    last: int | None = None,
    kept: "Weights | None" = None,
) -> Tensor:
    """The sums [7, N], in the order of SUMS, of the logits in columns `first` to `last`; 0 where not wanted.

    Args:
        h: `[N, H]`, of which the first `rows.number` are read.
        kept: What is to be written beside them.
    """
    parts = partial_sums(head, h, rows, flags, first, head.vocabulary if last is None else last, kept)
    return merged_sums(parts, rows.number)


class Weights(NamedTuple):
    """exp(z - offset) of every column but the target's, times the slope of a softcap, and where it has to be made."""

    values: Tensor  # [N, columns]
    offset: Tensor  # [N]
    only: Tensor | None = None  # of blocks of rows, those where it is other than 0; statistics then are left alone


def partial_sums(
    head: Head, h: Tensor, rows: ActiveRows, flags: Flags, first: int, last: int, kept: Weights | None
) -> Tensor:
    """The sums [groups, k, N] of every group of columns, of which the first k are kept."""
    cut = tiling(h)
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    groups, count = triton.cdiv(last - first, cut.group), len(h)
    parts = torch.empty((groups, sum_rows(*flags), count), dtype=torch.float32, device=h.device)
    if not count or not groups:
        return parts
    items = triton.cdiv(count, cut.rows) * groups
    bulk = bulk_loads(h, weight)
    _forward_kernel[(min(processors(h.device), items),)](
        operand(h, cut.rows, cut.depth, bulk),
        operand(weight, cut.columns // 2, cut.depth, bulk),
        weight if head.bias is None else head.bias,
        rows.ids,
        rows.ids if rows.temperature is None else rows.temperature,
        rows.number,
        parts,
        parts if kept is None else kept.values,
        parts if kept is None else kept.offset,
        parts if kept is None or kept.only is None else kept.only,
        h.stride(0),
        weight.stride(0),
        h.shape[1],
        count,
        first,
        last - first,
        float(head.logit_scale),
        0.0 if head.softcap is None else float(head.softcap),
        head.bias is not None,
        head.softcap is not None,
        rows.temperature is not None,
        *flags,
        kept is not None,
        kept is not None and kept.only is not None,
        bulk,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.tiles,
        cut.panel,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return parts


def merged_sums(parts: Tensor, count: Tensor) -> Tensor:
    """The sums [7, N] over all parts [groups, k, N], merged in their order; 0 for those that `parts` left out."""
    groups, kept, tokens = parts.shape
    sums = torch.zeros((len(SUMS), tokens), dtype=torch.float32, device=parts.device)
    if tokens:
        _merge_kernel[(triton.cdiv(tokens, _ROWS),)](
            parts, sums, count, tokens, groups, kept > 3, kept > 4, kept > 5, kept, _ROWS
        )
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
    h = contiguous_rows(hidden, rows, loss_mask is None)
    sums = head_sums(head, h, rows, flags)
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
    rows_at_most,
    first,
    columns,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    KEEPS_WEIGHTS: tl.constexpr,
    ONLY_WEIGHTS: tl.constexpr,
    BULK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
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
        r = block * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        own = tl.load(ids + r, mask=is_row, other=-1)
        heat = tl.full([ROWS], 1.0, tl.float32)
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + r, mask=is_row, other=1.0)
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
            shift, target, mass, moment, square, total = sums
            kept: tl.constexpr = 7 if TOTAL else 5 if SQUARE else 4 if ENTROPY else 3
            n = tl.zeros([], tl.int64) + rows_at_most
            out = parts + group * (kept * n) + r
            tl.store(out, shift, mask=is_row)
            tl.store(out + n, target, mask=is_row)
            tl.store(out + 2 * n, mass, mask=is_row)
            if kept > 3:
                tl.store(out + 3 * n, moment, mask=is_row)
            if kept > 4:
                tl.store(out + 4 * n, square, mask=is_row)
            if kept > 5:
                tl.store(out + 5 * n, total, mask=is_row)
                tl.store(out + 6 * n, tl.zeros([ROWS], tl.float32) + (stop - start), mask=is_row)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _merge_kernel(
    parts,
    sums,
    count,
    tokens,
    groups,
    MOMENT: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.load(count)
    if tl.program_id(0) * ROWS < rows:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        n = tl.zeros([], tl.int64) + tokens
        shift, target, mass, moment, square, total = no_sums(ROWS)
        columns = tl.zeros([ROWS], tl.float32)
        for group in range(groups):
            part = parts + group * (KEPT * n) + r
            moment_b, square_b, total_b, columns_b = columns * 0.0, columns * 0.0, columns * 0.0, columns * 0.0
            shift_b = tl.load(part, mask=is_row, other=0.0)
            target_b = tl.load(part + n, mask=is_row, other=0.0)
            mass_b = tl.load(part + 2 * n, mask=is_row, other=0.0)
            if MOMENT:
                moment_b = tl.load(part + 3 * n, mask=is_row, other=0.0)
            if SQUARE:
                square_b = tl.load(part + 4 * n, mask=is_row, other=0.0)
            if TOTAL:
                total_b = tl.load(part + 5 * n, mask=is_row, other=0.0)
                columns_b = tl.load(part + 6 * n, mask=is_row, other=0.0)
            shift, target, mass, moment, square, total, columns = joined(
                (shift, target, mass, moment, square, total, columns),
                (shift_b, target_b, mass_b, moment_b, square_b, total_b, columns_b),
            )
        tl.store(sums + r, shift, mask=is_row)
        tl.store(sums + n + r, target, mask=is_row)
        tl.store(sums + 2 * n + r, mass, mask=is_row)
        tl.store(sums + 3 * n + r, moment, mask=is_row)
        tl.store(sums + 4 * n + r, square, mask=is_row)
        tl.store(sums + 5 * n + r, total, mask=is_row)
        tl.store(sums + 6 * n + r, columns, mask=is_row)


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
        shift = tl.load(sums + r, mask=is_row, other=0.0)
        log_mass, x, spread, concentration, logp, entropy, logsumexp, sum_p2, mean_logprob = closed(
            shift,
            tl.load(sums + n + r, mask=is_row, other=0.0),
            tl.load(sums + 2 * n + r, mask=is_row, other=1.0),
            tl.load(sums + 3 * n + r, mask=is_row, other=0.0),
            tl.load(sums + 4 * n + r, mask=is_row, other=0.0),
            tl.load(sums + 5 * n + r, mask=is_row, other=0.0),
            vocabulary,
            ENTROPY,
            SQUARE,
            TOTAL,
        )
        p = tl.load(positions + r, mask=is_row, other=0)
        tl.store(state + p, shift, mask=is_row)
        tl.store(state + n + p, log_mass, mask=is_row)
        tl.store(state + 2 * n + p, x, mask=is_row)
        tl.store(state + 3 * n + p, spread, mask=is_row)
        tl.store(state + 4 * n + p, concentration, mask=is_row)
        tl.store(statistics + p, logp, mask=is_row)
        tl.store(statistics + n + p, entropy, mask=is_row)
        tl.store(statistics + 2 * n + p, logsumexp, mask=is_row)
        tl.store(statistics + 3 * n + p, sum_p2, mask=is_row)
        tl.store(statistics + 4 * n + p, mean_logprob, mask=is_row)
