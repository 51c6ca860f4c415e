"""Sums of products over tiles: the gradients of a head's inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.head import Head


def add_product(total: Tensor, a: Tensor, b: Tensor, scratch: Scratch) -> None:
    """Adds a b to `total`, in the dtype of `total`."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b, out=scratch.tile("partial", *total.shape, dtype=a.dtype)))


class GradientSums:
    """The gradients of hidden, weight and bias, those of them that `needs` names, from tiles of the logits' gradient.

    Tiles come by columns, and for each of those by `blocks` blocks of the `count` rows that have a gradient. What is
    summed over blocks is summed in the dtype of the logits and rounded once.
    """

    def __init__(self, head: Head, hidden: Tensor, count: int, blocks: int, needs: Sequence[bool], scratch: Scratch):
        self.head, self.hidden, self.scratch = head, hidden, scratch
        to_hidden, to_weight, to_bias = needs
        weight = head.weight
        self.d_hidden = hidden.new_zeros(count, hidden.shape[-1], dtype=head.dtype) if to_hidden else None
        self.d_weight = weight.new_empty(weight.shape) if to_weight else None
        self.d_bias = weight.new_zeros(len(weight), dtype=head.dtype) if to_bias else None
        self.once = blocks == 1 and weight.dtype is head.operand_dtype  # nothing to sum: written where it belongs
        if self.d_weight is not None:
            self.d_weight[head.vocabulary if blocks else 0 :] = 0

    def begin(self, column: int, w: Tensor) -> None:
        """Starts with the next columns."""
        self.columns = slice(column, column + len(w))
        self.d_w = None
        if self.d_weight is not None and not self.once:
            in_place = self.d_weight.dtype is self.head.dtype
            self.d_w = self.d_weight[self.columns] if in_place else self.scratch.tile("d_weight", *w.shape)
            self.d_w.zero_()

    def add(self, dz: Tensor, h: Tensor, w: Tensor, at: slice) -> None:
        """Adds a tile, the gradient of the products of rows `at` with these columns."""
        if self.d_bias is not None:
            self.d_bias[self.columns] += dz.sum(0)
        if dz.dtype is not w.dtype:
            dz = self.scratch.tile("low", *dz.shape, dtype=w.dtype).copy_(dz)
        if self.d_hidden is not None:
            add_product(self.d_hidden[at], dz, w, self.scratch)
        if self.d_w is not None:
            add_product(self.d_w, dz.t(), h, self.scratch)
        elif self.d_weight is not None:
            torch.mm(dz.t(), h, out=self.d_weight[self.columns])

    def end(self) -> None:
        """Rounds what these columns have got."""
        if self.d_weight is not None and self.d_w is not None and self.d_w.dtype is not self.d_weight.dtype:
            self.d_weight[self.columns] = self.d_w

    def gradients(self, positions: Tensor, shape: torch.Size) -> list[Tensor]:
        """The gradients, that of hidden with its rows at their positions in `[*tokens, H]`, `shape`."""
        results = []
        if self.d_hidden is not None:
            whole = self.hidden.new_zeros(shape).view(-1, shape[-1])
            results.append(whole.index_copy_(0, positions, self.d_hidden.to(whole.dtype)).view(shape))
        if self.d_weight is not None:
            results.append(self.d_weight)
        if self.d_bias is not None:
            results.append(self.d_bias.to(self.head.weight.dtype))
        return results
