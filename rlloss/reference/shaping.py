"""Shaped rewards, and the coefficient that steers a KL."""

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.reduce import rows


def kl_shaped_rewards(
    rewards: ArrayLike, kl: ArrayLike, loss_mask: ArrayLike, kl_coef: float, *, cu_seqlens: ArrayLike | None = None
) -> list[list[float]]:
    """A reward per token, equation 2 of https://arxiv.org/abs/1909.08593: R at the last one, minus the KL of each.

    r_t = -kl_coef kl_t + [t is the last counted token] R, for one reward per sequence; 0 where not counted

    >>> kl_shaped_rewards([1.0], [[0.5, 1.0, 9.0]], [[True, True, False]], 0.5)
    [[-0.25, 0.5, 0.0]]
    """
    reward = np.asarray(rewards, dtype=np.float64).tolist()
    cost, mask = rows(kl, cu_seqlens), rows(loss_mask, cu_seqlens)
    shaped: list[list[float]] = []
    for i in range(len(mask)):
        shaped.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                shaped[i].append(0.0)
                continue
            is_last = not any(mask[i][t + 1 :])
            shaped[i].append(-kl_coef * cost[i][t] + (reward[i] if is_last else 0.0))
    return shaped


def overlong_penalty(length: int, max_length: int, buffer_length: int, penalty: float = 1.0) -> float:
    """Soft overlong punishment, equation 13 of https://arxiv.org/abs/2503.14476.

    >>> overlong_penalty(90, 100, 20)
    -0.5
    """
    if length <= max_length - buffer_length:
        return 0.0
    if length <= max_length:
        return penalty * ((max_length - buffer_length) - length) / buffer_length
    return -penalty


def adaptive_kl_coef(kl_coef: float, kl: float, target_kl: float, gain: float) -> float:
    """The next KL coefficient, section 2.2 of https://arxiv.org/abs/1909.08593, with K = `gain`.

    e = clip((kl - target_kl) / target_kl, -0.2, 0.2);  kl_coef <- kl_coef (1 + K e)

    >>> adaptive_kl_coef(0.5, 12.0, 6.0, 1.0)
    0.6
    """
    error = min(max((kl - target_kl) / target_kl, -0.2), 0.2)
    return kl_coef * (1.0 + gain * error)
