"""The gradients of a head's inputs, summed tile by tile without the gradient of the logits ever being whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.head import Head, target_rows
from rlloss_kernels.shards import summed_
from rlloss_kernels.tile import Targets
from rlloss_kernels.workers import in_parallel, shares, worker_count


def add_product(total: Tensor, a: Tensor, b: Tensor, scratch: Scratch) -> None:
    """Adds a b to `total`, in the dtype of `total`."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(a, b, out=scratch.tile("narrow product", *total.shape, dtype=a.dtype))
        total.add_(scratch.tile("wide product", *total.shape, dtype=total.dtype).copy_(product))


class GradientSums:
    """The gradients of hidden, weight and bias, those of them that `needs` names.

    For a range of columns, workers first make the gradient of their rows' products and add up that of their hidden
    states; then, with the gradient of all rows at hand, each writes its part of the weight's gradient, once.

    What a row's target has of `dz` is by far its largest part. Where products are in low precision, it reaches the
    hidden state apart from them, in full.

    Args:
        ids: `[n]`, the targets.
        h: `[n, H]`, the rows with a gradient, in the dtype of products.
        columns: The widest range.
        blocks: How many blocks the rows come in.
        group: Over which hidden's gradient is summed, where other ranks hold other columns of the logits.
    """

    def __init__(
        self,
        head: Head,
        h: Tensor,
        ids: Tensor,
        columns: int,
        blocks: int,
        needs: Sequence[bool],
        scratch: Scratch,
        group: str = "",
    ):
        self.head, self.h, self.ids, self.group, weight = head, h, ids, group, head.weight
        to_hidden, to_weight, to_bias = needs
        self.d_hidden = h.new_zeros(h.shape, dtype=head.dtype) if to_hidden else None
        self.d_weight = weight.new_empty(weight.shape) if to_weight else None
        self.d_bias = weight.new_zeros(len(weight), dtype=head.dtype) if to_bias else None
        self.bias_parts = h.new_empty((blocks, columns), dtype=head.dtype) if to_bias else None
        self.of_target = h.new_zeros(len(h), dtype=head.dtype) if h.dtype is not head.dtype else None
        if self.d_weight is not None:
            self.d_weight[head.vocabulary if len(h) else 0 :] = 0
            self.dz = scratch.tile("dz", len(h), columns, dtype=head.operand_dtype).view(-1)

    def rows(self, dz: Tensor, column: int, w: Tensor, at: slice, block: int, scratch: Scratch) -> None:
        """Takes the gradient `dz` of the products of rows `at`, block number `block`, with `w` from `column` on."""
        if self.bias_parts is not None:
            self.bias_parts[block, : len(w)] = dz.sum(0)
        if self.d_weight is not None:
            low = self.dz[: len(self.h) * len(w)].view(len(self.h), len(w))[at].copy_(dz)
        else:
            low = dz if dz.dtype is w.dtype else scratch.tile("low", *dz.shape, dtype=w.dtype).copy_(dz)
        if self.d_hidden is None:
            return
        if self.of_target is None:
            add_product(self.d_hidden[at], low, w, scratch)
            return
        targets = Targets.of(self.ids[at], column, len(w))
        target = targets.read(dz)
        self.of_target[at] += target
        targets.write(low, 0.0)
        add_product(self.d_hidden[at], low, w, scratch)
        targets.write(low, target)

    def end(self, column: int, width: int) -> None:
        """Writes what the columns from `column` on have got, when all rows are there."""
        if self.d_bias is not None and self.bias_parts is not None:
            self.d_bias[column : column + width] = self.bias_parts[:, :width].sum(0)
        if self.d_weight is None or not len(self.h):
            return
        dz, d_w = self.dz[: len(self.h) * width].view(len(self.h), width), self.d_weight[column : column + width]

        def write(part: Sequence[int]) -> None:
            of = slice(part[0], part[-1] + 1)
            if d_w.dtype is dz.dtype:
                torch.mm(dz[:, of].t(), self.h, out=d_w[of])
            else:
                d_w[of] = torch.mm(dz[:, of].t(), self.h)

        in_parallel(write, shares(range(width), worker_count(dz.device)))

    def gradients(self, positions: Tensor, like: Tensor) -> list[Tensor]:
        """The gradients, that of hidden with its rows at their positions in the shape of `like`."""
        results = []
        if self.d_hidden is not None:
            if self.of_target is not None:
                parts = (x.split(256) for x in (self.d_hidden, self.of_target, self.ids))
                for d_h, of_target, ids in zip(*parts, strict=True):
                    d_h.addcmul_(of_target[:, None], target_rows(self.head.weight, ids).to(d_h.dtype))
            if self.group:
                summed_(self.d_hidden, self.group)
            whole = like.new_zeros(like.shape).view(-1, like.shape[-1])
            results.append(whole.index_copy_(0, positions, self.d_hidden.to(whole.dtype)).view(like.shape))
        if self.d_weight is not None:
            results.append(self.d_weight)
        if self.d_bias is not None:
            results.append(self.d_bias.to(self.head.weight.dtype))
        return results


def for_every_tile(
    head: Head, columns: int, scratch: Scratch, blocks: Sequence, work: Callable, sums: GradientSums
) -> None:
    """Calls `work(tile, column, w, share, scratch)` with each worker's blocks and memory, and ends every tile."""
    workers = shares(list(enumerate(blocks)), worker_count(head.weight.device))
    memories = [Scratch(head.weight, head.dtype) for _ in workers]
    for tile, (column, w) in enumerate(head.tiles(columns, scratch)):

        def one(i: int, at: tuple = (tile, column, w)) -> None:
            work(*at, workers[i], memories[i])

        in_parallel(one, range(len(workers)))
        sums.end(column, len(w))
