"""Per-token log-prob statistics and their gradients in plain PyTorch, tile by tile, on any device.

Two entry points: from logits, and from hidden states and a head. Beyond one tile nothing of size `[N, V]` is made;
the backward pass recomputes the tiles from O(N) numbers. Rows that do not count, and in the backward pass rows whose
upstream gradients are all 0, are never read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.blocks import Rows, Scratch, Tokens, statistics_dtype, tokens_that_count
from rlloss_kernels.statistics import STATISTICS, GradientRows, OnlineSoftmax, gradient_rows

HEAD_COLUMNS = 4096


def logits_statistics(
    logits: Tensor,
    ids: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    outputs: Sequence[str] = STATISTICS,
) -> Tensor:
    """Statistics `[5, N]` of the rows of `logits` [*tokens, V] / `temperature` [*tokens], scored against `ids`.

    In the order of STATISTICS; 0 in rows outside `loss_mask` and for names not in `outputs`.
    """
    wanted = [name in outputs for name in STATISTICS]
    return _logits_forward(logits, ids, loss_mask, temperature, wanted)[0]


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
    outputs: Sequence[str] = STATISTICS,
) -> Tensor:
    """The same for logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap), hidden [*tokens, H]."""
    wanted = [name in outputs for name in STATISTICS]
    return _linear_forward(hidden, weight, bias, ids, loss_mask, temperature, softcap, logit_scale, wanted)[0]


@torch.library.custom_op("rlloss_kernels::logits_forward", mutates_args=())
def _logits_forward(
    logits: Tensor, ids: Tensor, loss_mask: Tensor | None, temperature: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    vocabulary = logits.shape[-1]
    rows, dtype = Rows(logits), statistics_dtype(logits.dtype)
    scratch = Scratch(logits, dtype)
    statistics, state = _no_statistics(logits, ids)
    for _, block in tokens_that_count(ids, loss_mask, temperature, vocabulary).blocks(vocabulary, dtype):
        size = (len(block.positions), vocabulary)
        z = _cool(rows.read(block, scratch.tile("z", *size)), block)
        softmax = OnlineSoftmax(block.ids, dtype, wanted)
        softmax.absorb(z, scratch.tile("spare", *size))
        statistics[:, block.positions], state[:, block.positions] = softmax.close()
    return statistics, state


@torch.library.custom_op("rlloss_kernels::logits_backward", mutates_args=())
def _logits_backward(
    grad: Tensor, state: Tensor, logits: Tensor, ids: Tensor, loss_mask: Tensor | None, temperature: Tensor | None
) -> Tensor:
    vocabulary = logits.shape[-1]
    rows, dtype = Rows(logits), statistics_dtype(logits.dtype)
    scratch = Scratch(logits, dtype)
    tokens = tokens_that_count(ids, loss_mask, temperature, vocabulary, grad)
    gradient = gradient_rows(state[:, tokens.positions], grad[:, tokens.positions], vocabulary, _factor(tokens))
    every = len(tokens.positions) == ids.numel()
    result = logits.new_empty(logits.shape) if every else logits.new_zeros(logits.shape)
    matrix = result.view(-1, vocabulary)
    for at, block in tokens.blocks(vocabulary, dtype):
        size = (len(block.positions), vocabulary)
        z = _cool(rows.read(block, scratch.tile("z", *size)), block)
        gradient.rows(at).overwrite(z, 0, block.ids, scratch.tile("spare", *size))
        if every:
            matrix[at] = z
        else:
            matrix.index_copy_(0, block.positions, z.to(matrix.dtype))
    return result


@_logits_forward.register_fake
def _(logits: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _no_statistics(logits, ids)


@_logits_backward.register_fake
def _(grad: Tensor, state: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_logits(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ids, loss_mask, temperature, _ = inputs
    ctx.save_for_backward(output[1], logits, ids, loss_mask, temperature)


def _logits_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _logits_backward(grad, *ctx.saved_tensors), None, None, None, None


_logits_forward.register_autograd(_logits_autograd, setup_context=_save_logits)


@torch.library.custom_op("rlloss_kernels::linear_forward", mutates_args=())
def _linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    head = _Head(weight, bias, softcap, logit_scale, statistics_dtype(hidden.dtype))
    rows, scratch = Rows(hidden), Scratch(hidden, head.dtype)
    statistics, state = _no_statistics(hidden, ids)
    for _, block in tokens_that_count(ids, loss_mask, temperature, len(weight)).blocks(HEAD_COLUMNS, head.dtype):
        h = head.read(rows, block)
        softmax = OnlineSoftmax(block.ids, head.dtype, wanted)
        for column in range(0, len(weight), HEAD_COLUMNS):
            w = head.operand(column)
            z = _cool(head.logits(h, w, column, scratch), block)
            softmax.absorb(z, scratch.tile("spare", *z.shape))
        statistics[:, block.positions], state[:, block.positions] = softmax.close()
    return statistics, state


@torch.library.custom_op("rlloss_kernels::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias, those of them that `needs` names."""
    head = _Head(weight, bias, softcap, logit_scale, statistics_dtype(hidden.dtype))
    rows, scratch = Rows(hidden), Scratch(hidden, head.dtype)
    tokens = tokens_that_count(ids, loss_mask, temperature, len(weight), grad)
    positions = tokens.positions
    gradient = gradient_rows(state[:, positions], grad[:, positions], len(weight), logit_scale * _factor(tokens))
    to_hidden, to_weight, to_bias = needs
    d_hidden = hidden.new_zeros(len(positions), hidden.shape[-1], dtype=head.dtype) if to_hidden else None
    d_weight = weight.new_empty(weight.shape) if to_weight else None
    d_bias = weight.new_zeros(len(weight), dtype=head.dtype) if to_bias else None
    for column in range(0, len(weight), HEAD_COLUMNS):
        w = head.operand(column)
        columns = slice(column, column + len(w))
        d_w = scratch.tile("d_weight", *w.shape).zero_() if to_weight else None
        for at, block in tokens.blocks(HEAD_COLUMNS, head.dtype):
            h = head.read(rows, block)
            dz = head.gradient(h, w, column, block, gradient.rows(at), scratch)
            if d_bias is not None:
                d_bias[columns] += dz.sum(0)
            dz = dz.to(head.operand_dtype)
            if d_hidden is not None:
                _add_product(d_hidden[at], dz, w)
            if d_w is not None:
                _add_product(d_w, dz.t(), h)
        if d_weight is not None and d_w is not None:
            d_weight[columns] = d_w
    results = []
    if d_hidden is not None:
        whole = hidden.new_zeros(ids.numel(), hidden.shape[-1])
        results.append(whole.index_copy_(0, positions, d_hidden.to(hidden.dtype)).view(hidden.shape))
    if d_weight is not None:
        results.append(d_weight)
    if d_bias is not None:
        results.append(d_bias.to(weight.dtype))
    return results


