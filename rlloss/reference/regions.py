"""Losses that keep the policy near another: by a square, a drift, a divergence, a mask, or a weight."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.divergence import bounded
from rlloss.reference.policy import token_losses
from rlloss.reference.reduce import as_given, mean, reduced, rows
from rlloss.reference.sequence import Sequence, surrogate_losses
from rlloss.reference.surrogate import importance_log_ratio, importance_ratio, surrogate


def kimi(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    tau: float = 0.1,
    ratio_level: str = "sequence",
    **terms: Any,
) -> float:
    """Kimi k1.5, equation 3 of https://arxiv.org/abs/2501.12599: `dro` with the old policy for an anchor.

    >>> kimi([[-1.0, -2.0]], [[-2.0, -3.0]], [2.0], [[True, True]], tau=0.5)
    7.0
    """
    return dro(logprobs, old_logprobs, advantages, loss_mask, tau=tau, ratio_level=ratio_level, anchor="old", **terms)


def dro(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    tau: float = 1.0,
    ratio_level: str = "sequence",
    anchor: str = "reference",
    **terms: Any,
) -> float:
    """DRO, equation 8 of https://arxiv.org/abs/2405.19107, divided by tau.

    D_i = sum_t log(pi / ref), or D_t = log(pi / ref) of the token, and d_t always that of the token
    loss = (1 / S) sum_i sum_t [-A_it logprob_it + (tau / 2) D d_it], and the other `terms` of `token_losses`

    Where all weights are 1, the second term sums to (tau / 2) D_i^2.

    >>> dro([[-1.0, -2.0]], None, [2.0], [[True, True]], ref_logprobs=[[-2.0, -3.0]])
    8.0
    """

    def term(of: Sequence, t: int) -> float:
        origin = of.ref if anchor == "reference" else of.old
        drift = importance_log_ratio(of.new, origin, of.mask, t, ratio_level)
        return -of.advantage[t] * of.new[t] + tau / 2.0 * drift * (of.new[t] - origin[t])

    return reduced(surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, **terms), "sequence_sum")


def a_star_po(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    beta: float = 1e-3,
    **terms: Any,
) -> float:
    """A*-PO, https://arxiv.org/abs/2505.20686: least squares on the optimal policy's advantage r - V*.

    loss = (1 / S) sum_i (beta sum_t log(pi / ref) - A_i)^2, and the other `terms` of `token_losses`

    >>> a_star_po([[-1.0, -2.0]], None, [3.0], [[True, True]], ref_logprobs=[[-2.0, -3.0]], beta=0.5)
    4.0
    """

    def term(of: Sequence, t: int) -> float:
        return (beta * importance_log_ratio(of.new, of.ref, of.mask, t, "sequence") - of.advantage[t]) ** 2

    return reduced(surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, **terms), "sequence_mean")


def cpgd(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    drift_coef: float = 0.01,
    drift_clip: float = 0.2,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """CPGD, equation 2 of https://arxiv.org/abs/2505.12504, as the mean over all tokens.

    phi_t = min(d_t A_t, clip(d_t, log(1 - clip_eps_low), log(1 + clip_eps_high)) A_t), d_t = log(pi / pi_old)
    loss = sum_it [-phi_it + drift_coef min(ratio_it - 1, drift_clip) logprob_it] / tokens, the ratio's gradient
    stopped, and the other `terms` of `token_losses`

    >>> cpgd([[-1.0]], [[-2.0]], [-2.0], [[True]], drift_coef=0.1)  # 2 + 0.1 * 0.2 * -1
    1.98
    """
    low = math.log(1.0 - clip_eps_low) if clip_eps_low < 1.0 else -math.inf

    def term(of: Sequence, t: int) -> float:
        log_ratio = of.new[t] - of.old[t]
        clipped = min(max(log_ratio, low), math.log(1.0 + clip_eps_high))
        ratio = importance_ratio(of.frozen, of.old, of.mask, t, "token", max_log_ratio)
        phi = min(log_ratio * of.advantage[t], clipped * of.advantage[t])
        return -phi + drift_coef * min(ratio - 1.0, drift_clip) * of.new[t]

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "token_mean")


def binary_divergence(logprob: float, old_logprob: float, kind: str) -> float:
    """The total variation (`tv`) or KL divergence (`kl`) of pi from pi_old, of one token against all others.

    Equations 13 and 14 of https://arxiv.org/abs/2602.04879.

    >>> round(binary_divergence(math.log(0.75), math.log(0.5), "tv"), 12)
    0.25
    """
    p, q = min(math.exp(logprob), 1.0), min(math.exp(old_logprob), 1.0)
    if kind == "tv":
        return abs(q - p)
    if kind != "kl":
        raise ValueError(f"binary_divergence: kind must be 'tv' or 'kl', got {kind!r}")
    total = 0.0
    for mine, theirs in ((p, q), (1.0 - p, 1.0 - q)):
        if theirs > 0.0:
            total += theirs * math.log(theirs / mine) if mine > 0.0 else math.inf
    return total


def dppo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    divergence: str = "tv",
    threshold_low: float | None = None,
    threshold_high: float | None = None,
    ratio_max: float = math.inf,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """DPPO, equations 12 and 23 of https://arxiv.org/abs/2602.04879.

    loss = -(1 / S) sum_i sum_t M_it min(ratio_it, ratio_max) A_it, and the other `terms` of `token_losses`

    M is 0 where the divergence is beyond the threshold of the advantage's sign and the ratio is on the side of 1 that
    the advantage drives it to. M is not differentiated, and of the minimum only the ratio is.

    >>> dppo([[math.log(0.6)]], [[math.log(0.5)]], [1.0], [[True]], threshold_high=0.2)
    -1.2
    >>> dppo([[math.log(0.6)]], [[math.log(0.5)]], [1.0], [[True]], threshold_high=0.05)
    0.0
    """
    default = {"tv": 0.15, "kl": 0.05}[divergence]
    low = default if threshold_low is None else threshold_low
    high = default if threshold_high is None else threshold_high

    def term(of: Sequence, t: int) -> float:
        apart = binary_divergence(of.frozen[t], of.old[t], divergence)
        frozen = importance_ratio(of.frozen, of.old, of.mask, t, "token", max_log_ratio)
        if of.advantage[t] > 0.0 and frozen > 1.0 and apart > high:
            return 0.0
        if of.advantage[t] < 0.0 and frozen < 1.0 and apart > low:
            return 0.0
        ratio = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        return -ratio * min(1.0, ratio_max / frozen) * of.advantage[t]

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "sequence_sum")


def opsm(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    threshold: float,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """GRPO with off-policy sequence masking, equations 8 and 9 of https://arxiv.org/abs/2512.02556.

    M_it = 0 where A_it < 0 and (1 / L_i) sum_t log(pi_old / pi) > threshold, else 1, its gradient stopped
    loss = (1 / S) sum_i (1 / L_i) sum_t M_it surrogate_it, and the other `terms` of `token_losses`

    >>> opsm([[-1.0]], [[-0.9]], [-1.0], [[True]], threshold=0.05)
    0.0
    """

    def term(of: Sequence, t: int) -> float:
        fallen = -importance_log_ratio(of.frozen, of.old, of.mask, t, "geometric")
        if of.advantage[t] < 0.0 and fallen > threshold:
            return 0.0
        ratio = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        return surrogate(ratio, of.advantage[t], clip_eps_low, clip_eps_high, dual_clip)

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "sequence_mean")


def decoupled_ppo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    rollout_logprobs: ArrayLike,
    ratio_max: float = math.inf,
    max_log_ratio: float = 20.0,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    **terms: Any,
) -> float:
    """Decoupled PPO, https://arxiv.org/abs/2110.00641: clipped around pi_old, sampled from pi_rollout.

    w_it = min(pi_old / pi_rollout, ratio_max), its gradient stopped
    loss = sum_it w_it loss_it / tokens, with `token_losses` of `terms`

    >>> decoupled_ppo([[-1.0]], None, [0.5], [[True]], rollout_logprobs=[[-3.0]], ratio_max=3.0)
    -1.5
    """
    frozen = rows(logprobs if frozen_logprobs is None else frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    rollout = rows(rollout_logprobs, cu_seqlens)
    given = np.ones(np.shape(loss_mask)) if token_weights is None else token_weights
    weights = rows(given, cu_seqlens)
    for i in range(len(weights)):
        for t in range(len(weights[i])):
            log_ratio = bounded(old[i][t] - rollout[i][t], max_log_ratio)
            weights[i][t] *= min(math.exp(log_ratio), ratio_max)
    losses = token_losses(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        token_weights=as_given(weights, cu_seqlens),
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        max_log_ratio=max_log_ratio,
        **terms,
    )
    return reduced(losses, "token_mean")


def optimal_value(rewards: ArrayLike, group_ids: ArrayLike, beta: float, valid: ArrayLike | None = None) -> list[float]:
    """V* = beta log mean exp(r / beta) of every row's group, https://arxiv.org/abs/2505.20686.

    Rows with a NaN reward or without validity have no say; a group without any other has no value.

    >>> optimal_value([2.0, 2.0, math.nan], [5, 5, 7], beta=0.5)
    [2.0, 2.0, nan]
    """
    r, ids = np.asarray(rewards, np.float64).tolist(), np.asarray(group_ids).tolist()
    counts = [True] * len(r) if valid is None else np.asarray(valid).tolist()
    values = []
    for group in ids:
        own = [r[j] for j in range(len(r)) if ids[j] == group and counts[j] and not math.isnan(r[j])]
        values.append(
            max(own) + beta * math.log(mean([math.exp((x - max(own)) / beta) for x in own])) if own else math.nan
        )
    return values
