"""The gradients of the policy's hidden states and head: the tiles of both models are made again."""

import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import loaded
from rlloss_kernels.gpu.gradient_products import GradientProducts, store_gradient
from rlloss_kernels.gpu.operands import Operands
from rlloss_kernels.gpu.pair import Terms, coefficients, pair_logit_gradient
from rlloss_kernels.gpu.products import block_and_group, finished, products, rows_of_block
from rlloss_kernels.gpu.rows import active_rows, compacted
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
    operands = Operands((head, compacted(hidden, rows)), (ref_head, compacted(ref_hidden, rows)))
    sums = GradientProducts(operands, rows, scratch_bytes, needs)
    found = coefficients(grad, state, temperature, wanted, orders)
    for column, dz in sums.ranges():
        groups = triton.cdiv(dz.shape[1], operands.cut.columns)
        _gradient_kernel[operands.programs(groups)](
            *operands.matrices,
            *rows.operands,
            rows.positions,
            found,
            dz,
            *sums.outputs,
            *operands.numbers,
            *dz.shape,
            column,
            sums.columns,
            *orders,
            *operands.flags,
            rows.temperature is not None,
            Terms.of(wanted),
            sums.bias_parts is not None,
            **operands.constants,
        )
    return sums.gradients(hidden, shard)


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
    columns,
    first,
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
        r, is_row, own, heat = rows_of_block(row, rows, ids, temperature, ROWS, HAS_TEMPERATURE)
        place = own - first
        p = tl.load(positions + r, mask=is_row, other=0)
        for i in tl.static_range(2):
            numbers = loaded(found + p, tl.zeros([], tl.int64) + rows_at_most, is_row, 10)
            start = group * COLUMNS + i * (COLUMNS // 2)
            inside = start + tl.arange(0, COLUMNS // 2)
            c = first + inside
            s, slope = finished(
                own_halves[i], c, last, bias, scale, softcap, heat, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
            )
            u, _ = finished(
                ref_halves[i], c, last, ref_bias, ref_scale, ref_softcap, heat,
                HAS_REF_BIAS, HAS_REF_SOFTCAP, HAS_TEMPERATURE,
            )  # fmt: skip
            is_target = inside[None, :] == place[:, None]
            d = slope * pair_logit_gradient(s, u, is_target, alpha, beta, numbers, TERMS)
            parts = bias_parts + (tl.zeros([], tl.int64) + block) * bias_stride
            store_gradient(d, is_target, r, is_row, place, start, columns, dz, of_target, parts, SUMS_COLUMNS)
