"""Per-token statistics of hidden states under a head, and their gradients, without ever making the logits.

The backward pass makes each tile of logits again, from O(N) numbers per token, unless the forward pass could keep it
within `cache_bytes`. Under a frozen head there is nothing to make again: the gradient of a log-prob points along one
vector per token, which the forward pass sums up beside the statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, tokens_that_count
from rlloss_kernels.frozen import WeightedMean, frozen_backward
from rlloss_kernels.head import Head, Products
from rlloss_kernels.logits import no_statistics
from rlloss_kernels.plan import Plan
from rlloss_kernels.statistics import STATISTICS, OnlineSoftmax, State, gradient_rows
from rlloss_kernels.sums import GradientSums, for_every_tile
from rlloss_kernels.tile import without_autocast
from rlloss_kernels.workers import in_parallel, shares, worker_count

__all__ = ["linear_statistics"]

SCRATCH_BYTES = 64 << 20
_ALONG_ONE_VECTOR = ("logprobs", "logsumexp")


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocabulary: int | None = None,
    outputs: Sequence[str] = STATISTICS,
    scratch_bytes: int | None = None,
    cache_bytes: int = 0,
) -> Tensor:
    """Statistics `[5, N]` of logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature.

    With `hidden` [*tokens, H], and otherwise as `logits_statistics`.
    """
    trains = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    is_frozen = trains == [True, False, False] and set(outputs) <= set(_ALONG_ONE_VECTOR)
    wanted = [name in outputs for name in STATISTICS]
    numbers = (softcap, logit_scale, len(weight) if vocabulary is None else vocabulary)
    cache = 0 if is_frozen or not any(trains) else cache_bytes
    budgets = (SCRATCH_BYTES if scratch_bytes is None else scratch_bytes, cache)
    return _forward(hidden, weight, bias, ids, loss_mask, temperature, *numbers, wanted, is_frozen, *budgets)[0]


@torch.library.custom_op("rlloss_kernels::linear_forward", mutates_args=())
@without_autocast
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    vocabulary: int,
    wanted: list[bool],
    is_frozen: bool,
    scratch_bytes: int,
    cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics [5, N]; state [6, N], its last row the final offsets; what a frozen head or a cache keeps."""
    head = Head(weight, bias, softcap, logit_scale, vocabulary)
    tokens, rows = tokens_that_count(ids, loss_mask, temperature, vocabulary), Rows(hidden)
    plan = Plan.of(head, ids.numel(), len(tokens.positions), scratch_bytes)
    statistics, state = no_statistics(hidden, ids, 6)
    centres = head.rounds and not is_frozen  # a backward pass's products, for which it takes sum_p2
    direction, cached, offsets = kept = _kept(head, hidden, ids, is_frozen, plan.columns, cache_bytes)

    summed = [want or (name == "sum_p2" and centres) for name, want in zip(STATISTICS, wanted, strict=True)]

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        scratch = Scratch(hidden, head.dtype)
        for _, block in blocks:
            at = block.positions
            products = Products(head, rows.gather(block, head.operand_dtype), block.ids)
            softmax = OnlineSoftmax(block.ids, head.dtype, summed)
            mean = WeightedMean(head, products, scratch) if is_frozen else None
            for tile, (column, w) in enumerate(head.tiles(plan.columns, scratch)):
                raw = products.fresh(w, column, scratch)
                if tile < len(cached):
                    cached[tile, at, : len(w)] = raw
                    if products.offset is not None:
                        offsets[tile, at] = products.offset
                z = products.logits(raw, products.offset, column, scratch)
                slope = mean.slope(z) if mean is not None else None
                softmax.absorb(block.cool(z), scratch.tile("spare", *z.shape))
                if mean is not None:
                    mean.absorb(z, slope, w, softmax.growth)
            statistics[:, at], states = softmax.sums.close(vocabulary)
            state[:5, at] = states
            if products.offset is not None:
                _, log_mass, _, _, concentration = states
                state[5, at] = products.centre(log_mass + concentration.log(), block)
            if mean is not None:
                direction[at] = mean.direction(softmax.mass, State(*states), block).to(direction.dtype)

    in_parallel(work, shares(list(tokens.blocks(plan.rows)), worker_count(hidden.device)))
    return statistics * statistics.new_tensor(wanted)[:, None], state, *kept


