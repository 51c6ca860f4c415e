"""Rewards in, advantages out."""

import math
import statistics
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.reduce import rows


def group_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    scale: str = "group",
    *,
    baseline: str = "mean",
    baselines: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    std: str = "sample",
    floor: float = 0.0,
    per_informative: bool = False,
    singleton: str = "zero",
    eps: float = 1e-6,
    valid: ArrayLike | None = None,
) -> list[float]:
    """Group-relative advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300: reward - mean of its group.

    `scale="group"` divides by the sample deviation of the group + eps (GRPO), `"batch"` by that of all rewards
    + eps (https://arxiv.org/abs/2508.08221), `"none"` by nothing (Dr. GRPO, https://arxiv.org/abs/2503.20783),
    `"mean"` by the group's mean + eps (https://arxiv.org/abs/2602.02710), and `"whiten"` whitens what is left of all
    rows (https://arxiv.org/abs/2501.03262), each counted `weights` times. `baseline="leave_one_out"` is the mean of the
    others (RLOO, https://arxiv.org/abs/2402.14740), `"weighted_mean"` that by `weights`
    (https://arxiv.org/abs/2505.23585). A row with a NaN reward, or with `valid` False, gets 0 and has no vote; a row
    without a companion gets 0, or its reward.

    >>> group_advantages([1.0, 0.0, 5.0, 7.0], [0, 0, 1, 1], scale="none")
    [0.5, -0.5, -1.0, 1.0]
    """
    check_word("scale", scale, ("group", "batch", "none", "mean", "whiten"))
    check_word("baseline", baseline, ("mean", "leave_one_out", "weighted_mean", "batch", "none", "given"))
    check_word("std", std, ("sample", "population"))
    reward = np.asarray(rewards, dtype=np.float64).tolist()
    group = np.asarray(group_ids).tolist()
    own = [0.0] * len(reward) if baselines is None else np.asarray(baselines, dtype=np.float64).tolist()
    weight = [1.0] * len(reward) if weights is None else np.asarray(weights, dtype=np.float64).tolist()
    votes = [vote and not math.isnan(b) for vote, b in zip(voters(reward, valid), own, strict=True)]
    everyone = [j for j in range(len(reward)) if votes[j]]
    spread = statistics.stdev if std == "sample" else statistics.pstdev
    of_batch = spread([reward[j] for j in everyone]) if len(everyone) > 1 else 0.0

    advantages, lone = [0.0] * len(reward), []
    for i in everyone:
        peers = [j for j in everyone if group[j] == group[i]]
        asks_group = baseline in ("mean", "leave_one_out", "weighted_mean") or scale in ("group", "mean")
        weightless = baseline == "weighted_mean" and sum(weight[j] for j in peers) == 0
        if asks_group and (len(peers) == 1 or weightless):
            lone.append(i)
            continue
        advantages[i] = reward[i] - baseline_of(i, baseline, reward, weight, own, peers, everyone)
        mean = statistics.mean([reward[j] for j in peers])
        if advantages[i] == 0.0 or (scale == "mean" and mean <= 0):
            advantages[i] = 0.0
        elif scale == "group":
            advantages[i] /= max(spread([reward[j] for j in peers]), floor * of_batch) + eps
        elif scale == "batch":
            advantages[i] /= of_batch + eps
        elif scale == "mean":
            advantages[i] /= mean + eps
    if scale == "whiten":
        counted = {j: weight[j] for j in everyone if j not in lone}
        total = sum(counted.values())
        mean = sum(w * advantages[j] for j, w in counted.items()) / max(total, 1.0)
        square = sum(w * (advantages[j] - mean) ** 2 for j, w in counted.items())
        variance = square / max(total - 1 if std == "sample" else total, 1.0)
        for j in counted:
            advantages[j] = (advantages[j] - mean) / math.sqrt(variance + eps) if advantages[j] != mean else 0.0
    if per_informative:
        teach = informative_groups(rewards, group_ids, valid=votes)
        advantages = [advantage * len(everyone) / max(sum(teach), 1) for advantage in advantages]
    for i in lone:
        advantages[i] = reward[i] if singleton == "raw" else 0.0
    return advantages


def baseline_of(
    i: int,
    kind: str,
    reward: list[float],
    weight: list[float],
    own: list[float],
    peers: list[int],
    everyone: list[int],
) -> float:
    """What row i's reward is measured against; `statistics` is exact in rationals: 0.1 is the mean of three 0.1."""
    if kind == "mean":
        return statistics.mean([reward[j] for j in peers])
    if kind == "leave_one_out":
        return statistics.mean([reward[j] for j in peers if j != i])
    if kind == "weighted_mean":
        total = sum(Fraction(weight[j]) for j in peers)
        return float(sum(Fraction(weight[j]) * Fraction(reward[j]) for j in peers) / total)
    if kind == "batch":
        return statistics.mean([reward[j] for j in everyone])
    return own[i] if kind == "given" else 0.0


def check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    """Raises ValueError for a word that is none of `words`."""
    if word not in words:
        raise ValueError(f"group_advantages: {name} must be one of {', '.join(words)}, got {word!r}")


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
    gae_lambda: float | ArrayLike,
    last_value: ArrayLike | None = None,
    *,
    value_lambda: float | None = None,
    cu_seqlens: ArrayLike | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Generalised advantage estimation, equation 16 of https://arxiv.org/abs/1506.02438, and advantage + value.

    delta_k = r_k + gamma V(s_{k+1}) - V(s_k);  A_k = sum_l (gamma gae_lambda)^l delta_{k+l}

    k counts the trained tokens of a sequence; behind its last one stands `last_value`, else 0. The sum is written
    out for every token. `gae_lambda` is one number or one per sequence; the returns have `value_lambda` where it is
    given (https://arxiv.org/abs/2504.05118).

    >>> gae([[0.0, 9.0, 1.0]], [[0.5, 9.0, 0.5]], [[True, False, True]], 1.0, 0.5)
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    reward, value, mask = rows(rewards, cu_seqlens), rows(values, cu_seqlens), rows(loss_mask, cu_seqlens)
    end = [0.0] * len(mask) if last_value is None else np.asarray(last_value, dtype=np.float64).tolist()
    lambdas = np.broadcast_to(np.asarray(gae_lambda, dtype=np.float64), (len(mask),)).tolist()
    advantages = [[0.0] * len(row) for row in mask]
    returns = [[0.0] * len(row) for row in mask]
    for i in range(len(mask)):
        trained = [t for t in range(len(mask[i])) if mask[i][t]]
        states = [value[i][t] for t in trained] + [end[i]]
        deltas = [reward[i][t] + gamma * states[k + 1] - states[k] for k, t in enumerate(trained)]
        of_value = lambdas[i] if value_lambda is None else value_lambda
        for k, t in enumerate(trained):
            advantage = above = 0.0
            for j in range(len(deltas) - k):
                advantage += (gamma * lambdas[i]) ** j * deltas[k + j]
                above += (gamma * of_value) ** j * deltas[k + j]
            advantages[i][t] = advantage
            returns[i][t] = above + states[k]
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
