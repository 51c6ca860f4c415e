"""The gradients of the policy's hidden states and head: the tiles of both models are made again."""

import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import processors
from rlloss_kernels.gpu.gradient import GradientProducts, columns_at_a_time
from rlloss_kernels.gpu.pair import Terms, coefficients, loaded, pair_logit_gradient
from rlloss_kernels.gpu.pair_heads import Models
from rlloss_kernels.gpu.products import block_and_group, finished, products
from rlloss_kernels.gpu.rows import ActiveRows, Matrix, active_rows, compacted
from rlloss_kernels.head import Head
from rlloss_kernels.pair import Orders
from rlloss_kernels.passes import first_ids
from rlloss_kernels.shards import Shard


def backward(
    grad: Tensor,
    state: Tensor,
    head: Head,
    hidden: Tensor,
    ref_head: Head,
    ref_hidden: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    wanted: list[bool],
    orders: Orders,
    scratch_bytes: int | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names, for upstream gradients [8, N]."""
    grad, ids = grad.contiguous(), first_ids(hidden) if ids is None else ids
    rows = active_rows(ids, loss_mask, temperature, shard.total, grad, first=shard.first)
    h, ref_h = (compacted(Matrix.of(x), rows, x.shape[-1]) for x in (hidden, ref_hidden))
    models, columns = Models.of(head, h, ref_head, ref_h), columns_at_a_time(head, len(h), scratch_bytes)
    sums = GradientProducts(head, h, rows, columns, needs, triton.cdiv(len(h), models.tiling.rows))
    found = coefficients(grad, state, temperature, wanted, orders)
    for column in range(0, head.vocabulary, columns):
        dz = sums.range(min(columns, head.vocabulary - column))
        if len(h):
            _launch(models, rows, found, orders, Terms.of(wanted), column, dz, sums)
        sums.end(column, dz)
    return sums.gradients(hidden, shard)


def _launch(
    models: Models,
    rows: ActiveRows,
    found: Tensor,
    orders: Orders,
    terms: Terms,
    column: int,
    dz: Tensor,
    sums: GradientProducts,
) -> None:
    cut, parts = models.tiling, sums.bias_parts
    items = triton.cdiv(len(dz), cut.rows) * triton.cdiv(dz.shape[1], cut.columns)
    _gradient_kernel[(min(processors(dz.device), items),)](
        *models.operands,
        rows.ids,
        rows.ids if rows.temperature is None else rows.temperature,
        rows.number,
        rows.positions,
        found,
        dz,
        sums.of_target,
        found if parts is None else parts,
        *models.numbers,
        len(dz),
        column,
        dz.shape[1],
        0 if parts is None else parts.stride(0),
        *orders,
        *models.flags,
        rows.temperature is not None,
        terms,
        parts is not None,
        models.bulk,
        cut.rows,
        cut.columns,
        cut.depth,
        cut.panel,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )


@triton.jit(do_not_specialize=["rows_at_most", "first", "bias_stride"])
def _gradient_kernel(
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
    found,
    dz,
    of_target,
    bias_parts,
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
    first,
    columns,
    bias_stride,
    alpha,
    beta,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_REF_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    TERMS: tl.constexpr,
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
    for item in range(tl.program_id(0), blocks * groups, tl.num_programs(0)):
        block, group = block_and_group(item, blocks, groups, PANEL)
        row, column = block * ROWS, first + group * COLUMNS
        own_halves = products(h, h_stride, w, w_stride, width, row, rows, column, last, ROWS, COLUMNS, DEPTH, BULK)
        ref_halves = products(
            ref_h, ref_h_stride, ref_w, ref_w_stride, ref_width, row, rows, column, last, ROWS, COLUMNS, DEPTH, BULK
        )
        r = row + tl.arange(0, ROWS)
        is_row = r < rows
        own = tl.load(ids + r, mask=is_row, other=-1)
        heat = tl.full([ROWS], 1.0, tl.float32)
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + r, mask=is_row, other=1.0)
        p = tl.load(positions + r, mask=is_row, other=0)
        for i in tl.static_range(2):
            numbers = loaded(found + p, tl.zeros([], tl.int64) + rows_at_most, is_row, 10)
            inside = group * COLUMNS + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            c = first + inside
            s, slope = finished(
                own_halves[i], c, last, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            u, _ = finished(
                ref_halves[i], c, last, ref_bias, ref_scale, ref_softcap, heat,
                HAS_REF_BIAS, HAS_REF_SOFTCAP, HAS_TEMPERATURE,
            )  # fmt: skip
            is_here = is_row[:, None] & (inside < columns)[None, :]
            is_target = (c[None, :] == own[:, None]) & is_here
            d = slope * pair_logit_gradient(s, u, is_target, alpha, beta, numbers, TERMS)
            if SUMS_COLUMNS:
                parts = bias_parts + (tl.zeros([], tl.int64) + block) * bias_stride + inside
                tl.store(parts, tl.sum(tl.where(is_here, d, 0.0), 0), mask=inside < columns)
            of_row, at = tl.sum(tl.where(is_target, d, 0.0), 1), own - (column + i * (COLUMNS // 2))
            tl.store(of_target + r, of_row, mask=is_row & (at >= 0) & (at < COLUMNS // 2) & (own < last))
            out = dz + r.to(tl.int64)[:, None] * columns + inside[None, :]
            tl.store(out, tl.where(is_target, 0.0, d), mask=is_here)
