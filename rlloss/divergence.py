"""Divergences per token: KL estimators with the gradient that they have, and the exact ones over the vocabulary."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import rlloss_kernels
import torch
from rlloss_kernels import DIVERGENCES, IMPLEMENTATIONS, statistics_dtype, why_not_triton
from torch import Tensor

from rlloss._checks import check_choice, check_range
from rlloss._scoring import (
    ABSENT,
    by_name,
    check_bytes,
    check_head,
    check_impl,
    check_positive,
    check_scored,
    check_vocab_size,
    token_temperature,
)
from rlloss._typing import Bool, Float, Int
from rlloss.parallel import VocabShard, check_shard, kernel_shard, local_head
from rlloss.surrogate import bounded

__all__ = [
    "KLEstimator",
    "KLGradient",
    "TokenDivergences",
    "check_kl",
    "kl_abs",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_term",
    "linear_divergences",
    "token_divergences",
]

KLEstimator = Literal["k1", "k2", "k3", "abs", "exact"]
KLGradient = Literal["reverse", "forward", "literal"]

_UNSOUND = {
    ("k1", "forward"): "k1 has zero expected gradient; only k3 descends KL(ref||pi)",
    ("k2", "forward"): "k2 descends KL(pi||ref); only k3 descends KL(ref||pi)",
    ("k1", "literal"): "as a loss, k1 has zero expected gradient and regularises nothing",
    ("abs", "reverse"): "the gradient of |l - ref| descends neither KL",
    ("abs", "forward"): "the gradient of |l - ref| descends neither KL",
    ("exact", "literal"): "the divergence of the whole vocabulary is no estimator",
}
_WAY_OUT = {"abs": "kl_grad='literal' takes it as it stands", "exact": "kl_grad says which KL ref_kl is"}


def check_kl(who: str, kl: str, kl_grad: str) -> None:
    """Raises ValueError for an unknown estimator or one whose gradient does not descend what `kl_grad` names."""
    check_choice(who, "kl", kl, get_args(KLEstimator))
    check_choice(who, "kl_grad", kl_grad, get_args(KLGradient))
    if (kl, kl_grad) in _UNSOUND:
        way_out = _WAY_OUT.get(kl, "use kl_grad='reverse'")
        raise ValueError(f"{who}: kl={kl!r} with kl_grad={kl_grad!r}: {_UNSOUND[kl, kl_grad]}; {way_out}")


def kl_k1(logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """k1 = l - ref, http://joschu.net/blog/kl-approx.html: unbiased for KL(pi||ref) under pi, of either sign.

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5])).tolist()
    [0.5]
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """k2 = (l - ref)^2 / 2, http://joschu.net/blog/kl-approx.html: biased in value, its gradient descends KL(pi||ref).

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5])).tolist()
    [0.125]
    """
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(
    logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"], max_log_ratio: float = 20.0
) -> Float[Tensor, "*tokens"]:
    """k3 = exp(ref - l) - 1 - (ref - l), equation 4 of https://arxiv.org/abs/2402.03300: unbiased and never negative.

    The log-ratio is bounded by `max_log_ratio`, with gradient 0 beyond.

    >>> kl_k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -0.5])).tolist()
    [0.0, 0.14872127771377563]
    """
    log_ratio = bounded(ref_logprobs - logprobs, max_log_ratio)
    return torch.expm1(log_ratio) - log_ratio


