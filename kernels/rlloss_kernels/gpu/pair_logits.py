"""Per-token divergences between two tensors of logits and their gradient: one program per row.

The mixture of Jensen and Shannon's divergence wants both normalisers first, and so a second sweep over the rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import loaded, store
from rlloss_kernels.gpu.pair import (
    Kept,
    Terms,
    absorbed_pair,
    coefficients,
    complete,
    merged_sums,
    mixture_distances,
    no_pair_sums,
    pair_logit_gradient,
)
from rlloss_kernels.gpu.rows import Matrix, check_ids, flat, logits_at, row_at
from rlloss_kernels.pair import PAIR_SUMS, Orders, PairState
from rlloss_kernels.shards import Shard, gathered

BLOCK = 4096  # columns at a time
CHUNK = 32768  # columns of a program in the backward pass, which has enough to do where rows are few


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    shard: Shard,
    wanted: Sequence[bool],
    orders: Orders,
    found: Tensor,
    state: Tensor,
) -> None:
    """Fills in `found` [8, N] and PairState [6, N] of rows inside `loss_mask`."""
    tokens, device = found.shape[1], logits.device
    if not tokens:
        return
    own, ref = Matrix.of(logits), Matrix.of(ref_logits)
    valid = torch.ones((), dtype=torch.int32, device=device)

    def sweep(out: Tensor, kept: PairState | None) -> Tensor:
        _forward_kernel[(tokens,)](
            *own.operands,
            *ref.operands,
            flat(ids, valid),
            flat(loss_mask, valid),
            flat(temperature, out),
            out if kept is None else kept.lse,
            out if kept is None else kept.ref_lse,
            out,
            valid,
            *own.strides,
            *ref.strides,
            tokens,
            columns,
            shard.first,
            shard.total,
            *orders,
            own.has_place,
            ref.has_place,
            ids is not None,
            loss_mask is not None,
            temperature is not None,
            kept is not None,
            Kept.of(wanted),
            BLOCK,
            num_warps=8,
        )
        return out

    def distances(kept: PairState) -> Tensor:
        return sweep(torch.zeros((2, tokens), dtype=torch.float32, device=device), kept)

    sums = sweep(torch.zeros((len(PAIR_SUMS), tokens), dtype=torch.float32, device=device), None)
    if ids is not None:
        check_ids(valid, shard.total)
    if shard.is_part:
        number = torch.full((1,), tokens, dtype=torch.int32, device=device)
        sums = merged_sums(gathered(sums, shard.group), number)
    complete(sums, loss_mask, wanted, orders, distances, shard.group, found, state)


def backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    shard: Shard,
    wanted: Sequence[bool],
    orders: Orders,
) -> Tensor:
    """The gradient of the policy's logits for upstream gradients `grad` [8, N]."""
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tokens, width, own, ref = grad.shape[1], logits.shape[-1], Matrix.of(logits), Matrix.of(ref_logits)
    if not tokens:
        return result
    used = (grad != 0).any(0)
    if loss_mask is not None:
        used = used & loss_mask.flatten()
    chunks = triton.cdiv(width, CHUNK)
    _backward_kernel[(tokens * chunks,)](
        *own.operands,
        *ref.operands,
        flat(ids, state),
        flat(used, state),
        flat(temperature, state),
        coefficients(grad, state, temperature, wanted, orders),
        result,
        *own.strides,
        *ref.strides,
        tokens,
        columns,
        shard.first,
        width,
        chunks,
        *orders,
        own.has_place,
        ref.has_place,
        ids is not None,
        temperature is not None,
        Terms.of(wanted),
        BLOCK,
        CHUNK,
        num_warps=8,
    )
    return result


