"""The waist: per-token log-probs and their kin, from logits or straight from hidden states and a head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rlloss_kernels import STATISTICS, linear_statistics, logits_statistics, statistics_dtype
from torch import Tensor

from rlloss._checks import check_choice, check_device, check_full_precision, check_mask, nearest
from rlloss._typing import Bool, Float, Int
from rlloss.reduce import sequence_mean, sequence_sum

__all__ = ["TokenStats", "linear_logprobs", "sequence_logps", "sequence_mean_logps", "token_logprobs"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_ABSENT: Any = None  # typed as a tensor: what was asked for needs no narrowing by type checkers


class TokenStats(NamedTuple):
    """Per-token statistics of p = softmax(final logits), float32 (float64 from float64); None where not asked for.

    All are differentiable, in any combination and for any upstream gradient.
    """

    logprobs: Float[Tensor, "*tokens"] = _ABSENT  # log p(id)
    entropy: Float[Tensor, "*tokens"] = _ABSENT  # -sum p log p
    logsumexp: Float[Tensor, "*tokens"] = _ABSENT
    sum_p2: Float[Tensor, "*tokens"] = _ABSENT  # sum p^2
    mean_logprob: Float[Tensor, "*tokens"] = _ABSENT  # mean of log p over the vocabulary, for label smoothing


def token_logprobs(
    logits: Float[Tensor, "*tokens V"],
    ids: Int[Tensor, "*tokens"],
    *,
    temperature: float | Float[Tensor, "..."] = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
) -> TokenStats:
    """Log-probs of `ids` under softmax(logits / temperature): row i of the logits is scored against `ids[i]`.

    Unlike `log_softmax` and a gather, it makes nothing of the logits' size but their gradient, and loses no digits as
    p -> 1. Entries of -inf are legal: p = 0 and gradient 0, also for an id of log-prob -inf.

    Args:
        logits: `[B, T, V]` or `[N, V]`, of any strides.
        ids: What each row is scored against; `rlloss.shift` makes them.
        temperature: A number, or a tensor `[*tokens]`, `[B]` or `[]`; it carries no gradient.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row of `logits` and `ids`, at no cost.
        outputs: Names of the statistics wanted.

    >>> token_logprobs(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])).logprobs
    tensor([-0.6931, -0.6931])
    """
    who = "token_logprobs"
    _check_scored(who, "logits", logits, ids, loss_mask, outputs)
    statistics = logits_statistics(
        logits,
        ids,
        loss_mask=loss_mask,
        temperature=_token_temperature(who, temperature, ids, logits),
        outputs=outputs,
    )
    return _stats(statistics, ids, outputs)


def linear_logprobs(
    hidden: Float[Tensor, "*tokens H"],
    weight: Float[Tensor, "V H"],
    ids: Int[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "..."] = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
) -> TokenStats:
    """Log-probs of `ids` under a head on `hidden`, without the logits: row i is scored against `ids[i]`.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

    Unlike `token_logprobs(head(hidden), ids)`, it never holds more than a tile of logits, in float32 where the head
    would round them to the dtype of its weight. A weight or hidden that needs no gradient costs none. Inside
    `torch.autocast` the tensors keep their own dtypes.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, what the head reads.
        weight: The head's weight, of the dtype of `hidden`.
        ids: What each row is scored against; `rlloss.shift` makes them.
        bias: The head's bias.
        temperature: A number, or a tensor `[*tokens]`, `[B]` or `[]`; it carries no gradient.
        softcap: The bound c of c * tanh(logits / c), as in Gemma 2.
        logit_scale: Cohere's `logit_scale`; the inverse of Granite's `logits_scaling`.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row of `hidden` and `ids`, at no cost.
        outputs: Names of the statistics wanted.
        impl: "tiled" is plain PyTorch, for every device; "auto" chooses.

    >>> hidden, weight = torch.zeros(1, 4, 8), torch.ones(5, 8)
    >>> linear_logprobs(hidden, weight, torch.tensor([[0, 1, 2, 3]]), outputs=["entropy"]).entropy
    tensor([[1.6094, 1.6094, 1.6094, 1.6094]])
    """
    who = "linear_logprobs"
    check_choice(who, "impl", impl, ("auto", "tiled"))
    _check_scored(who, "hidden", hidden, ids, loss_mask, outputs)
    _check_head(who, hidden, weight, bias)
    if softcap is not None:
        _check_positive(who, "softcap", softcap)
    _check_positive(who, "logit_scale", logit_scale)
    statistics = linear_statistics(
        hidden,
        weight,
        ids,
        bias=bias,
        loss_mask=loss_mask,
        temperature=_token_temperature(who, temperature, ids, hidden),
        softcap=softcap,
        logit_scale=logit_scale,
        outputs=outputs,
    )
    return _stats(statistics, ids, outputs)


def sequence_logps(
    logprobs: Float[Tensor, "*tokens"], loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None
) -> Float[Tensor, " S"]:
    """Log-probs of whole sequences: per-sequence sums over the tokens that count.

    >>> sequence_logps(torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[True, True, False]]))
    tensor([-3.])
    """
    check_full_precision("sequence_logps", "logprobs", logprobs)
    return sequence_sum(logprobs, loss_mask, cu_seqlens)


def sequence_mean_logps(
    logprobs: Float[Tensor, "*tokens"], loss_mask: Bool[Tensor, "*tokens"], cu_seqlens: Tensor | None = None
) -> Float[Tensor, " S"]:
    """Length-normalised log-probs: per-sequence means over the tokens that count, 0 for a sequence without any.

    >>> sequence_mean_logps(torch.tensor([-1.0, -3.0, -5.0]), torch.ones(3).bool(), torch.tensor([0, 2, 3]))
    tensor([-2., -5.])
    """
    check_full_precision("sequence_mean_logps", "logprobs", logprobs)
    return sequence_mean(logprobs, loss_mask, cu_seqlens)


def _stats(statistics: Tensor, ids: Tensor, outputs: Sequence[str]) -> TokenStats:
    return TokenStats(**{name: statistics[STATISTICS.index(name)].view(ids.shape) for name in outputs})


def _token_temperature(who: str, temperature: float | Tensor, ids: Tensor, like: Tensor) -> Tensor | None:
    """One temperature per token; None for 1."""
    dtype = statistics_dtype(like.dtype)
    if not isinstance(temperature, Tensor):
        _check_positive(who, "temperature", temperature)
        return None if temperature == 1 else torch.full(ids.shape, temperature, dtype=dtype, device=ids.device)
    check_device(who, "temperature", temperature, "ids", ids)
    if not temperature.is_floating_point() or temperature.requires_grad:
        raise ValueError(
            f"{who}: temperature must be a number or a float tensor without gradient, got {temperature.dtype} with "
            f"requires_grad={temperature.requires_grad}"
        )
    if temperature.shape not in ((), ids.shape, ids.shape[:1]):
        raise ValueError(
            f"{who}: temperature must have the shape of ids, {list(ids.shape)}, or one entry per row, "
            f"[{ids.shape[0]}], got {list(temperature.shape)}"
        )
    if temperature.ndim < ids.ndim and temperature.ndim:
        temperature = temperature[:, None]
    return temperature.to(dtype).expand(ids.shape)


def _check_positive(who: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{who}: {name} must be a positive number, got {value!r}")


def _check_scored(
    who: str, name: str, x: Tensor, ids: Tensor, loss_mask: Tensor | None, outputs: Sequence[str]
) -> None:
    for role, tensor in ((name, x), ("ids", ids)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{who}: {role} must be a tensor, got {type(tensor).__name__}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{who}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{who}: ids must be int32 or int64, got {ids.dtype}")
    if ids.ndim not in (1, 2) or x.shape[:-1] != ids.shape or x.shape[-1] == 0:
        raise ValueError(
            f"{who}: {name} must be [*ids.shape, {'V' if name == 'logits' else 'H'}] with ids [B, T] or [N], got "
            f"{name} {list(x.shape)} and ids {list(ids.shape)}; row i is scored against ids[i], and rlloss.shift "
            "aligns them"
        )
    check_device(who, "ids", ids, name, x)
    if loss_mask is not None:
        check_mask(who, "loss_mask", loss_mask)
        if loss_mask.shape != ids.shape:
            raise ValueError(
                f"{who}: loss_mask must have the shape of ids, {list(ids.shape)}, got {list(loss_mask.shape)}"
            )
        check_device(who, "loss_mask", loss_mask, name, x)
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"{who}: outputs must be a sequence of names such as ('logprobs',), got {outputs!r}")
    for output in outputs:
        if output not in STATISTICS:
            raise ValueError(
                f"{who}: outputs must be among {list(STATISTICS)}, got {output!r}{nearest(output, STATISTICS)}"
            )


def _check_head(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{who}: weight must be a tensor, got {type(weight).__name__}; of a module pass its weight and bias"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{who}: weight must be [V, H] with the width H={hidden.shape[-1]} of hidden, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if x.dtype != hidden.dtype:
            raise ValueError(
                f"{who}: hidden is {hidden.dtype} but {name} is {x.dtype}; convert one, as in "
                f"hidden.to(weight.dtype): nothing is cast behind your back, not even inside torch.autocast"
            )
        check_device(who, name, x, "hidden", hidden)
