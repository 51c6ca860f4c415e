"""The waist: per-token log-probs and their kin, from logits or straight from hidden states and a head."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rlloss_kernels import (
    IMPLEMENTATIONS,
    STATISTICS,
    kept_logits,
    linear_statistics,
    logits_statistics,
    statistics_dtype,
    why_not_triton,
)
from torch import Tensor

from rlloss._checks import check_full_precision
from rlloss._scoring import (
    ABSENT,
    by_name,
    check_bytes,
    check_head,
    check_impl,
    check_positive,
    check_scored,
    check_vocab_size,
    kept_that_count,
    token_temperature,
)
from rlloss._typing import Bool, Float, Int
from rlloss.parallel import VocabShard, check_shard, check_whole, kernel_shard, local_head
from rlloss.reduce import sequence_mean, sequence_sum

__all__ = ["TokenStats", "linear_logprobs", "sequence_logps", "sequence_mean_logps", "token_logprobs"]


class TokenStats(NamedTuple):
    """Per-token statistics of p = softmax(final logits), float32 (float64 from float64); None where not asked for.

    All are differentiable, in any combination and for any upstream gradient.
    """

    logprobs: Float[Tensor, "*tokens"] = ABSENT  # log p(id)
    entropy: Float[Tensor, "*tokens"] = ABSENT  # -sum p log p
    logsumexp: Float[Tensor, "*tokens"] = ABSENT
    sum_p2: Float[Tensor, "*tokens"] = ABSENT  # sum p^2
    mean_logprob: Float[Tensor, "*tokens"] = ABSENT  # mean of log p over the vocabulary, for label smoothing


def token_logprobs(
    logits: Float[Tensor, "*tokens V"],
    ids: Int[Tensor, "*tokens"],
    *,
    temperature: float | Float[Tensor, "..."] = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    vocab_size: int | None = None,
    kept_ids: Int[Tensor, "*tokens K"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probs of `ids` under softmax(logits / temperature): row i of the logits is scored against `ids[i]`.

    Unlike `log_softmax` and a gather, it makes nothing of the logits' size but their gradient, and loses no digits as
    p -> 1. Entries of -inf are legal: p = 0 and gradient 0, also for an id of log-prob -inf.

    Args:
        logits: `[B, T, V]` or `[N, V]`, of any strides.
        ids: What each row is scored against; `rlloss.shift` makes them.
        temperature: A number, or a tensor `[*tokens]`, `[B]` or `[]`; it carries no gradient.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row of `logits` and `ids`, at no cost.
        vocab_size: How many of the columns are tokens, where a head is padded to a round number.
        kept_ids: The ids that a sampler with top-k, top-p or min-p had kept, each once; below 0 for none. The softmax
            is over these alone, and an id that is not among them has log-prob -inf.
        outputs: Names of the statistics wanted.
        impl: "triton", "tiled" for plain PyTorch, or "auto": Triton on an NVIDIA GPU for all dtypes but float64, and
            tiles everywhere else. In Triton an id outside of the vocabulary fails an assertion on the device, since to
            raise IndexError would be to wait for it.
        scratch_bytes: Bound of the memory for tiles; a good size for a CPU's caches where None.
        vocab_shard: Which part of the vocabulary the columns are, where other ranks have the rest.

    >>> token_logprobs(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])).logprobs
    tensor([-0.6931, -0.6931])
    """
    who = "token_logprobs"
    check_scored(who, "logits", logits, ids, loss_mask, outputs, STATISTICS)
    check_vocab_size(who, vocab_size, logits.shape[-1])
    check_bytes(who, scratch_bytes=scratch_bytes)
    check_impl(who, impl, IMPLEMENTATIONS, lambda: why_not_triton(logits.device, logits.dtype))
    vocab_size = check_shard(who, vocab_shard, logits.shape[-1], vocab_size)
    places = ids
    if kept_ids is not None:
        check_whole(who, vocab_shard)
        kept_ids = kept_that_count(who, kept_ids, ids, loss_mask, outputs)
        logits = logits.gather(-1, kept_ids.clamp(min=0).long()).masked_fill(kept_ids < 0, -math.inf)
        logits, places, vocab_size = *_among(logits, kept_ids, ids), None
    statistics = logits_statistics(
        logits,
        places,
        loss_mask=loss_mask,
        temperature=token_temperature(who, temperature, ids, statistics_dtype(logits.dtype)),
        vocabulary=vocab_size,
        outputs=outputs,
        impl=impl,
        scratch_bytes=scratch_bytes,
        shard=kernel_shard(vocab_shard),
    )
    return TokenStats(**by_name(statistics, STATISTICS, ids, outputs))


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
    vocab_size: int | None = None,
    kept_ids: Int[Tensor, "*tokens K"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    cache_bytes: int = 0,
    vocab_shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probs of `ids` under a head on `hidden`, without the logits: row i is scored against `ids[i]`.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

    Unlike `token_logprobs(head(hidden), ids)`, it never holds more than a tile of logits, in float32 where the head
    would round them to the dtype of its weight; on a CPU, which rounds every bfloat16 product, they are centred first,
    which leaves errors below 2e-3 nats. A weight or hidden that needs no gradient costs none, and under a frozen head
    log-probs need two products in all. Inside `torch.autocast` the tensors keep their own dtypes.

    Args:
        hidden: `[B, T, H]` or `[N, H]`, what the head reads.
        weight: The head's weight, of the dtype of `hidden`.
        ids: What each row is scored against; `rlloss.shift` makes them.
        bias: The head's bias.
        temperature: A number, or a tensor `[*tokens]`, `[B]` or `[]`; it carries no gradient.
        softcap: The bound c of c * tanh(logits / c), as in Gemma 2.
        logit_scale: Cohere's `logit_scale`; the inverse of Granite's `logits_scaling`.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row of `hidden` and `ids`, at no cost.
        vocab_size: How many rows of the weight are tokens, where it is padded to a round number.
        kept_ids: As for `token_logprobs`; only these logits are ever made.
        outputs: Names of the statistics wanted.
        impl: As for `token_logprobs`.
        scratch_bytes: Bound of the memory for tiles, beside a few numbers per row of `hidden`; a good size where None.
        cache_bytes: What the forward pass may keep of its tiles, so that the backward pass need not make them again;
            Triton keeps none.
        vocab_shard: Which part of the vocabulary the weight's rows are, where other ranks have the rest. For DTensors,
            see `VocabShard.of`; it need not be told where `hidden` is one too.

    >>> hidden, weight = torch.zeros(1, 4, 8), torch.ones(5, 8)
    >>> linear_logprobs(hidden, weight, torch.tensor([[0, 1, 2, 3]]), outputs=["entropy"]).entropy
    tensor([[1.6094, 1.6094, 1.6094, 1.6094]])
    """
    who = "linear_logprobs"
    hidden, weight, bias, vocab_shard = local_head(who, hidden, weight, bias, vocab_shard)
    check_scored(who, "hidden", hidden, ids, loss_mask, outputs, STATISTICS)
    check_head(who, hidden, weight, bias)
    check_vocab_size(who, vocab_size, len(weight))
    check_bytes(who, scratch_bytes=scratch_bytes, cache_bytes=cache_bytes)
    check_impl(who, impl, IMPLEMENTATIONS, lambda: why_not_triton(hidden.device, hidden.dtype))
    vocab_size = check_shard(who, vocab_shard, len(weight), vocab_size)
    if softcap is not None:
        check_positive(who, "softcap", softcap)
    check_positive(who, "logit_scale", logit_scale)
    if kept_ids is not None:
        check_whole(who, vocab_shard)
        kept = kept_that_count(who, kept_ids, ids, loss_mask, outputs)
        z = logit_scale * kept_logits(hidden, weight, bias, kept, scratch_bytes=scratch_bytes)
        z = z if softcap is None else torch.where(kept < 0, z, softcap * torch.tanh(z / softcap))
        return token_logprobs(*_among(z, kept, ids), temperature=temperature, loss_mask=loss_mask, outputs=outputs)
    statistics = linear_statistics(
        hidden,
        weight,
        ids,
        bias=bias,
        loss_mask=loss_mask,
        temperature=token_temperature(who, temperature, ids, statistics_dtype(hidden.dtype)),
        softcap=softcap,
        logit_scale=logit_scale,
        vocabulary=vocab_size,
        outputs=outputs,
        cache_bytes=cache_bytes,
        impl=impl,
        scratch_bytes=scratch_bytes,
        shard=kernel_shard(vocab_shard),
    )
    return TokenStats(**by_name(statistics, STATISTICS, ids, outputs))


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


def _among(logits: Tensor, kept_ids: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of kept ids with one of -inf beside them, and where among them each id is: there, if nowhere else."""
    is_here = kept_ids == ids[..., None]
    place = torch.where(is_here.any(-1), is_here.int().argmax(-1), kept_ids.shape[-1])
    return torch.cat([logits, torch.full_like(logits[..., :1], -math.inf)], -1), place
