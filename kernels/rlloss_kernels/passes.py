"""The passes of two models over the tiles of their logits, whatever these are made of."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.head import Head, Products
from rlloss_kernels.logits import LogitTiles
from rlloss_kernels.pair import (
    DIVERGENCES,
    Orders,
    PairState,
    PairSums,
    RunningSums,
    completed,
    merged_sums,
    mixture_distances,
)
from rlloss_kernels.shards import Shard, gathered
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

    def centre(self, sums: PairSums, means: RunningSums, block: Tokens) -> Tensor | None:
        """The offsets for a backward pass over the last block, where anything is to be centred."""
        if self.latest.offset is None:
            return None
        if sums.beside and means is sums.reference:
            return self.latest.centre_at(sums.policy.mean_beside, block)
        return self.latest.centre(means.typical, block)


def divergences_of_blocks(
    sources: Callable[[], Sequence[LogitTiles | HeadTiles]],
    tokens: Tokens,
    rows: int,
    found: Tensor,
    state: Tensor,
    wanted: Sequence[bool],
    orders: Orders,
    group: str,
) -> None:
    """Fills in `found` [8, N] and `state` [8, N]: PairState, and the offsets of the products of both.

    Args:
        sources: Makes the policy's and the reference's tiles, of which each worker has its own.
        rows: Of a block.
        group: Whose other ranks hold other columns of the logits.
    """
    blocks = list(tokens.blocks(rows))
    if not blocks:
        return
    parts = shares(blocks, worker_count(found.device))
    names = [name for name, want in zip(DIVERGENCES, wanted, strict=True) if want]
    found_sums: dict[int, Tensor] = {}
    offsets: dict[int, list[Tensor | None]] = {}

    def sum_up(share: Sequence[tuple[slice, Tokens]]) -> None:
        both, scratch = sources(), Scratch(found, found.dtype)
        for at, block in share:
            sums, centres = _sums(both, block, names, orders, found, scratch)
            found_sums[at.start], offsets[at.start] = sums.packed, [source.offset for source in both]
            for i, centre in enumerate(centres):
                if centre is not None:
                    state[KEPT + i, block.positions] = centre

    def distances(kept: PairState) -> Tensor:
        found_distances = found.new_zeros((2, len(tokens.positions)))

        def measure(share: Sequence[tuple[slice, Tokens]]) -> None:
            both, scratch = sources(), Scratch(found, found.dtype)
            for at, block in share:
                own = PairState(*(x[at] for x in kept))
                tiles = (source.tiles(block, x) for source, x in zip(both, offsets[at.start], strict=True))
                for (_, s), (_, u) in zip(*tiles, strict=True):
                    found_distances[:, at] += mixture_distances(s, u, own, orders, scratch)

        in_parallel(measure, parts)
        return found_distances

    in_parallel(sum_up, parts)
    sums = torch.cat([found_sums[at.start] for at, _ in blocks], 1)
    sums = merged_sums(gathered(sums, group)) if group else sums
    values, kept = completed(sums, orders, wanted, distances, group)
    state[:KEPT, tokens.positions] = torch.stack(kept)
    for name, value in values.items():
        found[DIVERGENCES.index(name), tokens.positions] = value


def _sums(
    both: Sequence[LogitTiles | HeadTiles],
    block: Tokens,
    names: Sequence[str],
    orders: Orders,
    like: Tensor,
    scratch: Scratch,
) -> tuple[PairSums, list[Tensor | None]]:
    """The sums of a block of rows, and the offsets for a backward pass."""
    policy, reference = both
    sums = PairSums(len(block.positions), like, names, orders, [source.rounds for source in both])
    for (column, s), (_, u) in zip(policy.tiles(block), reference.tiles(block), strict=True):
        sums.absorb(s, u, Targets.of(block.ids, column, s.shape[1]), scratch)
    centres = [
        source.centre(sums, means, block) if isinstance(source, HeadTiles) else None
        for source, means in zip(both, (sums.policy, sums.reference), strict=True)
    ]
    return sums, centres


def pair_tokens(
    ids: Tensor | None, like: Tensor, mask: Tensor | None, temperature: Tensor | None, shard: Shard, grad: Any = None
) -> Tokens:
    """The tokens that count; without `ids` all have the first."""
    ids = first_ids(like) if ids is None else ids
    return tokens_that_count(ids, mask, temperature, shard.total, grad, first=shard.first)


def first_ids(like: Tensor) -> Tensor:
    """The first token for every vector of `like` [*tokens, D]."""
    return torch.zeros(like.shape[:-1], dtype=torch.long, device=like.device)


def no_divergences(like: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the divergences and the state of every token."""
    count = math.prod(like.shape[:-1])
    dtype = statistics_dtype(like.dtype)
    return like.new_zeros((len(DIVERGENCES), count), dtype=dtype), like.new_zeros((KEPT + 2, count), dtype=dtype)
