"""Per-token statistics of logits, and their gradient, a few rows at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.statistics import STATISTICS, OnlineSoftmax, gradient_rows
from rlloss_kernels.workers import in_parallel, shares, worker_count

__all__ = ["logits_statistics"]

SCRATCH_BYTES = 16 << 20  # two tiles of this size stay in a CPU's last-level cache


def logits_statistics(
    logits: Tensor,
    ids: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    vocabulary: int | None = None,
    outputs: Sequence[str] = STATISTICS,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Statistics `[5, N]` of the rows of `logits` [*tokens, V] / `temperature` [*tokens], scored against `ids`.

    In the order of STATISTICS; 0 in rows outside `loss_mask` and for names not in `outputs`. Columns from `vocabulary`
    on do not exist.
    """
    wanted = [name in outputs for name in STATISTICS]
    size = logits.shape[-1] if vocabulary is None else vocabulary
    budget = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    return _forward(logits, ids, loss_mask, temperature, size, wanted, budget)[0]


@torch.library.custom_op("rlloss_kernels::logits_forward", mutates_args=())
def _forward(
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    wanted: list[bool],
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    statistics, state = no_statistics(logits, ids, 5)
    tokens = tokens_that_count(ids, loss_mask, temperature, vocabulary)

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        tiles = _Tiles(logits, vocabulary)
        for _, block in blocks:
            z, spare = tiles.read(block)
            softmax = OnlineSoftmax(block.ids, tiles.dtype, wanted)
            softmax.absorb(z, spare)
            statistics[:, block.positions], state[:, block.positions] = softmax.close()

    in_parallel(work, _shares(tokens, logits, vocabulary, scratch_bytes))
    return statistics, state


@torch.library.custom_op("rlloss_kernels::logits_backward", mutates_args=())
def _backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    scratch_bytes: int,
) -> Tensor:
    tokens = tokens_that_count(ids, loss_mask, temperature, vocabulary, grad)
    gradient = gradient_rows(state[:, tokens.positions], grad[:, tokens.positions], vocabulary, tokens.factor)
    every = len(tokens.positions) == ids.numel() and vocabulary == logits.shape[-1]
    result = logits.new_empty(logits.shape) if every else logits.new_zeros(logits.shape)
    matrix = result.view(-1, logits.shape[-1])[:, :vocabulary]

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        tiles = _Tiles(logits, vocabulary)
        for at, block in blocks:
            in_place = every and matrix.dtype is tiles.dtype
            z, spare = tiles.read(block, matrix[at] if in_place else None)
            gradient.rows(at).overwrite(z, 0, block.ids, spare)
            if every and not in_place:
                matrix[at] = z
            elif not every:
                matrix[block.positions] = z.to(matrix.dtype)

    in_parallel(work, _shares(tokens, logits, vocabulary, scratch_bytes))
    return result


@_forward.register_fake
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_statistics(logits, ids, 5)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ids, loss_mask, temperature, ctx.vocabulary, _, ctx.scratch_bytes = inputs
    ctx.save_for_backward(output[1], logits, ids, loss_mask, temperature)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.vocabulary, ctx.scratch_bytes), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_save)


class _Tiles:
    """The rows of the logits in the dtype of their statistics, read into memory that one thread works in."""

    def __init__(self, logits: Tensor, vocabulary: int):
        self.dtype, self.vocabulary = statistics_dtype(logits.dtype), vocabulary
        self.source = Rows(logits[..., :vocabulary])
        self.scratch = Scratch(logits, self.dtype)

    def read(self, block: Tokens, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows, in `out` if it is given, and memory of the same shape."""
        shape = (len(block.positions), self.vocabulary)
        z = self.source.read(block, self.scratch.tile("z", *shape) if out is None else out)
        return block.cool(z), self.scratch.tile("spare", *shape)


def _shares(
    tokens: Tokens, logits: Tensor, vocabulary: int, scratch_bytes: int
) -> list[Sequence[tuple[slice, Tokens]]]:
    """Blocks of rows for each worker, as long as two tiles of theirs fit into its share of the scratch."""
    workers = worker_count(logits.device)
    rows = scratch_bytes // (2 * workers * vocabulary * statistics_dtype(logits.dtype).itemsize)
    return shares(list(tokens.blocks(max(1, min(rows, -(-len(tokens.positions) // workers))))), workers)


def no_statistics(like: Tensor, ids: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Zeros for the five statistics and the numbers of the state of every token."""
    count, dtype = ids.numel(), statistics_dtype(like.dtype)
    return like.new_zeros((5, count), dtype=dtype), like.new_zeros((states, count), dtype=dtype)