def kl_abs(logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """|l - ref|, a cost that some systems put into the reward; no KL divergence has it as its estimate.

    >>> kl_abs(torch.tensor([-1.5]), torch.tensor([-1.0])).tolist()
    [0.5]
    """
    return (logprobs - ref_logprobs).abs()


def kl_term(
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    ref_logprobs: Float[Tensor, "*tokens"],
    kl: KLEstimator = "k3",
    kl_grad: KLGradient = "reverse",
    max_log_ratio: float = 20.0,
) -> Float[Tensor, "*tokens"]:
    """A per-token KL penalty whose expected gradient, under samples of the old policy, is the one that it names.

    With r = exp(logprobs - old_logprobs), bounded, and sg = stop-gradient:
    `reverse` descends KL(pi||ref): r k1, sg(r) k2, r k3; `forward` descends KL(ref||pi): sg(r) k3; `literal` is the
    bare estimator as papers print it (at r = 1, k2 descends KL(pi||ref), k3 descends KL(ref||pi) and abs neither).

    >>> l, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    >>> kl_term(l, l.detach(), ref, "k3", "reverse").backward()  # d/dl (r k3) = l - ref
    >>> l.grad.tolist()
    [0.5]
    """
    if kl == "k3":
        estimate = kl_k3(logprobs, ref_logprobs, max_log_ratio)
    else:
        estimate = {"k1": kl_k1, "k2": kl_k2, "abs": kl_abs}[kl](logprobs, ref_logprobs)
    if kl_grad == "literal":
        return estimate
    ratio = bounded(logprobs - old_logprobs, max_log_ratio).exp()
    return (ratio if kl_grad == "reverse" and kl != "k2" else ratio.detach()) * estimate


class TokenDivergences(NamedTuple):
    """Per-token divergences between a policy pi and a reference, float32 (float64 from float64); None if not asked for.

    All but the reference's own are differentiable, in any combination, by what the policy's logits are made of.
    """

    reverse_kl: Float[Tensor, "*tokens"] = ABSENT  # KL(pi || ref)
    forward_kl: Float[Tensor, "*tokens"] = ABSENT  # KL(ref || pi)
    renyi: Float[Tensor, "*tokens"] = ABSENT  # log(sum pi^alpha ref^(1 - alpha)) / (alpha - 1)
    js: Float[Tensor, "*tokens"] = ABSENT  # beta KL(ref || m) + (1 - beta) KL(pi || m), m = beta ref + (1 - beta) pi
    entropy: Float[Tensor, "*tokens"] = ABSENT
    ref_entropy: Float[Tensor, "*tokens"] = ABSENT
    logprobs: Float[Tensor, "*tokens"] = ABSENT
    ref_logprobs: Float[Tensor, "*tokens"] = ABSENT


def token_divergences(
    logits: Float[Tensor, "*tokens V"],
    ref_logits: Float[Tensor, "*tokens V"],
    ids: Int[Tensor, "*tokens"] | None = None,
    *,
    temperature: float | Float[Tensor, "..."] = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    vocab_size: int | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    outputs: Sequence[str] = ("reverse_kl",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
) -> TokenDivergences:
    """Exact divergences between softmax(logits / temperature) and softmax(ref_logits / temperature).

    A token that the reference forbids (-inf) and the policy does not makes `reverse_kl` infinite, the other way round
    `forward_kl`; one that both forbid counts nowhere. `js` is equation 1 of https://arxiv.org/abs/2306.13649 (GKD) with
    the reference as its teacher.

    Args:
        ids: Tokens whose log-probs are asked for by `logprobs` or `ref_logprobs`.
        temperature: Of both; a number, or a tensor `[*tokens]`, `[B]` or `[]`.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row, at no cost.
        vocab_size: How many of the columns are tokens, where a head is padded; needed where the widths differ.
        alpha: Order of `renyi`, above 0 and not 1.
        beta: The reference's share of the mixture of `js`, between 0 and 1.
        outputs: Names of the divergences wanted.
        impl: As for `token_logprobs`.
        scratch_bytes: Bound of the memory for tiles; a good size for a CPU's caches where None.
        vocab_shard: Which part of the vocabulary both columns are, where other ranks have the rest.

    >>> token_divergences(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]), outputs=["forward_kl"]).forward_kl
    tensor([0.6931])
    """
    who = "token_divergences"
    scored = _ids_or_none(who, "logits", logits, ids, outputs)
    check_scored(who, "logits", logits, scored, loss_mask, outputs, DIVERGENCES)
    check_scored(who, "ref_logits", ref_logits, scored, loss_mask, outputs, DIVERGENCES)
    _check_pair(who, logits, ref_logits, (logits.shape[-1], ref_logits.shape[-1]), vocab_size)
    _check_orders(who, alpha, beta)
    check_bytes(who, scratch_bytes=scratch_bytes)
    check_impl(who, impl, IMPLEMENTATIONS, lambda: why_not_triton(logits.device, logits.dtype))
    columns = min(logits.shape[-1], ref_logits.shape[-1])
    found = rlloss_kernels.logits_divergences(
        logits,
        ref_logits,
        ids=ids,
        loss_mask=loss_mask,
        temperature=token_temperature(who, temperature, scored, statistics_dtype(logits.dtype)),
        vocabulary=check_shard(who, vocab_shard, columns, vocab_size),
        outputs=outputs,
        alpha=alpha,
        beta=beta,
        impl=impl,
        scratch_bytes=scratch_bytes,
        shard=kernel_shard(vocab_shard),
    )
    return TokenDivergences(**by_name(found, DIVERGENCES, scored, outputs))


def linear_divergences(
    hidden: Float[Tensor, "*tokens H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "*tokens R"],
    ref_weight: Float[Tensor, "V R"],
    ids: Int[Tensor, "*tokens"] | None = None,
    *,
    bias: Float[Tensor, " V"] | None = None,
    ref_bias: Float[Tensor, " V"] | None = None,
    temperature: float | Float[Tensor, "..."] = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    vocab_size: int | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    outputs: Sequence[str] = ("reverse_kl",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    vocab_shard: VocabShard | None = None,
) -> TokenDivergences:
    """Exact divergences between two models from their hidden states and heads, without the logits of either.

    The two products of a tile serve all divergences but `js`, which makes them twice. Heads as for `linear_logprobs`,
    each with its own width, bias, softcap and scale; the rest as for `token_divergences`. The reference gets no
    gradient.

    >>> hidden, weight = torch.zeros(3, 8), torch.ones(5, 8)
    >>> linear_divergences(hidden, weight, torch.ones(3, 4), torch.ones(5, 4)).reverse_kl
    tensor([0., 0., 0.])
    """
    who = "linear_divergences"
    hidden, weight, bias, vocab_shard = local_head(who, hidden, weight, bias, vocab_shard)
    ref_hidden, ref_weight, ref_bias, vocab_shard = local_head(who, ref_hidden, ref_weight, ref_bias, vocab_shard)
    scored = _ids_or_none(who, "hidden", hidden, ids, outputs)
    check_scored(who, "hidden", hidden, scored, loss_mask, outputs, DIVERGENCES)
    check_scored(who, "ref_hidden", ref_hidden, scored, loss_mask, outputs, DIVERGENCES)
    check_head(who, hidden, weight, bias)
    check_head(who, ref_hidden, ref_weight, ref_bias)
    _check_pair(who, hidden, ref_hidden, (len(weight), len(ref_weight)), vocab_size)
    _check_orders(who, alpha, beta)
    check_bytes(who, scratch_bytes=scratch_bytes)
    for name, number in {"softcap": softcap, "ref_softcap": ref_softcap}.items():
        if number is not None:
            check_positive(who, name, number)
    for name, number in {"logit_scale": logit_scale, "ref_logit_scale": ref_logit_scale}.items():
        check_positive(who, name, number)
    check_impl(who, impl, IMPLEMENTATIONS, lambda: why_not_triton(hidden.device, hidden.dtype))
    columns = min(len(weight), len(ref_weight))
    found = rlloss_kernels.linear_divergences(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        bias=bias,
        ref_bias=ref_bias,
        ids=ids,
        loss_mask=loss_mask,
        temperature=token_temperature(who, temperature, scored, statistics_dtype(hidden.dtype)),
        softcaps=(softcap, ref_softcap),
        logit_scales=(logit_scale, ref_logit_scale),
        vocabulary=check_shard(who, vocab_shard, columns, vocab_size),
        outputs=outputs,
        alpha=alpha,
        beta=beta,
        impl=impl,
        scratch_bytes=scratch_bytes,
        shard=kernel_shard(vocab_shard),
    )
    return TokenDivergences(**by_name(found, DIVERGENCES, scored, outputs))


def _ids_or_none(who: str, name: str, x: Tensor, ids: Tensor | None, outputs: Sequence[str]) -> Tensor:
    """The ids, or as many zeros where none are needed."""
    needed = [output for output in outputs if output in ("logprobs", "ref_logprobs")]
    if ids is not None or not isinstance(x, Tensor) or x.ndim not in (2, 3):
        return ids  # type: ignore[return-value]  # what is wrong is told by `check_scored`
    if needed:
        raise ValueError(f"{who}: outputs={needed} need ids, got None")
    return torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)


def _check_orders(who: str, alpha: float, beta: float) -> None:
    check_range(who, "alpha", alpha, 0, open_low=True)
    check_range(who, "beta", beta, 0, 1, open_low=True)
    if alpha == 1 or beta == 1:
        raise ValueError(f"{who}: alpha=1 and beta=1 are limits, got alpha={alpha}, beta={beta}; see reverse_kl")


def _check_pair(who: str, x: Tensor, ref: Tensor, sizes: tuple[int, int], vocab_size: int | None) -> None:
    """Raises ValueError for a policy and a reference of other precision or vocabulary."""
    if statistics_dtype(x.dtype) is not statistics_dtype(ref.dtype):
        raise ValueError(f"{who}: the policy is {x.dtype} but the reference {ref.dtype}; convert the one in float64")
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"{who}: the policy has {sizes[0]} tokens and the reference {sizes[1]}; where the rest is padding, pass "
            f"vocab_size={min(sizes)}"
        )
    check_vocab_size(who, vocab_size, min(sizes))
