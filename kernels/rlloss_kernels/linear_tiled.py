"""Statistics of hidden states under a head, and their gradients, in plain PyTorch: a tile of logits at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, tokens_that_count
from rlloss_kernels.frozen import WeightedMean
from rlloss_kernels.head import Head, Products
from rlloss_kernels.plan import Plan
from rlloss_kernels.shards import Shard, gathered
from rlloss_kernels.statistics import STATISTICS, OnlineSoftmax, State, Sums, gradient_rows
from rlloss_kernels.sums import GradientSums, for_every_tile
from rlloss_kernels.workers import in_parallel, shares, worker_count

SCRATCH_BYTES = 64 << 20


def plan_of(head: Head, count: int, active: int, scratch_bytes: int | None) -> Plan:
    """How `active` of `count` rows are cut."""
    return Plan.of(head, count, active, SCRATCH_BYTES if scratch_bytes is None else scratch_bytes)


def forward(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    wanted: Sequence[bool],
    scratch_bytes: int | None,
    statistics: Tensor,
    state: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fills in statistics [5, N], state [6, N] with the final offsets last, and what a frozen head or a cache keeps."""
    tokens, rows = tokens_that_count(ids, loss_mask, temperature, shard.total, first=shard.first), Rows(hidden)
    plan = plan_of(head, ids.numel(), len(tokens.positions), scratch_bytes)
    direction, cached, offsets = kept
    is_frozen = len(direction) > 0
    centres = head.rounds and not is_frozen  # a backward pass's products, for which it takes sum_p2
    summed = [want or (name == "sum_p2" and centres) for name, want in zip(STATISTICS, wanted, strict=True)]
    found: dict[int, Sums] = {}

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        scratch = Scratch(hidden, head.dtype)
        for rows_of_block, block in blocks:
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
            found[rows_of_block.start] = softmax.sums
            if products.offset is None and mean is None:
                continue
            _, states = softmax.sums.close(shard.total)
            if products.offset is not None:
                _, log_mass, _, _, concentration = states
                state[5, at] = products.centre(log_mass + concentration.log(), block)
            if mean is not None:
                direction[at] = mean.direction(softmax.mass, State(*states), block).to(direction.dtype)

    in_parallel(work, shares(list(tokens.blocks(plan.rows)), worker_count(hidden.device)))
    if found:
        sums = Sums.joined([found[start] for start in sorted(found)])
        sums = sums.merged(gathered(sums.packed, shard.group)) if shard.is_part else sums
        statistics[:, tokens.positions], state[:5, tokens.positions] = sums.close(shard.total)


def backward(
    grad: Tensor,
    state: Tensor,
    cached: Tensor,
    offsets: Tensor,
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    shard: Shard,
    scratch_bytes: int | None,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    scratch = Scratch(hidden, head.dtype)
    tokens = tokens_that_count(ids, loss_mask, temperature, shard.total, grad, first=shard.first)
    positions = tokens.positions
    plan = plan_of(head, ids.numel(), len(positions), scratch_bytes)
    at_tokens = state[:, positions]
    factor = head.logit_scale * tokens.factor
    coefficients = gradient_rows(at_tokens[:5], grad[:, positions], shard.total, factor)
    h = Rows(hidden).gather(tokens, head.operand_dtype)
    blocks = [(at, block, Products(head, h[at], block.ids, at_tokens[5, at])) for at, block in tokens.blocks(plan.rows)]
    sums = GradientSums(head, h, tokens.ids, plan.columns, len(blocks), needs, scratch, shard.group)

    def work(tile: int, column: int, w: Tensor, share: Sequence, own: Scratch) -> None:
        for number, (at, block, products) in share:
            if tile < len(cached):
                raw = own.tile("raw", len(block.positions), len(w), dtype=cached.dtype)
                torch.index_select(cached[tile, :, : len(w)], 0, block.positions, out=raw)
                offset = offsets[tile, block.positions] if head.rounds else None
            else:
                raw, offset = products.fresh(w, column, own), products.offset
            z = products.logits(raw, offset, column, own)
            slope = None if head.softcap is None else head.slope(z, own.tile("slope", *z.shape))
            coefficients.rows(at).overwrite(block.cool(z), column, block.ids, own.tile("spare", *z.shape))
            sums.rows(z if slope is None else z.mul_(slope), column, w, at, number, own)

    for_every_tile(head, plan.columns, scratch, blocks, work, sums)
    return sums.gradients(positions, hidden)
