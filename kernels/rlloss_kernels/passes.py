"""The passes of two models over the tiles of their logits, whatever these are made of."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.head import Head, Products
from rlloss_kernels.pair import DIVERGENCES, MixtureSums, Orders, PairGradient, PairState, PairSums
from rlloss_kernels.statistics import target_place

_TILES = 10  # of the logits' dtype that one block of rows may want at a time
KEPT = len(PairState._fields)


class LogitTiles:
    """Logits as the one tile of their rows."""

    def __init__(self, logits: Tensor, vocabulary: int):
        self.dtype, self.columns = statistics_dtype(logits.dtype), vocabulary
        self.source, self.scratch = Rows(logits[..., :vocabulary]), Scratch(logits, self.dtype)

    def tiles(self, block: Tokens, offset: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The column at which each tile begins, and the tile, to be overwritten."""
        z = self.source.read(block, self.scratch.tile("z", len(block.positions), self.columns))
        yield 0, block.cool(z)

    @property
    def offset(self) -> Tensor | None:
        """What the products of the last block were centred on."""
        return None


class HeadTiles:
    """The logits of a head, made a tile at a time."""

    def __init__(self, head: Head, hidden: Tensor, ids: Tensor | None, columns: int):
        self.head, self.dtype, self.columns, self.has_ids = head, head.dtype, columns, ids is not None
        self.rows, self.scratch = Rows(hidden), Scratch(hidden, head.dtype)

    def products(self, block: Tokens, offset: Tensor | None = None) -> Products:
        """Those of a block of rows; without `offset` they find theirs."""
        h = self.rows.gather(block, self.head.operand_dtype)
        return Products(self.head, h, block.ids if self.has_ids else None, self.scratch, offset)

    def tiles(self, block: Tokens, offset: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The column at which each tile begins, and the tile, to be overwritten."""
        self.latest = self.products(block, offset)
        for column, w in self.head.tiles(self.columns, self.scratch):
            yield column, self.tile(self.latest, block, column, w)

    def tile(self, products: Products, block: Tokens, column: int, w: Tensor) -> Tensor:
        """The logits of a block of rows at the columns of `w`."""
        return block.cool(products.logits(products.fresh(w, column), products.offset, column))

    @property
    def offset(self) -> Tensor | None:
        """What the products of the last block were centred on."""
        return self.latest.offset


def divergences_of_blocks(
    policy: LogitTiles | HeadTiles,
    reference: LogitTiles | HeadTiles,
    tokens: Tokens,
    found: Tensor,
    state: Tensor,
    wanted: Sequence[bool],
    orders: Orders,
    rows: int,
) -> None:
    """Fills in `found` [8, N] and `state` [8, N]: PairState, and the offsets of the products of both."""
    names = [name for name, want in zip(DIVERGENCES, wanted, strict=True) if want]
    scratch = Scratch(found, policy.dtype)
    for _, block in tokens.blocks(rows):
        sums = PairSums(len(block.positions), found, policy.dtype, names, orders)
        targets = torch.zeros(2, len(block.positions), dtype=policy.dtype, device=found.device)
        for (column, s), (_, u) in zip(policy.tiles(block), reference.tiles(block), strict=True):
            place, here = target_place(block.ids - column, s.shape[1])
            for target, z in zip(targets, (s, u), strict=True):
                target += torch.where(here, z.gather(1, place), 0).squeeze(1)
            sums.absorb(s, u, scratch)
        values, kept = sums.close()
        offsets = policy.offset, reference.offset
        if "js" in names:
            mixture = MixtureSums(kept, orders)
            tiles = (source.tiles(block, x) for source, x in zip((policy, reference), offsets, strict=True))
            for (_, s), (_, u) in zip(*tiles, strict=True):
                mixture.absorb(s, u, scratch)
            values["js"], kept = mixture.close()
        values |= {"logprobs": targets[0] - kept.lse, "ref_logprobs": targets[1] - kept.ref_lse}
        for i, value in enumerate((*kept, *offsets)):
            if value is not None:
                state[i, block.positions] = value
        for i, name in enumerate(DIVERGENCES):
            if wanted[i]:
                found[i, block.positions] = values[name]


def pair_gradient(state: Tensor, grad: Tensor, wanted: Sequence[bool], orders: Orders) -> PairGradient:
    """The gradient of the rows with this state and these upstream gradients."""
    used = {name: g for name, g, want in zip(DIVERGENCES, grad, wanted, strict=True) if want}
    return PairGradient(PairState(*state[:KEPT]), used, orders)


def finished(dz: Tensor, gradient: PairGradient, block: Tokens, column: int) -> Tensor:
    """With what the target's log-prob adds, and the temperature's factor."""
    if "logprobs" in gradient.grad:
        place, here = target_place(block.ids - column, dz.shape[1])
        dz.scatter_add_(1, place, torch.where(here, gradient.grad["logprobs"][:, None], 0))
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


def rows_of_a_block(columns: int, dtype: torch.dtype, scratch_bytes: int) -> int:
    """How many rows a block has."""
    return max(1, scratch_bytes // (_TILES * columns * dtype.itemsize))
