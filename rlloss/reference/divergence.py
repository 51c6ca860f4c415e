"""KL divergence: over a vocabulary, estimated from one token, and as the term of a loss."""

import math

import numpy as np
from numpy.typing import ArrayLike

SOUND = {
    ("k1", "reverse"),
    ("k2", "reverse"),
    ("k3", "reverse"),
    ("k3", "forward"),
    ("k2", "literal"),
    ("k3", "literal"),
    ("abs", "literal"),
    ("exact", "reverse"),
    ("exact", "forward"),
}


def bounded(log_ratio: float, max_log_ratio: float) -> float:
    """A log ratio that may be exponentiated."""
    return min(max(log_ratio, -max_log_ratio), max_log_ratio)


def kl(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p || q) = sum_v p_v log(p_v / q_v), of two probability vectors.

    >>> kl([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]) == math.log(2)
    True
    """
    total = 0.0
    for p_v, q_v in zip(np.asarray(p, np.float64).tolist(), np.asarray(q, np.float64).tolist(), strict=True):
        if p_v == 0.0:
            continue
        total += p_v * math.log(p_v / q_v) if q_v > 0.0 else math.inf
    return total


def kl_k1(logprob: float, ref_logprob: float) -> float:
    """k1 of http://joschu.net/blog/kl-approx.html, log(pi / ref): unbiased for KL(pi || ref), of either sign.

    >>> kl_k1(-1.0, -3.0)
    2.0
    """
    return logprob - ref_logprob


def kl_k2(logprob: float, ref_logprob: float) -> float:
    """k2 of http://joschu.net/blog/kl-approx.html, log(pi / ref)^2 / 2: biased, never negative.

    >>> kl_k2(-1.0, -3.0)
    2.0
    """
    return (logprob - ref_logprob) ** 2 / 2.0


def kl_k3(logprob: float, ref_logprob: float, max_log_ratio: float = 20.0) -> float:
    """k3, equation 4 of https://arxiv.org/abs/2402.03300: as unbiased as k1, never negative.

    k3 = ref / pi - log(ref / pi) - 1

    >>> kl_k3(-1.0, -1.0)
    0.0
    """
    log_ratio = bounded(ref_logprob - logprob, max_log_ratio)
    # expm1, because exp(x) - 1 loses the small divergences that matter most
    return math.expm1(log_ratio) - log_ratio


def check_kl(kl: str, kl_grad: str) -> None:
    """Raises ValueError unless the estimator has the gradient that `kl_grad` asks for."""
    if (kl, kl_grad) not in SOUND:
        pairs = ", ".join(f"{k}/{g}" for k, g in sorted(SOUND))
        raise ValueError(f"kl={kl!r} with kl_grad={kl_grad!r} is not sound; kl/kl_grad is one of {pairs}")


def kl_term(
    logprob: float,
    old_logprob: float,
    ref_logprob: float,
    frozen_logprob: float,
    kl: str,
    kl_grad: str,
    max_log_ratio: float,
) -> float:
    """The KL term of one token; under the old policy its expected gradient is that of the named divergence.

    With r = pi / pi_old and sg = stop gradient:
    reverse, KL(pi || ref): r * k1, sg(r) * k2, r * k3 (equation 7 of https://arxiv.org/abs/2512.02556)
    forward, KL(ref || pi): sg(r) * k3
    literal: k2, k3 or |log(pi / ref)| as papers print them
    """
    r = math.exp(bounded(logprob - old_logprob, max_log_ratio))
    frozen_r = math.exp(bounded(frozen_logprob - old_logprob, max_log_ratio))
    if kl == "k1":
        estimate = kl_k1(logprob, ref_logprob)
    elif kl == "k2":
        estimate = kl_k2(logprob, ref_logprob)
    elif kl == "abs":
        estimate = abs(logprob - ref_logprob)
    else:
        estimate = kl_k3(logprob, ref_logprob, max_log_ratio)

    if kl_grad == "literal":
        return estimate
    if kl_grad == "forward" or kl == "k2":
        return frozen_r * estimate
    return r * estimate
