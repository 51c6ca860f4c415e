"""Surrogates of a sequence's ratios together, or of a gate: GMPO, GSPO-token, LUSPO and SAPO."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.divergence import bounded
from rlloss.reference.policy import token_losses
from rlloss.reference.reduce import advantage_rows, mean, reduced, rows
from rlloss.reference.surrogate import importance_log_ratio, importance_ratio, surrogate


class Sequence(NamedTuple):
    """The rows of one sequence."""

    new: list[float]
    frozen: list[float]
    old: list[float]
    mask: list[float]
    advantage: list[float]
    ref: list[float]  # empty without a reference
    number: int  # of the sequence in the batch


def surrogate_losses(
    term: Callable[[Sequence, int], float],
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    **terms: Any,
) -> list[list[float]]:
    """`token_losses` with term(sequence, t) as the policy term of token t."""
    mask = rows(loss_mask, cu_seqlens)
    new = rows(logprobs, cu_seqlens)
    frozen = new if frozen_logprobs is None else rows(frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    ref = rows(terms.get("ref_logprobs"), cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)
    advantage = advantage_rows(advantages, mask, cu_seqlens)
    losses = token_losses(  # KL and entropy alone
        logprobs,
        old_logprobs,
        np.zeros(np.shape(loss_mask)),
        loss_mask,
        ratio_level="none",
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        **terms,
    )
    for i in range(len(mask)):
        sequence = Sequence(new[i], frozen[i], old[i], mask[i], advantage[i], ref[i] if ref else [], i)
        counted = [t for t in range(len(mask[i])) if mask[i][t]]
        for k in range(len(counted)):
            if weight[i][counted[k]] != 0.0:
                losses[i][k] += weight[i][counted[k]] * term(sequence, counted[k])
    return losses


def sapo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """SAPO, equations 5 and 6 of https://arxiv.org/abs/2511.20347.

    f(r) = (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg
    loss = -(1 / S) sum_i (1 / L_i) sum_t f(pi / pi_old) A_it

    >>> sapo([[-1.0, -1.0]], None, [0.5], [[True, True]])
    -1.0
    """

    def term(of: Sequence, t: int) -> float:
        r = importance_ratio(of.new, of.old, of.mask, t, "token", max_log_ratio)
        tau = tau_pos if of.advantage[t] > 0.0 else tau_neg
        return -4.0 / tau / (1.0 + math.exp(-tau * (r - 1.0))) * of.advantage[t]

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "sequence_mean")


def gspo_token(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_low: float = 3e-4,
    clip_eps_high: float = 4e-4,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """GSPO-token, equations 13 and 14 of https://arxiv.org/abs/2507.18071.

    s_i = exp((1 / L_i) sum_t log(pi / pi_old)), s_it = sg[s_i] pi / sg[pi]
    loss = (1 / S) sum_i (1 / L_i) sum_t surrogate(s_it, A_it)

    >>> gspo_token([[-1.0, -1.0]], [[-2.0, 0.0]], [[0.5, 1.5]], [[True, True]])
    -1.0
    """

    def term(of: Sequence, t: int) -> float:
        log_s = importance_log_ratio(of.frozen, of.old, of.mask, t, "geometric")
        s = math.exp(bounded(log_s + of.new[t] - of.frozen[t], max_log_ratio))
        return surrogate(s, of.advantage[t], clip_eps_low, clip_eps_high, dual_clip)

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "sequence_mean")


def gmpo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_log_ratio_low: float = 0.4,
    clip_log_ratio_high: float = 0.4,
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """GMPO, https://arxiv.org/abs/2507.20673.

    c_iu = s min(s log r_iu, s clip(log r_iu, -clip_log_ratio_low, clip_log_ratio_high)), s the sign of A
    loss = -(1 / S) sum_i A_i (prod_u exp(c_iu))^(1 / L_i)

    Advantages per token: the mean over t of that product for the sign of A_it, times A_it.

    >>> gmpo([[-1.0, -1.0]], [[-3.0, -0.6]], [0.5], [[True, True]])  # 2 is held at 0.4, and -0.4 is as it is
    -0.5
    """

    def term(of: Sequence, t: int) -> float:
        s = 1.0 if of.advantage[t] > 0.0 else -1.0
        clipped = []
        for u in range(len(of.mask)):
            if of.mask[u]:
                log_r = importance_log_ratio(of.new, of.old, of.mask, u, "token")
                held = min(max(log_r, -clip_log_ratio_low), clip_log_ratio_high)
                clipped.append(s * min(s * log_r, s * held))
        return -math.exp(bounded(mean(clipped), max_log_ratio)) * of.advantage[t]

    losses = surrogate_losses(term, logprobs, old_logprobs, advantages, loss_mask, max_log_ratio=max_log_ratio, **terms)
    return reduced(losses, "sequence_mean")


def luspo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_low: float = 2e-3,
    clip_eps_high: float = 2.5e-3,
    **terms: Any,
) -> float:
    """LUSPO, https://arxiv.org/abs/2602.05261: GSPO, each sequence's loss times its length.

    s_i = exp((1 / L_i) sum_t log(pi / pi_old))
    loss = (1 / S) sum_i sum_t loss_t, with s_i as the ratio of `token_losses` of `terms`

    >>> luspo([[-1.0, -1.0]], [[-2.0, 0.0]], [0.5], [[True, True]])
    -1.0
    """
    losses = token_losses(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        ratio_level="geometric",
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        **terms,
    )
    return reduced(losses, "sequence_sum")
