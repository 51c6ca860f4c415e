"""Per-token divergences between two models from their hidden states and heads; nothing of size `[N, V]` is made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.head import Head
from rlloss_kernels.pair import DIVERGENCES, Orders
from rlloss_kernels.passes import (
    KEPT,
    HeadTiles,
    divergences_of_blocks,
    finished,
    no_divergences,
    pair_gradient,
    pair_tokens,
    rows_of_a_block,
)
from rlloss_kernels.sums import GradientSums

__all__ = ["linear_divergences"]

COLUMNS = 4096
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
    policy = HeadTiles(Head(weight, bias, softcap, logit_scale, vocabulary), hidden, ids, COLUMNS)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, vocabulary)
    reference = HeadTiles(ref_head, ref_hidden, ids, COLUMNS)
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, vocabulary)
    rows = rows_of_a_block(COLUMNS, policy.dtype, scratch_bytes)
    divergences_of_blocks(policy, reference, tokens, found, state, wanted, Orders(alpha, beta), rows)
    return found, state


@torch.library.custom_op("rlloss_kernels::linear_pair_backward", mutates_args=())
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
    policy = HeadTiles(head, hidden, ids, COLUMNS)
    ref_head = Head(ref_weight, ref_bias, ref_softcap, ref_logit_scale, vocabulary)
    reference = HeadTiles(ref_head, ref_hidden, ids, COLUMNS)
    scratch = Scratch(hidden, head.dtype)
    tokens = pair_tokens(ids, hidden, loss_mask, temperature, vocabulary, grad)
    at_tokens = state[:, tokens.positions]
    gradient = pair_gradient(at_tokens, grad[:, tokens.positions], wanted, Orders(alpha, beta))
    blocks = [
        (at, block, policy.products(block, at_tokens[KEPT, at]), reference.products(block, at_tokens[KEPT + 1, at]))
        for at, block in tokens.blocks(rows_of_a_block(COLUMNS, head.dtype, scratch_bytes))
    ]
    sums = GradientSums(head, hidden, len(tokens.positions), len(blocks), needs, scratch)
    tiles = zip(head.tiles(COLUMNS, policy.scratch), ref_head.tiles(COLUMNS, reference.scratch), strict=True)
    for (column, w), (_, ref_w) in tiles:
        sums.begin(column, w)
        for at, block, ours, theirs in blocks:
            z = ours.logits(ours.fresh(w, column), ours.offset, column)
            slope = None if softcap is None else head.slope(z, scratch.tile("slope", *z.shape))
            u = reference.tile(theirs, block, column, ref_w)
            part = gradient.rows(at)
            dz = finished(part.overwrite(block.cool(z), u, scratch), part, block, column).mul_(logit_scale)
            sums.add(dz if slope is None else dz.mul_(slope), ours.h, w, at)
        sums.end()
    return sums.gradients(tokens.positions, hidden.shape)


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
