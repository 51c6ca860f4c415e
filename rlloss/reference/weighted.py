"""The policy gradient on advantages that a weight without gradient scales: A2C, GPG, CISPO, TIS, TOPR and VESPO."""

import math
from collections.abc import Callable
from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.divergence import bounded
from rlloss.reference.importance import importance_sampling
from rlloss.reference.policy import token_losses
from rlloss.reference.reduce import advantage_rows, as_given, reduced, rows
from rlloss.reference.surrogate import importance_log_ratio


def weighted_losses(
    weight: Callable[[float, float], float],
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ratio_level: str,
    max_log_ratio: float = 20.0,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    **terms: Any,
) -> list[list[float]]:
    """`token_losses` with the policy term -weight(log ratio, A) A logprob, the gradient of the weight stopped."""
    mask = rows(loss_mask, cu_seqlens)
    frozen = rows(logprobs if frozen_logprobs is None else frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    advantage = advantage_rows(advantages, mask, cu_seqlens)
    for i in range(len(mask)):
        for t in range(len(mask[i])):
            if mask[i][t]:
                log_ratio = importance_log_ratio(frozen[i], old[i], mask[i], t, ratio_level)
                advantage[i][t] *= weight(bounded(log_ratio, max_log_ratio), advantage[i][t])
    return token_losses(
        logprobs,
        old_logprobs,
        as_given(advantage, cu_seqlens),
        loss_mask,
        ratio_level="none",
        max_log_ratio=max_log_ratio,
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        **terms,
    )


def a2c(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    entropy_coef: float = 0.01,
    **terms: Any,
) -> float:
    """A2C, https://arxiv.org/abs/1602.01783: log-probs times advantages, and a bonus for entropy.

    loss = -sum_it (A_it logprob_it + entropy_coef entropy_it) / tokens, and the other `terms` of `token_losses`

    >>> a2c([[-1.0]], None, [0.5], [[True]], entropy=[[2.0]])
    0.48
    """
    losses = token_losses(
        logprobs, old_logprobs, advantages, loss_mask, ratio_level="none", entropy_coef=entropy_coef, **terms
    )
    return reduced(losses, "token_mean")


def gpg(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    **terms: Any,
) -> float:
    """GPG, https://arxiv.org/abs/2504.02546: log-probs times group advantages.

    loss = -sum_it A_it logprob_it / tokens, and the other `terms` of `token_losses`

    >>> gpg([[-1.0, -2.0]], None, [0.5], [[True, True]])
    0.75
    """
    losses = token_losses(logprobs, old_logprobs, advantages, loss_mask, ratio_level="none", **terms)
    return reduced(losses, "token_mean")


def cispo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ratio_max: float,
    ratio_min: float = 0.0,
    **terms: Any,
) -> float:
    """CISPO, equations 4 and 5 of https://arxiv.org/abs/2506.13585.

    r_it = pi / pi_old
    loss = -sum_it sg[min(max(r_it, ratio_min), ratio_max)] A_it logprob_it / tokens

    >>> cispo([[-1.0, -2.0]], [[-4.0, -5.0]], [0.5], [[True, True]], ratio_max=2.0)  # 2 * 0.5 * 3 / 2
    1.5
    """

    def weight(log_ratio: float, advantage: float) -> float:
        return min(max(math.exp(log_ratio), ratio_min), ratio_max)

    losses = weighted_losses(weight, logprobs, old_logprobs, advantages, loss_mask, ratio_level="token", **terms)
    return reduced(losses, "token_mean")


def tis(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ratio_max: float = 1.0,
    **terms: Any,
) -> float:
    """Truncated importance sampling as in https://arxiv.org/abs/2503.14286: `importance_sampling` within [0, 1].

    >>> tis([[-1.0, -2.0]], [[-4.0, -5.0]], [0.5], [[True, True]])
    1.5
    """
    return importance_sampling(
        logprobs, old_logprobs, advantages, loss_mask, ratio_min=0.0, ratio_max=ratio_max, **terms
    )


def topr(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    positive_min: float = 1.0,
    positive_max: float = 1.0,
    negative_min: float = 0.0,
    negative_max: float = 1.0,
    **terms: Any,
) -> float:
    """TOPR, equation 7 of https://arxiv.org/abs/2503.14286, whose equation 8 has the limits 1, 1, 0 and 1.

    w_i = prod_t pi / pi_old, [w]_a^b = min(max(w, a), b)
    loss = -(1 / S) sum_i sg[w_i]_a^b A_i log pi(sequence i), with the limits of its sign

    >>> topr([[-1.0], [-1.0]], [[-2.0], [-2.0]], [1.0, -3.0], [[True], [True]])  # (1 - 3) / 2
    -1.0
    """

    def weight(log_ratio: float, advantage: float) -> float:
        if advantage < 0.0:
            return min(max(math.exp(log_ratio), negative_min), negative_max)
        return min(max(math.exp(log_ratio), positive_min), positive_max)

    losses = weighted_losses(weight, logprobs, old_logprobs, advantages, loss_mask, ratio_level="sequence", **terms)
    return reduced(losses, "sequence_sum")


def vespo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    **terms: Any,
) -> float:
    """VESPO, equation 20 of https://arxiv.org/abs/2602.10693v3, divided by all tokens.

    w_i = prod_t pi / pi_old, phi(w) = w^c1 exp(c2 (1 - w)), with (c1, c2) = (k, lambda) of the sign of A
    loss = -sum_it sg[phi(w_i)] A_it logprob_it / tokens

    >>> vespo([[-1.0]], [[-1.0]], [0.5], [[True]])
    0.5
    """

    def weight(log_ratio: float, advantage: float) -> float:
        c1, c2 = (k_pos, lambda_pos) if advantage >= 0.0 else (k_neg, lambda_neg)
        return math.exp(c1 * log_ratio + c2 * (1.0 - math.exp(log_ratio)))

    losses = weighted_losses(weight, logprobs, old_logprobs, advantages, loss_mask, ratio_level="sequence", **terms)
    return reduced(losses, "token_mean")
