"""Per-token divergences between two tensors of logits, and their gradient by the first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch, Tokens
from rlloss_kernels.logits import LogitGradient, LogitTiles
from rlloss_kernels.pair import DIVERGENCES, Orders
from rlloss_kernels.passes import (
    TILES,
    divergences_of_blocks,
    finished,
    no_divergences,
    pair_gradient,
    pair_tokens,
)
from rlloss_kernels.plan import rows_of_block
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
) -> Tensor:
    """Divergences [8, N] between softmax(logits / temperature) and the same of `ref_logits`, both [*tokens, V].

    In the order of DIVERGENCES; 0 in rows outside `loss_mask` and for names not in `outputs`.
    """
    size = min(logits.shape[-1], ref_logits.shape[-1]) if vocabulary is None else vocabulary
    numbers = (size, [name in outputs for name in DIVERGENCES], alpha, beta)
    budget = SCRATCH_BYTES if scratch_bytes is None else scratch_bytes
    return _forward(logits, ref_logits.detach(), ids, loss_mask, temperature, *numbers, budget)[0]


@torch.library.custom_op("rlloss_kernels::logits_pair_forward", mutates_args=())
def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    found, state = no_divergences(logits)
    blocks = _blocks(pair_tokens(ids, logits, loss_mask, temperature, vocabulary), found, vocabulary, scratch_bytes)

    def sources() -> list[LogitTiles]:
        return [LogitTiles(x, vocabulary) for x in (logits, ref_logits)]

    divergences_of_blocks(sources, blocks, found, state, wanted, Orders(alpha, beta))
    return found, state


@torch.library.custom_op("rlloss_kernels::logits_pair_backward", mutates_args=())
def _backward(
    grad: Tensor,
    state: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor | None,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    wanted: list[bool],
    alpha: float,
    beta: float,
    scratch_bytes: int,
) -> Tensor:
    tokens = pair_tokens(ids, logits, loss_mask, temperature, vocabulary, grad)
    gradient = pair_gradient(state[:, tokens.positions], grad[:, tokens.positions], wanted, Orders(alpha, beta))
    d_logits = LogitGradient(logits, tokens, vocabulary)

    def work(share: Sequence[tuple[slice, Tokens]]) -> None:
        policy, reference = (LogitTiles(x, vocabulary) for x in (logits, ref_logits))
        scratch = Scratch(logits, policy.dtype)
        for at, block in share:
            part = gradient.rows(at)
            dz = part.overwrite(policy.read(block), reference.read(block), scratch)
            d_logits.write(at, block, finished(dz, part, block, 0))

    in_parallel(work, shares(_blocks(tokens, state, vocabulary, scratch_bytes), worker_count(logits.device)))
    return d_logits.whole


def _blocks(tokens: Tokens, like: Tensor, vocabulary: int, scratch_bytes: int) -> list[tuple[slice, Tokens]]:
    """Blocks of rows whose tiles fit into a worker's share of the scratch."""
    of_row = TILES * vocabulary * like.dtype.itemsize
    return list(tokens.blocks(rows_of_block(len(tokens.positions), of_row, scratch_bytes, like.device)))


@_forward.register_fake
def _(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return no_divergences(like)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[5:]
    ctx.save_for_backward(output[1], *inputs[:5])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


_forward.register_autograd(_autograd, setup_context=_save)
