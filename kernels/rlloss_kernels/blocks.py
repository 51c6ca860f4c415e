"""Which rows a pass works on, a block at a time, and how their vectors are read without a copy of the whole."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of inputs of `dtype` are formed and returned."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Tokens(NamedTuple):
    """Tokens in order, and what belongs to each of them."""

    positions: Tensor  # into the flattened [*tokens]
    ids: Tensor
    temperature: Tensor | None

    def blocks(self, size: int) -> Iterator[tuple[slice, "Tokens"]]:
        """Consecutive tokens, `size` at a time."""
        for start in range(0, len(self.positions), size):
            rows = slice(start, start + size)
            temperature = None if self.temperature is None else self.temperature[rows]
            yield rows, Tokens(self.positions[rows], self.ids[rows], temperature)

    def cool(self, z: Tensor) -> Tensor:
        """Divides a tile of logits by the temperatures, in place."""
        return z if self.temperature is None else z.div_(self.temperature[:, None])

    def uncool(self, z: Tensor) -> Tensor:
        """Logits before the temperatures from those after, one per token."""
        return z if self.temperature is None else z * self.temperature

    @property
    def factor(self) -> Tensor | float:
        """The derivative of the logits after the temperature by those before."""
        return 1.0 if self.temperature is None else 1 / self.temperature


def tokens_that_count(
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    grad: Tensor | None = None,
    *,
    first: int = 0,
) -> Tokens:
    """The tokens inside `loss_mask` and, in the backward pass, with an upstream gradient [5, N] other than 0.

    Their ids are counted from `first` on, the first column of a shard, and may lie outside of it.
    """
    counts = torch.ones_like(ids, dtype=torch.bool).flatten() if loss_mask is None else loss_mask.flatten()
    if grad is not None:
        counts = counts & (grad != 0).any(0)
    positions = counts.nonzero().squeeze(1)
    ids = ids.flatten()[positions].long()
    if len(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"ids of tokens that count must lie in [0, {vocabulary}), got {low} to {high}; a position without a "
                "target, such as -100, needs loss_mask=False"
            )
    temperature = None if temperature is None else temperature.flatten()[positions]
    return Tokens(positions, ids - first if first else ids, temperature)


class Rows:
    """The vectors of x [*tokens, D] as rows of one strided matrix over x's own memory, whatever its strides."""

    def __init__(self, x: Tensor):
        *sizes, width = x.shape
        unit = math.gcd(*x.stride()[:-1]) or 1
        place = torch.zeros((), dtype=torch.long, device=x.device)
        for size, stride in zip(sizes, x.stride(), strict=False):
            place = place[..., None] + torch.arange(size, device=x.device) * (stride // unit)
        self.place = place.flatten()
        last = sum((size - 1) * stride // unit for size, stride in zip(sizes, x.stride(), strict=False))
        self.matrix = x.as_strided((last + 1 if x.numel() else 0, width), (unit, x.stride(-1)))

    def read(self, tokens: Tokens, out: Tensor) -> Tensor:
        """Copies the vectors of `tokens` into `out`, in its dtype."""
        source = self._view(tokens)
        if source is not None:
            return out.copy_(source)
        place = self.place[tokens.positions]
        if self.matrix.dtype is out.dtype:
            return torch.index_select(self.matrix, 0, place, out=out)
        return out.copy_(self.matrix.index_select(0, place))

    def gather(self, tokens: Tokens, dtype: torch.dtype) -> Tensor:
        """The vectors of `tokens` in `dtype`, to be read only: x's own memory where that can be."""
        source = self._view(tokens)
        return (self.matrix.index_select(0, self.place[tokens.positions]) if source is None else source).to(dtype)

    def _view(self, tokens: Tokens) -> Tensor | None:
        """The rows themselves where they follow each other; the question would make a GPU wait."""
        place = self.place[tokens.positions]
        if place.is_cuda or not len(place) or int(place[-1] - place[0]) != len(place) - 1:
            return None
        return self.matrix[int(place[0]) :][: len(place)]


class Scratch:
    """Tiles that are made once and used for every block: fresh memory costs a CPU more than an exp per element."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.like, self.dtype = like, dtype
        self.buffers: dict[str, Tensor] = {}
        self.others: dict[str, Scratch] = {}

    def tile(self, name: str, rows: int, columns: int, *, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous `[rows, columns]` tile; one name is one piece of memory."""
        size = rows * columns
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = self.like.new_empty(size, dtype=dtype or self.dtype)
        return self.buffers[name][:size].view(rows, columns)

    def nested(self, name: str) -> "Scratch":
        """Tiles of the same names for another purpose."""
        if name not in self.others:
            self.others[name] = Scratch(self.like, self.dtype)
        return self.others[name]
