"""A linear head, tile by tile: its products in float32 as exactly as the backend allows, and what follows them.

Some backends round every product of low-precision matrices to their dtype: on a CPU bfloat16 logits come out 2^-9 of
themselves wrong, up to 0.1 nats. There the products are *centred*: the matrix product starts from minus an offset per
row, near the largest logit, which its float32 accumulator holds before it rounds. What is left is 2^-9 of the distance
from that offset, which is small exactly where a probability is not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch, Tokens, statistics_dtype
from rlloss_kernels.tile import Targets

# a product this far above its offset is computed again: what stays below is rounded by at most 2^-10
_RISE = 0.5


class Head(NamedTuple):
    """logits = softcap tanh(logit_scale (h w^T + bias) / softcap), over the first `vocabulary` rows of `weight`."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    vocabulary: int

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return statistics_dtype(self.weight.dtype)

    @property
    def rounds(self) -> bool:
        """Whether products come out rounded to the dtype of the operands."""
        return self.weight.dtype is torch.bfloat16 and self.weight.device.type == "cpu"

    @property
    def operand_dtype(self) -> torch.dtype:
        """What matrices are multiplied in: their own dtype, or that of the logits where it would be slow or inexact."""
        unrounded = self.weight.is_cuda and self.weight.dtype is torch.bfloat16
        return self.weight.dtype if unrounded or self.rounds else self.dtype

    def tiles(self, columns: int, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        """The rows of the weight, `columns` at a time, each with the column of the logits at which it begins."""
        for column in range(0, self.vocabulary, columns):
            yield column, self.operand(column, min(columns, self.vocabulary - column), scratch)

    def operand(self, column: int, width: int, scratch: Scratch) -> Tensor:
        """The rows of the weight from `column` on, as matrices are multiplied."""
        w = self.weight[column : column + width]
        if w.dtype is self.operand_dtype:
            return w
        return scratch.tile("operand", *w.shape, dtype=self.operand_dtype).copy_(w)

    def finish(self, z: Tensor, column: int) -> Tensor:
        """Turns a tile of products into logits before the temperature, in place."""
        if self.bias is not None:
            z.add_(self.bias[column : column + z.shape[1]])
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z: Tensor, out: Tensor) -> Tensor:
        """The derivative of the softcap at logits `z`."""
        assert self.softcap is not None
        return torch.div(z, self.softcap, out=out).square_().neg_().add_(1)


class Products:
    """The products of a block of rows `h` with tiles of the head's weight, and the offsets they are centred on.

    Args:
        ids: Whose products are made in float32, and keep out of the offsets; None for no such column.
        offset: `[n]`, of a finished forward pass; without it the offsets follow the largest product so far.
    """

    def __init__(self, head: Head, h: Tensor, ids: Tensor | None, offset: Tensor | None = None):
        self.head, self.h, self.ids = head, h, ids
        self.follows = head.rounds and offset is None
        self.offset = _representable(offset, h.dtype) if head.rounds and offset is not None else None
        self.target = row_dots(h, head.weight, ids) if head.rounds and ids is not None else None

    def fresh(self, w: Tensor, column: int, scratch: Scratch) -> Tensor:
        """A tile of raw products `[n, k]`: minus their offsets, in the operands' dtype, where the head rounds."""
        shape = (len(self.h), len(w))
        if not self.head.rounds:
            z = scratch.tile("z", *shape)
            if self.h.dtype is z.dtype:
                return torch.mm(self.h, w.t(), out=z)
            return z.copy_(torch.mm(self.h, w.t(), out_dtype=z.dtype))
        raw = scratch.tile("raw", *shape, dtype=w.dtype)
        if self.offset is None:
            self._follow(torch.mm(self.h, w.t(), out=raw), column)
        assert self.offset is not None
        torch.addmm(_centre(self.offset, raw), self.h, w.t(), out=raw)
        if self.follows:
            rise = self._largest_other(raw, column)
            again = (rise > _RISE).nonzero().squeeze(1)
            if len(again):
                self.offset[again] = _representable(self.offset[again] + rise[again], w.dtype)
                raw[again] = torch.addmm(_centre(self.offset[again], raw), self.h[again], w.t())
        return raw

    def logits(self, raw: Tensor, offset: Tensor | None, column: int, scratch: Scratch) -> Tensor:
        """Logits before the temperature, in float32, from raw products and the offsets that they were made with."""
        z = raw
        if offset is not None:
            z = scratch.tile("z", *raw.shape).copy_(raw).add_(offset[:, None])
        if self.ids is not None and self.target is not None:
            Targets.of(self.ids, column, z.shape[1]).write(z, self.target)
        return self.head.finish(z, column)

    def centre(self, typical: Tensor, block: Tokens) -> Tensor:
        """The offsets for a backward pass, where an error of the probabilities weighs more than one of their sum.

        Those that weigh most lie between the largest and the mean one, whose logit is `typical` above the largest's.
        """
        assert self.offset is not None
        below = block.uncool(typical.nan_to_num(0.0, 0.0, 0.0)) / (2 * self.head.logit_scale)
        return _representable(self.offset + below, self.head.weight.dtype)

    def centre_at(self, logits: Tensor, block: Tokens) -> Tensor:
        """The offsets of the products that make these logits, but for their bias."""
        z, softcap = block.uncool(logits.nan_to_num(0.0, 0.0, 0.0)), self.head.softcap
        if softcap is not None:
            z = softcap * (z / softcap).clamp(-0.99, 0.99).atanh()
        return _representable(z / self.head.logit_scale, self.head.weight.dtype)

    def _follow(self, raw: Tensor, column: int) -> None:
        largest = self._largest_other(raw, column)
        self.offset = _representable(largest.nan_to_num(0.0, 0.0, 0.0), raw.dtype)

    def _largest_other(self, raw: Tensor, column: int) -> Tensor:
        if self.ids is not None:
            Targets.of(self.ids, column, raw.shape[1]).write(raw, -torch.inf)
        return raw.amax(1).float()


def target_rows(weight: Tensor, ids: Tensor) -> Tensor:
    """The rows of the targets, [n, H]; any row for a target that is none of them, which has no part in anything."""
    return weight[ids.clamp(0, len(weight) - 1)]


def row_dots(h: Tensor, weight: Tensor, ids: Tensor, rows: int = 256) -> Tensor:
    """The products of each row with its own row of the weight, in float32."""
    dots = [
        (x.float() * target_rows(weight, i).float()).sum(1) for x, i in zip(h.split(rows), ids.split(rows), strict=True)
    ]
    return torch.cat(dots) if dots else h.new_zeros(0, dtype=torch.float32)


def _centre(offset: Tensor, raw: Tensor) -> Tensor:
    """What the products of rows with these offsets start from, [n, k]."""
    return offset.neg().to(raw.dtype)[:, None].expand(-1, raw.shape[1])


def _representable(offset: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number that the operands' dtype holds, so that what is taken off is what is added again."""
    return offset.to(dtype).to(offset.dtype)
