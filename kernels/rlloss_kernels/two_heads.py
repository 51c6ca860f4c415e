"""Per-token divergences between two models from their hidden states and heads; nothing of size `[N, V]` is made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch
from rlloss_kernels.head import Head, Products
from rlloss_kernels.pair import DIVERGENCES, Orders
from rlloss_kernels.passes import (
    KEPT,
    TILES,
    HeadTiles,
    divergences_of_blocks,
    finished,
    no_divergences,
    pair_gradient,
    pair_tokens,
)
from rlloss_kernels.plan import Plan
from rlloss_kernels.sums import GradientSums, for_every_tile
from rlloss_kernels.tile import without_autocast

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
) -> Tensor:
    """The same of two heads; softcaps and scales are the policy's and the reference's."""
    size = min(len(weight), len(ref_weight)) if vocabulary is None else vocabulary
    numbers = (*softcaps, *logit_scales, size, [name in outputs for name in DIVERGENCES], alpha, beta)
    budget = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    frozen = [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)]
    return _forward(hidden, weight, bias, *frozen, ids, loss_mask, temperature, *numbers, budget)[0]


@torch.library.custom_op("rlloss_kernels::linear_pair_forward", mutates_args=())
@without_autocast
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
    vocabulary: int,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    found, state = no_divergences(hidden)
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, vocabulary)
    head = Head(weight, bias, softcap, logit_scale, vocabulary)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, vocabulary)
    plan = Plan.of(head, found.shape[1], len(tokens.positions), scratch_bytes, TILES)

    def sources() -> list[HeadTiles]:
        return [HeadTiles(h, x, ids, plan.columns) for h, x in ((head, hidden), (ref_head, ref_hidden))]

    divergences_of_blocks(sources, list(tokens.blocks(plan.rows)), found, state, wanted, Orders(alpha, beta))
    return found, state


@torch.library.custom_op("rlloss_kernels::linear_pair_backward", mutates_args=())
@without_autocast
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
    vocabulary: int,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    head = Head(weight, bias, softcap, logit_scale, vocabulary)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, vocabulary)
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, vocabulary, grad)
    plan = Plan.of(head, grad.shape[1], len(tokens.positions), scratch_bytes, TILES)
    at_tokens, scratch = state[:, tokens.positions], Scratch(hidden, head.dtype)
    gradient = pair_gradient(at_tokens, grad[:, tokens.positions], wanted, Orders(alpha, beta))
    h, ref_h = (Rows(x).gather(tokens, y.operand_dtype) for x, y in ((hidden, head), (ref_hidden, ref_head)))
    blocks = []
    for at, block in tokens.blocks(plan.rows):
        own = None if ids is None else block.ids
        ours = Products(head, h[at], own, at_tokens[KEPT, at])
        blocks.append((at, block, ours, Products(ref_head, ref_h[at], own, at_tokens[KEPT + 1, at])))
    sums = GradientSums(head, h, tokens.ids, plan.columns, len(blocks), needs, scratch)

    def work(_: int, column: int, w: Tensor, share: Sequence, own: Scratch) -> None:
        ref_own = own.nested("reference")
        ref_w = ref_head.operand(column, len(w), ref_own)
        for number, (at, block, ours, theirs) in share:
            z = ours.logits(ours.fresh(w, column, own), ours.offset, column, own)
            slope = None if softcap is None else head.slope(z, own.tile("slope", *z.shape))
            u = block.cool(theirs.logits(theirs.fresh(ref_w, column, ref_own), theirs.offset, column, ref_own))
            part = gradient.rows(at)
            dz = finished(part.overwrite(block.cool(z), u, own), part, block, column).mul_(logit_scale)
            sums.rows(dz if slope is None else dz.mul_(slope), column, w, at, number, own)

    for_every_tile(head, plan.columns, scratch, blocks, work, sums)
    return sums.gradients(tokens.positions, hidden)


@_forward.register_fake
def _(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_divergences(like)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, needed in zip(args[:3], args[-1], strict=True) if needed]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(output[1], *inputs[:9])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = iter(_backward(grad, *ctx.saved_tensors, *ctx.numbers, needs))
    return *(next(results) if needed else None for needed in needs), *[None] * 15


_forward.register_autograd(_autograd, setup_context=_save)
