"""Per-token estimators of a KL divergence, and which divergence their gradient descends."""

from typing import Literal, get_args

import torch
from torch import Tensor

from rlloss._checks import check_choice
from rlloss._typing import Float
from rlloss.surrogate import bounded

__all__ = ["KLEstimator", "KLGradient", "check_kl", "kl_k1", "kl_k2", "kl_k3", "kl_term"]

KLEstimator = Literal["k1", "k2", "k3"]
KLGradient = Literal["reverse", "forward", "literal"]

_UNSOUND = {
    ("k1", "forward"): "k1 has zero expected gradient; only k3 descends KL(ref||pi)",
    ("k2", "forward"): "k2 descends KL(pi||ref); only k3 descends KL(ref||pi)",
    ("k1", "literal"): "as a loss, k1 has zero expected gradient and regularises nothing",
}


def check_kl(who: str, kl: str, kl_grad: str) -> None:
    """Raises ValueError for an unknown estimator or one whose gradient does not descend what `kl_grad` names."""
    check_choice(who, "kl", kl, get_args(KLEstimator))
    check_choice(who, "kl_grad", kl_grad, get_args(KLGradient))
    if (kl, kl_grad) in _UNSOUND:
        raise ValueError(f"{who}: kl={kl!r} with kl_grad={kl_grad!r}: {_UNSOUND[kl, kl_grad]}; use kl_grad='reverse'")


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
    bare estimator as papers print it (at r = 1, k2 descends KL(pi||ref) and k3 descends KL(ref||pi)).

    >>> l, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.5])
    >>> kl_term(l, l.detach(), ref, "k3", "reverse").backward()  # d/dl (r k3) = l - ref
    >>> l.grad.tolist()
    [0.5]
    """
    if kl == "k3":
        estimate = kl_k3(logprobs, ref_logprobs, max_log_ratio)
    else:
        estimate = (kl_k1 if kl == "k1" else kl_k2)(logprobs, ref_logprobs)
    if kl_grad == "literal":
        return estimate
    ratio = bounded(logprobs - old_logprobs, max_log_ratio).exp()
    return (ratio if kl_grad == "reverse" and kl != "k2" else ratio.detach()) * estimate
