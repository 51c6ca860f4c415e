"""Per-token statistics of logits, and their gradient, a few rows at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.implementation import implementation
from rlloss_kernels.plan import rows_of_block
from rlloss_kernels.shards import Shard, gathered
from rlloss_kernels.statistics import STATISTICS, OnlineSoftmax, Sums, gradient_rows
from rlloss_kernels.tile import undisturbed
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
    impl: str = "auto",
    shard: tuple[int, int, str] | None = None,
) -> Tensor:
    """Statistics `[5, N]` of the rows of `logits` [*tokens, V] / `temperature` [*tokens], scored against `ids`.

    In the order of STATISTICS, of which those that `outputs` does not name are not to be read; 0 for rows outside
    `loss_mask`. Columns from `vocabulary` on do not exist. With a `shard` the logits are its columns, and their
    gradient is this rank's own.
    """
    wanted = [name in outputs for name in STATISTICS]
    columns = logits.shape[-1] if vocabulary is None else vocabulary
    budget = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    options = (columns, *Shard.made(shard, columns), wanted, budget, impl)
    return _forward(logits, ids, loss_mask, temperature, *options)[0]


@torch.library.custom_op("rlloss_kernels::logits_forward", mutates_args=())
@undisturbed
def _forward(
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    scratch_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    (statistics, state), shard = no_statistics(logits, ids, 5), Shard(first, total, group)
    if implementation(impl, logits) == "triton":
        from rlloss_kernels.gpu import logits as gpu

        gpu.forward(logits, ids, loss_mask, temperature, columns, shard, flags(wanted), statistics, state)
        return statistics, state
    tokens = tokens_that_count(ids, loss_mask, temperature, total, first=first)
    found: dict[int, Sums] = {}

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        source = LogitTiles(logits, columns)
        for at, block in blocks:
            softmax = OnlineSoftmax(block.ids, source.dtype, wanted)
            for _, z in source.tiles(block):
                softmax.absorb(z, source.scratch.tile("spare", *z.shape))
            found[at.start] = softmax.sums

    in_parallel(work, _shares(tokens, logits, columns, scratch_bytes))
    if found:
        sums = Sums.joined([found[start] for start in sorted(found)])
        sums = sums.merged(gathered(sums.packed, group)) if shard.is_part else sums
        statistics[:, tokens.positions], state[:, tokens.positions] = sums.close(total)
    return statistics, state


@torch.library.custom_op("rlloss_kernels::logits_backward", mutates_args=())
@undisturbed
def _backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    scratch_bytes: int,
    impl: str,
) -> Tensor:
    if implementation(impl, logits) == "triton":
        from rlloss_kernels.gpu import logits as gpu

        shard = Shard(first, total, group)
        return gpu.backward(grad, state, logits, ids, loss_mask, temperature, columns, shard, flags(wanted))
    tokens = tokens_that_count(ids, loss_mask, temperature, total, grad, first=first)
    gradient = gradient_rows(state[:, tokens.positions], grad[:, tokens.positions], total, tokens.factor)
    d_logits = LogitGradient(logits, tokens, columns)

    def work(blocks: Sequence[tuple[slice, Tokens]]) -> None:
        source = LogitTiles(logits, columns)
        for at, block in blocks:
            for _, z in source.tiles(block, out=d_logits.memory(at, source.dtype)):
                gradient.rows(at).overwrite(z, 0, block.ids, source.scratch.tile("spare", *z.shape))
                d_logits.write(at, block, z)

    in_parallel(work, _shares(tokens, logits, columns, scratch_bytes))
    return d_logits.whole


@_forward.register_fake
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_statistics(logits, ids, 5)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ids, loss_mask, temperature, *ctx.options = inputs
    ctx.save_for_backward(output[1], logits, ids, loss_mask, temperature)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 10


_forward.register_autograd(_autograd, setup_context=_save)


class LogitTiles:
    """The rows of the logits in the dtype of their statistics, read into memory that one thread works in."""

    def __init__(self, logits: Tensor, columns: int):
        self.dtype, self.columns = statistics_dtype(logits.dtype), columns
        self.source, self.scratch = Rows(logits[..., :columns]), Scratch(logits, self.dtype)

    def tiles(
        self, block: Tokens, offset: Tensor | None = None, *, out: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The column at which each tile begins, and the tile, to be overwritten, in `out` if it is given.

        Here a single one, and none for a shard that holds nothing but padding.
        """
        if self.columns:
            z = self.scratch.tile("z", len(block.positions), self.columns) if out is None else out
            yield 0, block.cool(self.source.read(block, z))

    rounds, offset = False, None  # there are no products to be centred


class LogitGradient:
    """The gradient of the logits, 0 in rows and columns that nobody writes.

    Args:
        tokens: Those whose rows will be written, each once.
        columns: Those that will.
    """

    def __init__(self, logits: Tensor, tokens: Tokens, columns: int):
        size = logits.shape[-1]
        self.every = len(tokens.positions) * size == logits.numel() and columns == size
        self.whole = logits.new_empty(logits.shape) if self.every else logits.new_zeros(logits.shape)
        self.matrix = self.whole.view(-1, size)[:, :columns]

    def memory(self, at: slice, dtype: torch.dtype) -> Tensor | None:
        """The rows themselves, if a tile of this dtype can be made in them."""
        return self.matrix[at] if self.every and self.matrix.dtype is dtype else None

    def write(self, at: slice, block: Tokens, dz: Tensor) -> None:
        """Takes the gradient of a block, which are the rows `at` of the tokens, wherever it was made."""
        if not self.every:
            self.matrix[block.positions] = dz.to(self.matrix.dtype)
        elif dz.data_ptr() != self.matrix[at].data_ptr():
            self.matrix[at] = dz


def _shares(tokens: Tokens, logits: Tensor, columns: int, scratch_bytes: int) -> list[Sequence[tuple[slice, Tokens]]]:
    """Blocks of rows for each worker, two tiles of which fit into its share of the scratch."""
    of_row = 2 * max(columns, 1) * statistics_dtype(logits.dtype).itemsize
    rows = rows_of_block(len(tokens.positions), of_row, scratch_bytes, logits.device)
    return shares(list(tokens.blocks(rows)), worker_count(logits.device))


def flags(wanted: Sequence[bool]) -> tuple[bool, bool, bool]:
    """Whether the statistics that take sums of their own are wanted: entropy, sum_p2 and mean_logprob."""
    _, entropy, _, sum_p2, mean_logprob = wanted
    return entropy, sum_p2, mean_logprob


def no_statistics(like: Tensor, ids: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Zeros for the five statistics and the numbers of the state of every token."""
    count, dtype = ids.numel(), statistics_dtype(like.dtype)
    return like.new_zeros((5, count), dtype=dtype), like.new_zeros((states, count), dtype=dtype)
