"""Rewards in, advantages out."""

import math
import statistics

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.reduce import rows


def group_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    scale: str = "group",
    *,
    baseline: str = "mean",
    eps: float = 1e-6,
    valid: ArrayLike | None = None,
) -> list[float]:
    """Group-relative advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300: reward - mean of its group.

    `scale="group"` divides by the sample deviation of the group + eps (GRPO), `"batch"` by that of all rewards
    + eps (https://arxiv.org/abs/2508.08221), `"none"` by nothing (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    `baseline="leave_one_out"` is the mean of the others (RLOO, https://arxiv.org/abs/2402.14740).
    A row with a NaN reward, or with `valid` False, gets 0 and has no vote; so does a row without a companion.

    >>> group_advantages([1.0, 0.0, 5.0, 7.0], [0, 0, 1, 1], scale="none")
    [0.5, -0.5, -1.0, 1.0]
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_advantages: scale must be 'group', 'batch' or 'none', got {scale!r}")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"group_advantages: baseline must be 'mean' or 'leave_one_out', got {baseline!r}")
    reward = np.asarray(rewards, dtype=np.float64).tolist()
    group = np.asarray(group_ids).tolist()
    votes = voters(reward, valid)
    everyone = [r for r, vote in zip(reward, votes, strict=True) if vote]

    advantages = []
    for i in range(len(reward)):
        others = [reward[j] for j in range(len(reward)) if votes[j] and group[j] == group[i] and j != i]
        if not votes[i] or not others:
            advantages.append(0.0)
            continue
        peers = [reward[i], *others]
        # statistics is exact in rationals: the mean of three rewards of 0.1 is 0.1, which sum() / 3 misses
        advantage = reward[i] - statistics.mean(peers if baseline == "mean" else others)
        if scale == "group":
            advantage /= statistics.stdev(peers) + eps
        if scale == "batch":
            advantage /= statistics.stdev(everyone) + eps
        advantages.append(advantage)
    return advantages


def informative_groups(rewards: ArrayLike, group_ids: ArrayLike, *, valid: ArrayLike | None = None) -> list[bool]:
    """Whose group has two different rewards, the condition of equation 11 of https://arxiv.org/abs/2503.14476.

    >>> informative_groups([1.0, 0.0, 1.0, 1.0], [7, 7, 8, 8])
    [True, True, False, False]
    """
    reward = np.asarray(rewards, dtype=np.float64).tolist()
    group = np.asarray(group_ids).tolist()
    votes = voters(reward, valid)
    informative = []
    for i in range(len(reward)):
        different = {reward[j] for j in range(len(reward)) if votes[j] and group[j] == group[i]}
        informative.append(votes[i] and len(different) > 1)
    return informative


def voters(reward: list[float], valid: ArrayLike | None) -> list[bool]:
    """The rows that count: valid, and with a reward that is a number."""
    votes = [True] * len(reward) if valid is None else np.asarray(valid).tolist()
    return [vote and not math.isnan(r) for vote, r in zip(votes, reward, strict=True)]


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    loss_mask: ArrayLike,
    gamma: float,
    gae_lambda: float,
    last_value: ArrayLike | None = None,
    *,
    cu_seqlens: ArrayLike | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Generalised advantage estimation, equation 16 of https://arxiv.org/abs/1506.02438, and advantage + value.

    delta_k = r_k + gamma V(s_{k+1}) - V(s_k);  A_k = sum_l (gamma gae_lambda)^l delta_{k+l}

    k counts the trained tokens of a sequence; behind its last one stands `last_value`, else 0. The sum is written
    out for every token.

    >>> gae([[0.0, 9.0, 1.0]], [[0.5, 9.0, 0.5]], [[True, False, True]], 1.0, 0.5)
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    reward, value, mask = rows(rewards, cu_seqlens), rows(values, cu_seqlens), rows(loss_mask, cu_seqlens)
    end = [0.0] * len(mask) if last_value is None else np.asarray(last_value, dtype=np.float64).tolist()
    advantages = [[0.0] * len(row) for row in mask]
    returns = [[0.0] * len(row) for row in mask]
    for i in range(len(mask)):
        trained = [t for t in range(len(mask[i])) if mask[i][t]]
        states = [value[i][t] for t in trained] + [end[i]]
        deltas = [reward[i][t] + gamma * states[k + 1] - states[k] for k, t in enumerate(trained)]
        for k, t in enumerate(trained):
            advantage = 0.0
            for j in range(len(deltas) - k):
                advantage += (gamma * gae_lambda) ** j * deltas[k + j]
            advantages[i][t] = advantage
            returns[i][t] = advantage + states[k]
    return advantages, returns


def whiten(x: ArrayLike, loss_mask: ArrayLike, *, center: bool = True, eps: float = 1e-8) -> list:
    """Whitening: (x - mean) / sqrt(var + eps) of the counted entries, var with n - 1; others are 0.

    Without `center` the mean is added back. Any shape.

    >>> whiten([1.0, 2.0, 3.0, 9.0], [True, True, True, False], eps=0.0)
    [-1.0, 0.0, 1.0, 0.0]
    """
    values = np.asarray(x, dtype=np.float64)
    mask = np.asarray(loss_mask).ravel().tolist()
    counted = [value for value, m in zip(values.ravel().tolist(), mask, strict=True) if m]
    # statistics is exact in rationals: identical values are their mean
    mean = statistics.mean(counted) if counted else 0.0
    variance = statistics.variance(counted) if len(counted) > 1 else 0.0
    whitened = []
    for value, m in zip(values.ravel().tolist(), mask, strict=True):
        if not m:
            whitened.append(0.0)
            continue
        centred = value - mean
        scaled = centred / math.sqrt(variance + eps) if centred != 0.0 else 0.0
        whitened.append(scaled if center else scaled + mean)
    return np.asarray(whitened).reshape(values.shape).tolist()
