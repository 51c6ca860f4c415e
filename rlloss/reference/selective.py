"""Losses that treat some tokens of a whole step differently: Clip-Cov, KL-Cov and M2PO."""

import math
from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.divergence import kl_k3
from rlloss.reference.reduce import advantage_rows, mean, reduced, rows
from rlloss.reference.sequence import Sequence, surrogate_losses
from rlloss.reference.surrogate import importance_ratio, surrogate

Place = tuple[int, int]


def counted_tokens(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    **_: Any,
) -> dict[Place, tuple[float, float, float]]:
    """(pi's log-prob, log(pi / pi_old), advantage) of the tokens with a weight, by place, one row after the other.

    A choice is not differentiated, so that pi is the frozen one.
    """
    mask = rows(loss_mask, cu_seqlens)
    new = rows(logprobs if frozen_logprobs is None else frozen_logprobs, cu_seqlens)
    old = new if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)
    advantage = advantage_rows(advantages, mask, cu_seqlens)
    return {
        (i, t): (new[i][t], new[i][t] - old[i][t], advantage[i][t])
        for i in range(len(mask))
        for t in range(len(mask[i]))
        if mask[i][t] and weight[i][t] != 0.0
    }


def covariances(tokens: dict[Place, tuple[float, float, float]]) -> dict[Place, float]:
    """(l - mean l) (A - mean A), equation 10 of https://arxiv.org/abs/2505.22617.

    >>> covariances({(0, 0): (-1.0, 0.0, 2.0), (0, 1): (-3.0, 0.0, 1.0)})
    {(0, 0): 0.5, (0, 1): 0.5}
    """
    mean_logprob = mean([token[0] for token in tokens.values()])
    mean_advantage = mean([token[2] for token in tokens.values()])
    return {place: (token[0] - mean_logprob) * (token[2] - mean_advantage) for place, token in tokens.items()}


def hashed(number: int, seed: int) -> int:
    """What orders the draw of Clip-Cov: mix(number xor mix(seed xor 0x9e3779b9)), in 32 bits.

    mix(x): twice x = ((x >> 16) xor x) * 0x45d9f3b mod 2^32, then (x >> 16) xor x

    >>> hashed(0, seed=0), hashed(1, seed=0)
    (4243941292, 1402979721)
    """

    def mix(x: int) -> int:
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return (x >> 16) ^ x

    return mix(number ^ mix(seed ^ 0x9E3779B9))


def clip_cov(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    fraction: float = 2e-4,
    cov_min: float = 1.0,
    cov_max: float = 5.0,
    seed: int = 0,
    clip_eps_low: float = 1.0,
    clip_eps_high: float = 1.0,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """Clip-Cov, equations 10 to 12 of https://arxiv.org/abs/2505.22617, with PPO's clip as in its listing 1.

    I: floor(fraction N) of the tokens with cov_min <= cov <= cov_max, those of least hash of their number among the N
    loss = sum_it [it not in I] surrogate_it / tokens, and the other `terms` of `token_losses`

    >>> clip_cov([[-0.1, -9.0]], None, [[1.0, -1.0]], [[True, True]], fraction=0.5)  # the second is drawn
    -0.5
    """
    tokens = counted_tokens(logprobs, old_logprobs, advantages, loss_mask, **terms)
    covariance = covariances(tokens)
    places = list(tokens)
    candidates = [n for n in range(len(places)) if cov_min <= covariance[places[n]] <= cov_max]
    candidates.sort(key=lambda n: hashed(n, seed))
    chosen = {places[n] for n in candidates[: math.floor(fraction * len(places))]}

    def term(of: Sequence, t: int) -> float:
        if (of.number, t) in chosen:
            return 0.0
        ratio = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        return surrogate(ratio, of.advantage[t], clip_eps_low, clip_eps_high, dual_clip)

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "token_mean")


def kl_cov(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    fraction: float = 2e-3,
    penalty_coef: float = 1.0,
    penalty: str = "abs",
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """KL-Cov, equations 10, 13 and 14 of https://arxiv.org/abs/2505.22617.

    I: the floor(fraction N) of the N tokens with the largest covariance, the first of equal ones
    loss = sum_it [-ratio_it A_it + penalty_coef [it in I] penalty_it] / tokens, and the other `terms` of
    `token_losses`; the penalty is |log(pi / pi_old)|, that of listing 1, or k3 of KL(pi_old || pi)

    >>> kl_cov([[-1.0, -2.0]], [[-1.5, -2.0]], [[0.0, -1.0]], [[True, True]], fraction=0.5)  # (0.5 + 1) / 2
    0.75
    """
    covariance = covariances(counted_tokens(logprobs, old_logprobs, advantages, loss_mask, **terms))
    ranked = sorted(covariance, key=lambda place: -covariance[place])
    chosen = set(ranked[: math.floor(fraction * len(ranked))])

    def term(of: Sequence, t: int) -> float:
        ratio = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        loss = -ratio * of.advantage[t]
        if (of.number, t) in chosen:
            k3 = kl_k3(of.old[t], of.new[t], max_log_ratio)
            loss += penalty_coef * (abs(of.new[t] - of.old[t]) if penalty == "abs" else k3)
        return loss

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "token_mean")


def m2po(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    threshold: float = 0.04,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """M2PO, algorithm 1 and equation 5 of https://arxiv.org/abs/2510.01161.

    T: the tokens whose log(pi / pi_old) has the sign of A; the largest square leaves T until their mean is within the
    threshold
    loss = -sum_it [it has not left T] ratio_it A_it / tokens, and the other `terms` of `token_losses`

    >>> m2po([[-1.0, -1.0]], [[-1.0, -1.5]], [1.0], [[True, True]])  # the second one leaves
    -0.5
    """
    tokens = counted_tokens(logprobs, old_logprobs, advantages, loss_mask, **terms)
    squares = {
        place: log_ratio**2
        for place, (_, log_ratio, advantage) in tokens.items()
        if (log_ratio > 0.0 and advantage > 0.0) or (log_ratio < 0.0 and advantage < 0.0)
    }
    gone = set()
    while squares and mean(list(squares.values())) > threshold:
        largest = max(squares, key=lambda place: squares[place])
        gone.add(largest)
        del squares[largest]

    def term(of: Sequence, t: int) -> float:
        ratio = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        return 0.0 if (of.number, t) in gone else -ratio * of.advantage[t]

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "token_mean")
