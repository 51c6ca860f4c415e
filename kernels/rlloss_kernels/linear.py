"""Per-token statistics of hidden states under a head, and their gradients, without ever making the logits.

The backward pass makes each tile of logits again, from O(N) numbers per token, unless the forward pass could keep it
within `cache_bytes`. Under a frozen head there is nothing to make again: the gradient of a log-prob points along one
vector per token, which the forward pass sums up beside the statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlloss_kernels import linear_tiled
from rlloss_kernels.frozen import frozen_backward
from rlloss_kernels.head import Head
from rlloss_kernels.implementation import implementation
from rlloss_kernels.logits import flags, no_statistics
from rlloss_kernels.shards import Shard
from rlloss_kernels.statistics import STATISTICS
from rlloss_kernels.tile import undisturbed

__all__ = ["linear_statistics"]

_ALONG_ONE_VECTOR = ("logprobs", "logsumexp")


def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocabulary: int | None = None,
    outputs: Sequence[str] = STATISTICS,
    scratch_bytes: int | None = None,
    cache_bytes: int = 0,
    impl: str = "auto",
    shard: tuple[int, int, str] | None = None,
) -> Tensor:
    """Statistics `[5, N]` of logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature.

    With `hidden` [*tokens, H], and otherwise as `logits_statistics`; `shard` holds the fields of a Shard.
    """
    trains = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    along_one = set(outputs) <= set(_ALONG_ONE_VECTOR) and shard is None
    is_frozen = trains == [True, False, False] and along_one
    wanted = [name in outputs for name in STATISTICS]
    columns = len(weight) if vocabulary is None else vocabulary
    cache = 0 if is_frozen or not any(trains) else cache_bytes
    options = (softcap, logit_scale, columns, *Shard.made(shard, columns), wanted, scratch_bytes, impl)
    return _forward(hidden, weight, bias, ids, loss_mask, temperature, *options, is_frozen, cache)[0]


@torch.library.custom_op("rlloss_kernels::linear_forward", mutates_args=())
@undisturbed
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    scratch_bytes: int | None,
    impl: str,
    is_frozen: bool,
    cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics [5, N]; state [6, N], its last row the final offsets; what a frozen head or a cache keeps."""
    head, shard = Head(weight, bias, softcap, logit_scale, columns), Shard(first, total, group)
    statistics, state = no_statistics(hidden, ids, 6)
    kept = _kept(head, hidden, ids, is_frozen, scratch_bytes, impl, cache_bytes)
    tokens = (ids, loss_mask, temperature)
    if implementation(impl, hidden) == "tiled":
        linear_tiled.forward(head, hidden, *tokens, shard, wanted, scratch_bytes, statistics, state, kept)
    else:
        from rlloss_kernels.gpu import frozen
        from rlloss_kernels.gpu import head as gpu

        if is_frozen:
            frozen.forward(head, hidden, *tokens, scratch_bytes, statistics, state, kept[0])
        else:
            gpu.forward(head, hidden, *tokens, shard, flags(wanted), statistics, state)
    return statistics, state, *kept


@torch.library.custom_op("rlloss_kernels::linear_backward", mutates_args=())
@undisturbed
def _backward(
    grad: Tensor,
    state: Tensor,
    cached: Tensor,
    offsets: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    columns: int,
    first: int,
    total: int,
    group: str,
    wanted: list[bool],
    scratch_bytes: int | None,
    impl: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    head, shard = Head(weight, bias, softcap, logit_scale, columns), Shard(first, total, group)
    tokens = (ids, loss_mask, temperature)
    if implementation(impl, hidden) == "tiled":
        kept = (state, cached, offsets)
        return linear_tiled.backward(grad, *kept, head, hidden, *tokens, shard, scratch_bytes, needs)
    from rlloss_kernels.gpu import gradient

    return gradient.backward(grad, state, head, hidden, *tokens, shard, flags(wanted), scratch_bytes, needs)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, softcap, logit_scale, columns, *_, scratch_bytes, impl, is_frozen, cache_bytes = args
    head = Head(weight, bias, softcap, logit_scale, columns)
    return *no_statistics(hidden, ids, 6), *_kept(head, hidden, ids, is_frozen, scratch_bytes, impl, cache_bytes)


@_backward.register_fake
def _(grad: Tensor, state: Tensor, cached: Tensor, offsets: Tensor, *args: Any) -> list[Tensor]:
    needs = args[-1]
    return [x.new_empty(x.shape) for x, needed in zip(args[:3], needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, temperature, *options, ctx.is_frozen, _ = inputs
    _, state, direction, *cache = output
    ctx.options, ctx.shape = options, hidden.shape
    if ctx.is_frozen:
        ctx.save_for_backward(state, direction, weight, ids, mask, temperature)
    else:
        ctx.save_for_backward(state, *cache, hidden, weight, bias, ids, mask, temperature)


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if ctx.is_frozen:
        found = frozen_backward(grad, *ctx.saved_tensors, *ctx.options[:3], ctx.options[-1])
        results = iter([found.view(ctx.shape)])
    else:
        results = iter(_backward(grad, *ctx.saved_tensors, *ctx.options, needs))
    return *(next(results) if needed else None for needed in needs), *(None,) * 14


_forward.register_autograd(_autograd, setup_context=_save)


def _kept(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    is_frozen: bool,
    scratch_bytes: int | None,
    impl: str,
    cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the direction [N, H] of a frozen head, and for raw tiles [tiles, N, columns] with their offsets."""
    count, dtype = ids.numel(), head.operand_dtype if head.rounds else head.dtype
    direction = hidden.new_zeros((count if is_frozen else 0, hidden.shape[-1]))
    if not cache_bytes or implementation(impl, hidden) == "triton":  # there it would save less than it costs
        return direction, hidden.new_empty((0, 0, 0), dtype=dtype), hidden.new_empty((0, 0), dtype=head.dtype)
    columns = linear_tiled.plan_of(head, count, 0, scratch_bytes).columns
    tiles = min(-(-head.vocabulary // columns), cache_bytes // max(count * columns * dtype.itemsize, 1))
    cached = hidden.new_empty((tiles, count, columns), dtype=dtype)
    return direction, cached, hidden.new_empty((tiles, count), dtype=head.dtype)
