"""The passes of two models over the tiles of their logits, whatever these are made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.head import Head, Products
from rlloss_kernels.logits import LogitTiles
from rlloss_kernels.pair import DIVERGENCES, MixtureSums, Orders, PairGradient, PairState, PairSums, RunningMeans
from rlloss_kernels.tile import Targets
from rlloss_kernels.workers import in_parallel, shares, worker_count

TILES = 7  # of the logits' dtype that one block of rows may want at a time
KEPT = len(PairState._fields)


class HeadTiles:
    """The logits of a head, made a tile at a time."""

    def __init__(self, head: Head, hidden: Tensor, ids: Tensor | None, columns: int):
        self.head, self.dtype, self.columns, self.has_ids = head, head.dtype, columns, ids is not None
        self.rows, self.scratch = Rows(hidden), Scratch(hidden, head.dtype)

    def tiles(self, block: Tokens, offset: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The column at which each tile begins, and the tile, to be overwritten; without `offset` products find it."""
        h = self.rows.gather(block, self.head.operand_dtype)
        self.latest = Products(self.head, h, block.ids if self.has_ids else None, offset)
        for column, w in self.head.tiles(self.columns, self.scratch):
            raw = self.latest.fresh(w, column, self.scratch)
            yield column, block.cool(self.latest.logits(raw, self.latest.offset, column, self.scratch))

    @property
    def offset(self) -> Tensor | None:
        """What the products of the last block were centred on."""
        return self.latest.offset

    @property
    def rounds(self) -> bool:
        """Whether there is anything to centre."""
        return self.head.rounds

    def centre(self, sums: PairSums, means: RunningMeans, block: Tokens) -> Tensor | None:
        """The offsets for a backward pass over the last block, where anything is to be centred."""
        if not self.rounds:
            return None
        if sums.beside and means is sums.reference:
            return self.latest.centre_at(sums.policy.mean_beside, block)
        return self.latest.centre(means.typical, block)


def divergences_of_blocks(
    sources: Callable[[], Sequence[LogitTiles | HeadTiles]],
    blocks: Sequence[tuple[slice, Tokens]],
    found: Tensor,
    state: Tensor,
    wanted: Sequence[bool],
    orders: Orders,
) -> None:
    """Fills in `found` [8, N] and `state` [8, N]: PairState, and the offsets of the products of both.

    Args:
        sources: Makes the policy's and the reference's tiles, of which each worker has its own.
    """
    names = [name for name, want in zip(DIVERGENCES, wanted, strict=True) if want]

    def work(share: Sequence[tuple[slice, Tokens]]) -> None:
        both, scratch = sources(), Scratch(found, found.dtype)
        for _, block in share:
            values, kept, centres = _divergences(both, block, names, orders, found, scratch)
            for i, value in enumerate((*kept, *centres)):
                if value is not None:
                    state[i, block.positions] = value
            for i, name in enumerate(DIVERGENCES):
                if wanted[i]:
                    found[i, block.positions] = values[name]

    in_parallel(work, shares(blocks, worker_count(found.device)))


def _divergences(
    both: Sequence[LogitTiles | HeadTiles],
    block: Tokens,
    names: Sequence[str],
    orders: Orders,
    like: Tensor,
    scratch: Scratch,
) -> tuple[dict[str, Tensor], PairState, list[Tensor | None]]:
    """All that is wanted of a block of rows, its state, and the offsets for a backward pass."""
    policy, reference = both
    sums = PairSums(len(block.positions), like, names, orders, [source.rounds for source in both])
    targets = like.new_zeros((2, len(block.positions)))
    for (column, s), (_, u) in zip(policy.tiles(block), reference.tiles(block), strict=True):
        of = Targets.of(block.ids, column, s.shape[1])
        for target, z in zip(targets, (s, u), strict=True):
            target += of.read(z)
        sums.absorb(s, u, scratch)
    values, kept = sums.close()
    centres = [
        source.centre(sums, means, block) if isinstance(source, HeadTiles) else None
        for source, means in zip(both, (sums.policy, sums.reference), strict=True)
    ]
    if "js" in names:
        mixture = MixtureSums(kept, orders)
        tiles = (source.tiles(block, source.offset) for source in both)
        for (_, s), (_, u) in zip(*tiles, strict=True):
            mixture.absorb(s, u, scratch)
        values["js"], kept = mixture.close()
    return values | {"logprobs": targets[0] - kept.lse, "ref_logprobs": targets[1] - kept.ref_lse}, kept, centres


def pair_gradient(state: Tensor, grad: Tensor, wanted: Sequence[bool], orders: Orders) -> PairGradient:
    """The gradient of the rows with this state and these upstream gradients."""
    used = {name: g for name, g, want in zip(DIVERGENCES, grad, wanted, strict=True) if want}
    return PairGradient(PairState(*state[:KEPT]), used, orders)


def finished(dz: Tensor, gradient: PairGradient, block: Tokens, column: int) -> Tensor:
    """With what the target's log-prob adds, and the temperature's factor."""
    if "logprobs" in gradient.grad:
        targets = Targets.of(block.ids, column, dz.shape[1])
        targets.write(dz, targets.read(dz) + gradient.grad["logprobs"])
    return block.cool(dz)


def pair_tokens(
    ids: Tensor | None, like: Tensor, mask: Tensor | None, temperature: Tensor | None, size: int, grad: Any = None
) -> Tokens:
    """The tokens that count; without `ids` all have the first."""
    ids = torch.zeros(like.shape[:-1], dtype=torch.long, device=like.device) if ids is None else ids
    return tokens_that_count(ids, mask, temperature, size, grad)


def no_divergences(like: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the divergences and the state of every token."""
    count = math.prod(like.shape[:-1])
    dtype = statistics_dtype(like.dtype)
    return like.new_zeros((len(DIVERGENCES), count), dtype=dtype), like.new_zeros((KEPT + 2, count), dtype=dtype)
