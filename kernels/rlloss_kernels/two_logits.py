"""Per-token divergences between two tensors of logits, and their gradient by the first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch, Tokens
from rlloss_kernels.implementation import implementation
from rlloss_kernels.logits import LogitGradient, LogitTiles
from rlloss_kernels.pair import DIVERGENCES, Orders, pair_gradient
from rlloss_kernels.passes import KEPT, TILES, divergences_of_blocks, no_divergences, pair_tokens
from rlloss_kernels.plan import rows_of_block
from rlloss_kernels.shards import Shard
from rlloss_kernels.tile import Targets, undisturbed
from rlloss_kernels.workers import in_parallel, shares, worker_count

__all__ = ["logits_divergences"]

SCRATCH_BYTES = 32 << 20


def logits_divergences(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    vocabulary: int | None = None,
    outputs: Sequence[str] = DIVERGENCES,
    alpha: float = 0.5,
    beta: float = 0.5,
    scratch_bytes: int | None = None,
    impl: str = "auto",
    shard: tuple[int, int, str] | None = None,
) -> Tensor:
    """Divergences [8, N] between softmax(logits / temperature) and the same of `ref_logits`, both [*tokens, V].

    In the order of DIVERGENCES; 0 in rows outside `loss_mask` and for names not in `outputs`. With a `shard` both hold
    its columns.
    """
    size = min(logits.shape[-1], ref_logits.shape[-1]) if vocabulary is None else vocabulary
    numbers = (size, *Shard.made(shard, size), [name in outputs for name in DIVERGENCES], alpha, beta)
    budget = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    return _forward(logits, ref_logits.detach(), ids, loss_mask, temperature, *numbers, budget, impl)[0]


@torch.library.custom_op("rlloss_kernels::logits_pair_forward", mutates_args=())
@undisturbed
def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    (found, state), shard, orders = no_divergences(logits), Shard(first, total, group), Orders(alpha, beta)
    if implementation(impl, logits) == "triton":
        from rlloss_kernels.gpu import pair_logits as gpu

        gpu.forward(
            logits, ref_logits, ids, loss_mask, temperature, columns, shard, wanted, orders, found, state[:KEPT]
        )
        return found, state
    tokens = pair_tokens(ids, logits, loss_mask, temperature, shard)

    def sources() -> list[LogitTiles]:
        return [LogitTiles(x, columns) for x in (logits, ref_logits)]

    rows = _rows(tokens, found, columns, scratch_bytes)
    divergences_of_blocks(sources, tokens, rows, found, state, wanted, orders, group)
    return found, state


@torch.library.custom_op("rlloss_kernels::logits_pair_backward", mutates_args=())
@undisturbed
def _backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
    impl: str,
) -> Tensor:
    shard, orders = Shard(first, total, group), Orders(alpha, beta)
    if implementation(impl, logits) == "triton":
        from rlloss_kernels.gpu import pair_logits as gpu

        inputs = (logits, ref_logits, ids, loss_mask, temperature)
        return gpu.backward(grad, state[:KEPT], *inputs, columns, shard, wanted, orders)
    tokens = pair_tokens(ids, logits, loss_mask, temperature, shard, grad)
    positions = tokens.positions
    gradient = pair_gradient(state[:KEPT, positions], grad[:, positions], wanted, orders, tokens.factor)
    d_logits = LogitGradient(logits, tokens, columns)

    def work(share: Sequence[tuple[slice, Tokens]]) -> None:
        policy, reference = (LogitTiles(x, columns) for x in (logits, ref_logits))
        scratch = Scratch(logits, policy.dtype)
        for at, block in share:
            for (_, s), (_, u) in zip(policy.tiles(block), reference.tiles(block), strict=True):
                targets = Targets.of(block.ids, 0, columns)
                d_logits.write(at, block, gradient.rows(at).overwrite(s, u, targets, orders, scratch))

    blocks = list(tokens.blocks(_rows(tokens, state, columns, scratch_bytes)))
    in_parallel(work, shares(blocks, worker_count(logits.device)))
    return d_logits.whole


def _rows(tokens: Tokens, like: Tensor, columns: int, scratch_bytes: int) -> int:
    """How many rows' tiles fit into a worker's share of the scratch."""
    of_row = TILES * max(columns, 1) * like.dtype.itemsize
    return rows_of_block(len(tokens.positions), of_row, scratch_bytes, like.device)


@_forward.register_fake
def _(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_divergences(like)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(output[1], *inputs[:5])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 13


_forward.register_autograd(_autograd, setup_context=_save)