@_linear_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _no_statistics(hidden, ids)


@_linear_backward.register_fake
def _(grad: Tensor, state: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs = args
    return [x.new_empty(x.shape) for x, needed in zip(inputs[:3], needs, strict=True) if needed]


def _save_linear(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softcap, ctx.logit_scale, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _linear_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    results = iter(_linear_backward(grad, *ctx.saved_tensors, ctx.softcap, ctx.logit_scale, needs))
    return *(next(results) if needed else None for needed in needs), *[None] * 6


_linear_forward.register_autograd(_linear_autograd, setup_context=_save_linear)


class _Head(NamedTuple):
    """A linear head and what follows it up to the temperature; `dtype` is that of its logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype

    @property
    def operand_dtype(self) -> torch.dtype:
        """What matrices are multiplied in: their own dtype where the product can come out unrounded."""
        unrounded = self.weight.is_cuda and self.weight.dtype is torch.bfloat16
        return self.weight.dtype if unrounded else self.dtype

    def operand(self, column: int) -> Tensor:
        return self.weight[column : column + HEAD_COLUMNS].to(self.operand_dtype)

    def read(self, rows: Rows, tokens: Tokens) -> Tensor:
        shape = (len(tokens.positions), self.weight.shape[1])
        return rows.read(tokens, self.weight.new_empty(shape, dtype=self.operand_dtype))

    def logits(self, h: Tensor, w: Tensor, column: int, scratch: Scratch) -> Tensor:
        z = scratch.tile("z", len(h), len(w))
        if h.dtype is z.dtype:
            torch.mm(h, w.t(), out=z)
        else:
            z.copy_(torch.mm(h, w.t(), out_dtype=z.dtype))
        if self.bias is not None:
            z.add_(self.bias[column : column + len(w)])
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def gradient(
        self, h: Tensor, w: Tensor, column: int, block: Tokens, rows: GradientRows, scratch: Scratch
    ) -> Tensor:
        """The gradient of the tile of products `h w^T`; `logit_scale` is already in `rows`."""
        z = self.logits(h, w, column, scratch)
        slope = None
        if self.softcap is not None:
            slope = torch.div(z, self.softcap, out=scratch.tile("slope", *z.shape)).square_().neg_().add_(1)
        rows.overwrite(_cool(z, block), column, block.ids, scratch.tile("spare", *z.shape))
        return z if slope is None else z.mul_(slope)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _cool(z: Tensor, block: Tokens) -> Tensor:
    return z if block.temperature is None else z.div_(block.temperature[:, None])


def _factor(tokens: Tokens) -> Tensor | float:
    return 1.0 if tokens.temperature is None else 1 / tokens.temperature


def _no_statistics(like: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the five statistics and the five numbers of the state of every token."""
    shape, dtype = (5, ids.numel()), statistics_dtype(like.dtype)
    return like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)
