"""Advantages of [B] rewards as their papers write them, one formula each, and those of several rewards or subsets."""

import math
import statistics
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.advantages import group_advantages, voters


def preset_advantages(
    name: str,
    rewards: ArrayLike,
    group_ids: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    baselines: ArrayLike | None = None,
    valid: ArrayLike | None = None,
) -> list[float]:
    """The formula of one paper, row by row; invalid rows, and rows without a companion where a group is asked, get 0.

    >>> preset_advantages("max_rl", [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0])
    [3.0, -1.0, -1.0, -1.0]
    """
    reward, group = np.asarray(rewards, dtype=np.float64).tolist(), np.asarray(group_ids).tolist()
    votes = voters(reward, valid)
    length = [] if weights is None else np.asarray(weights, dtype=np.float64).tolist()
    own = [] if baselines is None else np.asarray(baselines, dtype=np.float64).tolist()
    everyone = [i for i in range(len(reward)) if votes[i]]
    peers = {i: [j for j in everyone if group[j] == group[i]] for i in everyone}
    compared = everyone if name == "remax" else [i for i in everyone if len(peers[i]) > 1]
    advantages = [0.0] * len(reward)
    for i in compared:
        of_group = [reward[j] for j in peers[i]]
        mu = statistics.mean(of_group)
        if name == "grpo":  # section 4.1.2 of https://arxiv.org/abs/2402.03300
            advantages[i] = (reward[i] - mu) / (statistics.stdev(of_group) + 1e-6)
        elif name == "lite_ppo":  # https://arxiv.org/abs/2508.08221
            advantages[i] = (reward[i] - mu) / (statistics.stdev([reward[j] for j in everyone]) + 1e-6)
        elif name in ("dr_grpo", "reinforce_pp_baseline", "gpg"):  # https://arxiv.org/abs/2503.20783
            advantages[i] = reward[i] - mu
        elif name == "rloo":  # https://arxiv.org/abs/2402.14740
            advantages[i] = reward[i] - statistics.mean([reward[j] for j in peers[i] if j != i])
        elif name == "max_rl":  # algorithm 1 of https://arxiv.org/abs/2602.02710
            advantages[i] = (reward[i] - mu) / mu if mu > 0 else 0.0
        elif name == "opo":  # https://arxiv.org/abs/2505.23585
            total = sum(length[j] for j in peers[i])
            # differences, of which identical rewards leave none
            advantages[i] = sum(length[j] * (reward[i] - reward[j]) for j in peers[i]) / total
        elif name == "remax":  # https://arxiv.org/abs/2310.10505
            advantages[i] = reward[i] - own[i]
        else:
            raise ValueError(f"preset_advantages: no formula for {name!r}")
    if name == "gpg":  # https://arxiv.org/abs/2504.02546
        informative = [i for i in everyone if len({reward[j] for j in peers[i]}) > 1]
        advantages = [advantage * len(everyone) / max(len(informative), 1) for advantage in advantages]
    if name == "reinforce_pp_baseline":  # https://arxiv.org/abs/2501.03262, every token of every row written out
        tokens = [advantages[i] for i in compared for _ in range(round(length[i]))]
        if len(set(tokens)) > 1:
            mean, variance = statistics.mean(tokens), statistics.variance(tokens)
            for i in compared:
                advantages[i] = (advantages[i] - mean) / math.sqrt(variance + 1e-8)
    return advantages


def gdpo_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    valid: ArrayLike | None = None,
    eps: float = 1e-6,
) -> list[float]:
    """GDPO, https://arxiv.org/abs/2601.05242: each reward in units of its group's deviation, added up, then whitened.

    >>> gdpo_advantages([[3.0], [1.0], [2.0]], [0, 0, 0], eps=0.0)
    [1.0, -1.0, 0.0]
    """
    table = np.asarray(rewards, dtype=np.float64)
    weight = [1.0] * table.shape[1] if weights is None else np.asarray(weights, dtype=np.float64).tolist()
    counts = [True] * len(table) if valid is None else np.asarray(valid).tolist()
    counts = [c and not np.isnan(row).all() for c, row in zip(counts, table, strict=True)]
    added = [0.0] * len(table)
    for k, w in enumerate(weight):
        for i, advantage in enumerate(group_advantages(table[:, k], group_ids, eps=eps, valid=counts)):
            added[i] += w * advantage
    everyone = [x for x, c in zip(added, counts, strict=True) if c]
    if len(everyone) < 2 or not any(everyone):
        return [0.0] * len(table)
    mean, spread = statistics.mean(everyone), statistics.stdev(everyone)
    return [(x - mean) / (spread + eps) if c else 0.0 for x, c in zip(added, counts, strict=True)]


def pass_at_k_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    k: int | None = None,
    *,
    baseline: str = "leave_one_out",
    valid: ArrayLike | None = None,
    eps: float = 1e-6,
) -> list[float]:
    """The best of k, over all k-subsets one by one: https://arxiv.org/abs/2503.19595 and 2508.10751.

    >>> pass_at_k_advantages([1.0, 0.25, 0.5], [0, 0, 0])
    [0.5, 0.0, 0.0]
    """
    reward, group = np.asarray(rewards, dtype=np.float64).tolist(), np.asarray(group_ids).tolist()
    votes = voters(reward, valid)
    advantages = [0.0] * len(reward)
    for i in range(len(reward)):
        peers = [j for j in range(len(reward)) if votes[j] and group[j] == group[i]]
        size = len(peers) if k is None else k
        if not votes[i] or size > len(peers) or len({reward[j] for j in peers}) < 2:
            continue
        low = min(reward[j] for j in peers)
        subsets = list(combinations(peers, size))
        mine = [subset for subset in subsets if i in subset]
        if baseline == "leave_one_out":
            gains = [max(reward[j] for j in s) - max(reward[j] for j in s if j != i) for s in mine]
            advantages[i] = statistics.mean(gains)
        else:
            best = [max(reward[j] - low for j in s) for s in subsets]
            gain = statistics.mean([max(reward[j] - low for j in s) for s in mine]) - statistics.mean(best)
            advantages[i] = gain / (statistics.pstdev(best) + eps) if gain != 0.0 else 0.0
    return advantages