@torch.library.custom_op("rlloss_kernels::linear_backward", mutates_args=())
@without_autocast
def _backward(
    grad: Tensor,
    state: Tensor,
    cached: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    vocabulary: int,
    scratch_bytes: int,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    head = Head(weight, bias, softcap, logit_scale, vocabulary)
    scratch = Scratch(hidden, head.dtype)
    tokens = tokens_that_count(ids, loss_mask, temperature, vocabulary, grad)
    positions = tokens.positions
    plan = Plan.of(head, ids.numel(), len(positions), scratch_bytes)
    at_tokens = state[:, positions]
    coefficients = gradient_rows(at_tokens[:5], grad[:, positions], vocabulary, logit_scale * tokens.factor)
    h = Rows(hidden).gather(tokens, head.operand_dtype)
    blocks = [(at, block, Products(head, h[at], block.ids, at_tokens[5, at])) for at, block in tokens.blocks(plan.rows)]
    sums = GradientSums(head, h, tokens.ids, plan.columns, len(blocks), needs, scratch)

    def work(tile: int, column: int, w: Tensor, share: Sequence, own: Scratch) -> None:
        for number, (at, block, products) in share:
            if tile < len(cached):
                raw = own.tile("raw", len(block.positions), len(w), dtype=cached.dtype)
                torch.index_select(cached[tile, :, : len(w)], 0, block.positions, out=raw)
                offset = offsets[tile, block.positions] if head.rounds else None
            else:
                raw, offset = products.fresh(w, column, own), products.offset
            z = products.logits(raw, offset, column, own)
            slope = None if softcap is None else head.slope(z, own.tile("slope", *z.shape))
            coefficients.rows(at).overwrite(block.cool(z), column, block.ids, own.tile("spare", *z.shape))
            sums.rows(z if slope is None else z.mul_(slope), column, w, at, number, own)

    for_every_tile(head, plan.columns, scratch, blocks, work, sums)
    return sums.gradients(positions, hidden)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, softcap, logit_scale, vocabulary, _, is_frozen, scratch_bytes, cache_bytes = args
    head = Head(weight, bias, softcap, logit_scale, vocabulary)
    columns = Plan.of(head, ids.numel(), 0, scratch_bytes).columns
    return *no_statistics(hidden, ids, 6), *_kept(head, hidden, ids, is_frozen, columns, cache_bytes)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, cached: Tensor, offsets: Tensor, *args: Any) -> list[Tensor]:
    needs = args[-1]
    return [x.new_empty(x.shape) for x, needed in zip(args[:3], needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, temperature, *numbers, _, ctx.is_frozen, ctx.scratch_bytes, _ = inputs
    _, state, direction, *cache = output
    ctx.numbers, ctx.shape = numbers, hidden.shape
    if ctx.is_frozen:
        ctx.save_for_backward(state, direction, weight, ids, mask, temperature)
    else:
        ctx.save_for_backward(state, *cache, hidden, weight, bias, ids, mask, temperature)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if ctx.is_frozen:
        results = iter([frozen_backward(grad, *ctx.saved_tensors, *ctx.numbers).view(ctx.shape)])
    else:
        results = iter(_backward(grad, *ctx.saved_tensors, *ctx.numbers, ctx.scratch_bytes, needs))
    return *(next(results) if needed else None for needed in needs), *[None] * 10


_forward.register_autograd(_autograd, setup_context=_save)


def _kept(
    head: Head, hidden: Tensor, ids: Tensor, is_frozen: bool, columns: int, cache_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the direction [N, H] of a frozen head, and for raw tiles [tiles, N, columns] with their offsets."""
    count, dtype = ids.numel(), head.operand_dtype if head.rounds else head.dtype
    direction = hidden.new_empty((count if is_frozen else 0, hidden.shape[-1]))
    if not cache_bytes:
        return direction, hidden.new_empty((0, 0, 0), dtype=dtype), hidden.new_empty((0, 0), dtype=head.dtype)
    tiles = min(-(-head.vocabulary // columns), cache_bytes // max(count * columns * dtype.itemsize, 1))
    cached = hidden.new_empty((tiles, count, columns), dtype=dtype)
    return direction, cached, hidden.new_empty((tiles, count), dtype=head.dtype)