@triton.jit(do_not_specialize=["tokens", "first", "total"])
def _forward_kernel(
    logits,
    place,
    ref_logits,
    ref_place,
    ids,
    mask,
    temperature,
    lse,
    ref_lse,
    out,
    valid,
    stride,
    step,
    ref_stride,
    ref_step,
    tokens,
    columns,
    first,
    total,
    alpha,
    beta,
    HAS_PLACE: tl.constexpr,
    HAS_REF_PLACE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    IS_MIXTURE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    counts = True
    if HAS_MASK:
        counts = tl.load(mask + i) != 0
    if counts:
        own = -1
        if HAS_IDS:
            own = tl.load(ids + i)
            if (own < 0) | (own >= total):
                tl.store(valid, 0)
            own -= first
        row = row_at(logits, place, stride, i, HAS_PLACE)
        ref_row = row_at(ref_logits, ref_place, ref_stride, i, HAS_REF_PLACE)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        whole = columns // BLOCK * BLOCK
        at = i + tl.arange(0, 1)
        n = tl.zeros([], tl.int64) + tokens
        if IS_MIXTURE:
            mass, ref_mass = tl.load(lse + at), tl.load(ref_lse + at)
            own_part, ref_part = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
            for start in range(0, whole, BLOCK):
                c = start + tl.arange(0, BLOCK)[None, :]
                s = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, True)
                u = logits_at(ref_row, ref_step, c, columns, heat, HAS_TEMPERATURE, True)
                more, ref_more = mixture_distances(s, u, c >= 0, mass, ref_mass, beta)
                own_part += more
                ref_part += ref_more
            if whole < columns:
                c = whole + tl.arange(0, BLOCK)[None, :]
                s = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, False)
                u = logits_at(ref_row, ref_step, c, columns, heat, HAS_TEMPERATURE, False)
                more, ref_more = mixture_distances(s, u, c < columns, mass, ref_mass, beta)
                own_part += more
                ref_part += ref_more
            store(out + at, n, at >= 0, (own_part, ref_part), 2)
        else:
            sums = no_pair_sums(1)
            for start in range(0, whole, BLOCK):
                c = start + tl.arange(0, BLOCK)[None, :]
                s = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, True)
                u = logits_at(ref_row, ref_step, c, columns, heat, HAS_TEMPERATURE, True)
                sums = absorbed_pair(s, u, c >= 0, c == own, alpha, sums, KEPT)
            if whole < columns:
                c = whole + tl.arange(0, BLOCK)[None, :]
                s = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, False)
                u = logits_at(ref_row, ref_step, c, columns, heat, HAS_TEMPERATURE, False)
                sums = absorbed_pair(s, u, c < columns, c == own, alpha, sums, KEPT)
            store(out + at, n, at >= 0, sums, 12)


@triton.jit(do_not_specialize=["tokens", "first", "chunks"])
def _backward_kernel(
    logits,
    place,
    ref_logits,
    ref_place,
    ids,
    used,
    temperature,
    found,
    result,
    stride,
    step,
    ref_stride,
    ref_step,
    tokens,
    columns,
    first,
    width,
    chunks,
    alpha,
    beta,
    HAS_PLACE: tl.constexpr,
    HAS_REF_PLACE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) // chunks
    start_of_chunk = (tl.program_id(0) % chunks) * CHUNK
    last = tl.minimum(start_of_chunk + CHUNK, width)
    out = result + i * width
    if tl.load(used + i) != 0:
        own = -1
        if HAS_IDS:
            own = tl.load(ids + i) - first
        row = row_at(logits, place, stride, i, HAS_PLACE)
        ref_row = row_at(ref_logits, ref_place, ref_stride, i, HAS_REF_PLACE)
        heat = 1.0
        if HAS_TEMPERATURE:
            heat = tl.load(temperature + i)
        at = i + tl.arange(0, 1)
        numbers = loaded(found + at, tl.zeros([], tl.int64) + tokens, at >= 0, 10)
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            s = logits_at(row, step, c, columns, heat, HAS_TEMPERATURE, False)
            u = logits_at(ref_row, ref_step, c, columns, heat, HAS_TEMPERATURE, False)
            dz = pair_logit_gradient(s, u, c == own, alpha, beta, numbers, TERMS)
            tl.store(out + c, tl.where(c < columns, dz, 0.0), mask=c < last)
    else:
        for start in range(start_of_chunk, last, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            tl.store(out + c, tl.zeros([1, BLOCK], tl.float32), mask=c < last)
