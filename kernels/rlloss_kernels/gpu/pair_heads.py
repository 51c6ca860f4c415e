"""Divergences between two models from hidden states and heads: the logits of both stay in registers.

A persistent kernel makes both products of a tile and leaves, for every row and every group of columns, the sums of
`gpu.pair`. The mixture of Jensen and Shannon's divergence wants both normalisers first: the products are made again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import store
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.pair import Kept, absorbed_pair, complete, merged_sums, mixture_distances, no_pair_sums
from rlloss_kernels.gpu.products import block_and_group, finished, products, rows_of_block
from rlloss_kernels.gpu.rows import ActiveRows, active_rows, contiguous_rows
from rlloss_kernels.head import Head
from rlloss_kernels.pair import PAIR_SUMS, Orders, PairState
from rlloss_kernels.passes import first_ids
from rlloss_kernels.shards import Shard, gathered


def forward(
    head: Head,
    hidden: Tensor,
    ref_head: Head,
    ref_hidden: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    wanted: Sequence[bool],
    orders: Orders,
    found: Tensor,
    state: Tensor,
) -> None:
    """Fills in `found` [8, N] and PairState [6, N] of the tokens inside `loss_mask`."""
    ids = first_ids(hidden) if ids is None else ids
    if not ids.numel():
        return
    rows = active_rows(ids, loss_mask, temperature, shard.total, first=shard.first)
    h, ref_h = (contiguous_rows(x, rows, loss_mask is None) for x in (hidden, ref_hidden))
    operands, kept = Operands((head, h), (ref_head, ref_h)), Kept.of(wanted)

    def distances(of: PairState) -> Tensor:
        return merged_sums(_parts(operands, rows, orders, kept, of), rows.number, rows.positions)

    parts = _parts(operands, rows, orders, kept)
    if shard.is_part:
        parts = gathered(merged_sums(parts, rows.number), shard.group)
    sums = merged_sums(parts, rows.number, rows.positions)
    complete(sums, loss_mask, wanted, orders, distances, shard.group, found, state)


def _parts(operands: Operands, rows: ActiveRows, orders: Orders, kept: Kept, state: PairState | None = None) -> Tensor:
    """The sums [groups, 12, N] of every group of columns; with a state the distances [groups, 2, N] to the mixture."""
    columns, count = operands.heads[0].vocabulary, len(PAIR_SUMS) if state is None else 2
    groups = triton.cdiv(columns, operands.cut.group)
    parts = torch.empty((groups, count, operands.tokens), dtype=torch.float32, device=rows.ids.device)
    if not groups:  # of a shard that holds nothing but padding
        return parts
    _forward_kernel[operands.programs(groups)](
        *operands.matrices,
        *rows.operands,
        rows.positions,
        parts if state is None else state.lse,
        parts if state is None else state.ref_lse,
        parts,
        *operands.numbers,
        operands.tokens,
        columns,
        *orders,
        *operands.flags,
        rows.temperature is not None,
        state is not None,
        kept,
        operands.cut.tiles,
        **operands.constants,
    )
    return parts


@triton.jit(do_not_specialize=["rows_at_most", "columns"])
def _forward_kernel(
    h,
    w,
    bias,
    ref_h,
    ref_w,
    ref_bias,
    ids,
    temperature,
    count,
    positions,
    lse,
    ref_lse,
    parts,
    h_stride,
    w_stride,
    width,
    scale,
    softcap,
    ref_h_stride,
    ref_w_stride,
    ref_width,
    ref_scale,
    ref_softcap,
    rows_at_most,
    columns,
    alpha,
    beta,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_MIXTURE: tl.constexpr,
    KEPT: tl.constexpr,
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
    n = tl.zeros([], tl.int64) + rows_at_most
    for item in range(tl.program_id(0), blocks * groups, tl.num_programs(0)):
        block, group = block_and_group(item, blocks, groups, PANEL)
        row, start = block * ROWS, group * COLUMNS * TILES
        stop = tl.minimum(start + COLUMNS * TILES, columns)
        r, is_row, own, heat = rows_of_block(row, rows, ids, temperature, ROWS, HAS_TEMPERATURE)
        sums = no_pair_sums(ROWS)
        own_part, ref_part = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        mass, ref_mass = own_part, own_part
        if IS_MIXTURE:
            p = tl.load(positions + r, mask=is_row, other=0)
            mass, ref_mass = tl.load(lse + p, mask=is_row, other=0.0), tl.load(ref_lse + p, mask=is_row, other=0.0)
        for column in range(start, stop, COLUMNS):
            own_halves = products(
                h, h_stride, w, w_stride, width, row, rows, column, columns, ROWS, COLUMNS, DEPTH, BULK
            )
            ref_halves = products(
                ref_h, ref_h_stride, ref_w, ref_w_stride, ref_width, row, rows, column, columns,
                ROWS, COLUMNS, DEPTH, BULK,
            )  # fmt: skip
            for i in tl.static_range(2):
                c = column + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
                s, _ = finished(
                    own_halves[i], c, columns, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
                )
                u, _ = finished(
                    ref_halves[i], c, columns, ref_bias, ref_scale, ref_softcap, heat,
                    HAS_REF_BIAS, HAS_REF_SOFTCAP, HAS_TEMPERATURE,
                )  # fmt: skip
                is_column = (c < columns)[None, :]
                if IS_MIXTURE:
                    more, ref_more = mixture_distances(s, u, is_column, mass, ref_mass, beta)
                    own_part += more
                    ref_part += ref_more
                else:
                    sums = absorbed_pair(s, u, is_column, c[None, :] == own[:, None], alpha, sums, KEPT)
        if IS_MIXTURE:
            store(parts + group * (2 * n) + r, n, is_row, (own_part, ref_part), 2)
        else:
            store(parts + group * (12 * n) + r, n, is_row, sums, 12)
