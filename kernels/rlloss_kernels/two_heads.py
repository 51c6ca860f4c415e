"""Per-token divergences between two models from their hidden states and heads; nothing of size `[N, V]` is made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch
from rlloss_kernels.head import Head, Products
from rlloss_kernels.implementation import implementation
from rlloss_kernels.pair import DIVERGENCES, Orders, pair_gradient
from rlloss_kernels.passes import KEPT, TILES, HeadTiles, divergences_of_blocks, no_divergences, pair_tokens
from rlloss_kernels.plan import Plan
from rlloss_kernels.shards import Shard
from rlloss_kernels.sums import GradientSums, for_every_tile
from rlloss_kernels.tile import Targets, undisturbed

__all__ = ["linear_divergences"]

SCRATCH_BYTES = 128 << 20


def linear_divergences(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    softcaps: tuple[float | None, float | None] = (None, None),
    logit_scales: tuple[float, float] = (1.0, 1.0),
    vocabulary: int | None = None,
    outputs: Sequence[str] = DIVERGENCES,
    alpha: float = 0.5,
    beta: float = 0.5,
    scratch_bytes: int | None = None,
    impl: str = "auto",
    shard: tuple[int, int, str] | None = None,
) -> Tensor:
    """The same of two heads; softcaps and scales are the policy's and the reference's."""
    size = min(len(weight), len(ref_weight)) if vocabulary is None else vocabulary
    wanted = [name in outputs for name in DIVERGENCES]
    options = (*softcaps, *logit_scales, size, *Shard.made(shard, size), wanted, alpha, beta, scratch_bytes, impl)
    frozen = [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)]
    return _forward(hidden, weight, bias, *frozen, ids, loss_mask, temperature, *options)[0]


@torch.library.custom_op("rlloss_kernels::linear_pair_forward", mutates_args=())
@undisturbed
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ref_softcap: float | None,
    logit_scale: float,
    ref_logit_scale: float,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    (found, state), shard, orders = no_divergences(hidden), Shard(first, total, group), Orders(alpha, beta)
    head = Head(weight, bias, softcap, logit_scale, columns)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, columns)
    if implementation(impl, hidden) == "triton":
        from rlloss_kernels.gpu import pair_heads as gpu

        heads = (head, hidden, ref_head, ref_hidden)
        gpu.forward(*heads, ids, loss_mask, temperature, shard, wanted, orders, found, state[:KEPT])
        return found, state
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, shard)
    plan = _plan(head, found.shape[1], len(tokens.positions), scratch_bytes)

    def sources() -> list[HeadTiles]:
        return [HeadTiles(h, x, ids, plan.columns) for h, x in ((head, hidden), (ref_head, ref_hidden))]

    divergences_of_blocks(sources, tokens, plan.rows, found, state, wanted, orders, group)
    return found, state


@torch.library.custom_op("rlloss_kernels::linear_pair_backward", mutates_args=())
@undisturbed
def _backward(
    grad: Tensor,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    ref_softcap: float | None,
    logit_scale: float,
    ref_logit_scale: float,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int | None,
    impl: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    head = Head(weight, bias, softcap, logit_scale, columns)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, columns)
    heads, orders = (head, hidden, ref_head, ref_hidden), Orders(alpha, beta)
    tokens, shard = (ids, loss_mask, temperature), Shard(first, total, group)
    if implementation(impl, hidden) == "tiled":
        return _tiled_backward(grad, state, *heads, *tokens, shard, wanted, orders, scratch_bytes, needs)
    from rlloss_kernels.gpu import pair_gradient as gpu

    return gpu.backward(grad, state[:KEPT], *heads, *tokens, shard, wanted, orders, scratch_bytes, needs)


def _tiled_backward(
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
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, shard, grad)
    positions = tokens.positions
    plan = _plan(head, grad.shape[1], len(positions), scratch_bytes)
    at_tokens, scratch, factor = state[:, positions], Scratch(hidden, head.dtype), head.logit_scale * tokens.factor
    gradient = pair_gradient(at_tokens[:KEPT], grad[:, positions], wanted, orders, factor)
    h, ref_h = (Rows(x).gather(tokens, y.operand_dtype) for x, y in ((hidden, head), (ref_hidden, ref_head)))
    blocks = []
    for at, block in tokens.blocks(plan.rows):
        own = None if ids is None else block.ids
        ours = Products(head, h[at], own, at_tokens[KEPT, at])
        blocks.append((at, block, ours, Products(ref_head, ref_h[at], own, at_tokens[KEPT + 1, at])))
    sums = GradientSums(head, h, tokens.ids, plan.columns, len(blocks), needs, scratch, shard.group)

    def work(_: int, column: int, w: Tensor, share: Sequence, own: Scratch) -> None:
        ref_own = own.nested("reference")
        ref_w = ref_head.operand(column, len(w), ref_own)
        for number, (at, block, ours, theirs) in share:
            z = ours.logits(ours.fresh(w, column, own), ours.offset, column, own)
            slope = None if head.softcap is None else head.slope(z, own.tile("slope", *z.shape))
            u = block.cool(theirs.logits(theirs.fresh(ref_w, column, ref_own), theirs.offset, column, ref_own))
            targets = Targets.of(block.ids, column, len(w))
            dz = gradient.rows(at).overwrite(block.cool(z), u, targets, orders, own)
            sums.rows(dz if slope is None else dz.mul_(slope), column, w, at, number, own)

    for_every_tile(head, plan.columns, scratch, blocks, work, sums)
    return sums.gradients(positions, hidden)


def _plan(head: Head, count: int, active: int, scratch_bytes: int | None) -> Plan:
    return Plan.of(head, count, active, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, TILES)


@_forward.register_fake
def _(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_divergences(like)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(args[:3], args[-1], strict=True) if needed]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[9:]
    ctx.save_for_backward(output[1], *inputs[:9])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = iter(_backward(grad, *ctx.saved_tensors, *ctx.options, needs))
    return *(next(results) if needed else None for needed in needs), *[None] * 19


_forward.register_autograd(_autograd, setup_context=_save)
