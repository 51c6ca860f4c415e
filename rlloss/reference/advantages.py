"""Rewards in, advantages out."""

import math
import statistics

import numpy as np
from numpy.typing import ArrayLike


def group_advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    scale: str = "group",
    *,
    eps: float = 1e-6,
    valid: ArrayLike | None = None,
) -> list[float]:
    """Group-relative advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300: reward - mean of its group.

    `scale="group"` divides by the sample deviation of the group + eps (GRPO), `"batch"` by that of all rewards
    + eps (https://arxiv.org/abs/2508.08221), `"none"` by nothing (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    A row with a NaN reward, or with `valid` False, gets 0 and has no vote; so does a row without a companion.

    >>> group_advantages([1.0, 0.0, 5.0, 7.0], [0, 0, 1, 1], scale="none")
    [0.5, -0.5, -1.0, 1.0]
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_advantages: scale must be 'group', 'batch' or 'none', got {scale!r}")
    reward = np.asarray(rewards, dtype=np.float64).tolist()
    group = np.asarray(group_ids).tolist()
    votes = [True] * len(reward) if valid is None else np.asarray(valid).tolist()
    votes = [vote and not math.isnan(r) for vote, r in zip(votes, reward, strict=True)]
    everyone = [r for r, vote in zip(reward, votes, strict=True) if vote]

    advantages = []
    for i in range(len(reward)):
        peers = [reward[j] for j in range(len(reward)) if votes[j] and group[j] == group[i]]
        if not votes[i] or len(peers) < 2:
            advantages.append(0.0)
            continue
        # statistics is exact in rationals: the mean of three rewards of 0.1 is 0.1, which sum() / 3 misses
        advantage = reward[i] - statistics.mean(peers)
        if scale == "group":
            advantage /= statistics.stdev(peers) + eps
        if scale == "batch":
            advantage /= statistics.stdev(everyone) + eps
        advantages.append(advantage)
    return advantages
