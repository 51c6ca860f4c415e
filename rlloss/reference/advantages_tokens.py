"""Advantages per token and per turn, from the trained tokens of each sequence written out as a list."""

import math
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.advantages import group_advantages
from rlloss.reference.reduce import rows


def returns_to_go(
    token_rewards: ArrayLike, loss_mask: ArrayLike, gamma: float = 1.0, *, cu_seqlens: ArrayLike | None = None
) -> list[list[float]]:
    """What the trained tokens from each on still earn, discounted per trained token; 0 where not trained.

    >>> returns_to_go([[1.0, 9.0, 2.0]], [[True, False, True]], 0.5)
    [[2.0, 0.0, 2.0]]
    """
    reward, mask = rows(token_rewards, cu_seqlens), rows(loss_mask, cu_seqlens)
    returns = [[0.0] * len(row) for row in mask]
    for i, row in enumerate(mask):
        trained = [t for t in range(len(row)) if row[t]]
        for k, t in enumerate(trained):
            returns[i][t] = sum(gamma**j * reward[i][later] for j, later in enumerate(trained[k:]))
    return returns


def optimal_token_baseline(
    returns: ArrayLike,
    logprobs: ArrayLike,
    sum_p2: ArrayLike,
    loss_mask: ArrayLike,
    group_ids: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    singleton: str = "zero",
    cu_seqlens: ArrayLike | None = None,
) -> list[list[float]]:
    """G - sum W G / sum W over the group's k-th trained tokens, W the energy so far: https://arxiv.org/abs/2602.07078.

    >>> optimal_token_baseline([[1.0], [0.0]], [[-1.0], [-1.0]], [[0.5], [0.5]], [[True], [True]], [0, 0])
    [[0.5], [-0.5]]
    """
    earned, logp, squares = rows(returns, cu_seqlens), rows(logprobs, cu_seqlens), rows(sum_p2, cu_seqlens)
    mask, rho = rows(loss_mask, cu_seqlens), rows(token_weights, cu_seqlens)
    group = np.asarray(group_ids).tolist()
    trained = [[t for t in range(len(row)) if row[t]] for row in mask]
    energy: list[list[float]] = []
    for i, places in enumerate(trained):
        so_far, energy_i = 0.0, []
        for t in places:
            so_far += (1.0 - 2.0 * math.exp(logp[i][t]) + squares[i][t]) * (rho[i][t] ** 2 if rho else 1.0)
            energy_i.append(so_far)
        energy.append(energy_i)
    advantages = [[0.0] * len(row) for row in mask]
    for i, places in enumerate(trained):
        for k, t in enumerate(places):
            peers = [j for j in range(len(mask)) if group[j] == group[i] and len(trained[j]) > k]
            total = sum(energy[j][k] for j in peers)
            if len(peers) == 1 or total == 0.0:
                advantages[i][t] = earned[i][t] if singleton == "raw" else 0.0
                continue
            gaps = [energy[j][k] * (earned[i][t] - earned[j][trained[j][k]]) for j in peers]
            advantages[i][t] = sum(gaps) / total
    return advantages


def turn_advantages(
    token_rewards: ArrayLike,
    turn_ids: ArrayLike,
    loss_mask: ArrayLike,
    group_ids: ArrayLike,
    gamma: float = 1.0,
    *,
    state_ids: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    **options: Any,
) -> list[list[float]]:
    """A list of turns with their discounted returns (equation 5 of https://arxiv.org/abs/2505.10978), then groups.

    >>> turn_advantages([[1.0, 2.0], [0.0, 0.0]], [[0, 1], [0, 1]], [[True] * 2] * 2, [0, 0], 0.5, scale="none")
    [[1.0, 1.0], [-1.0, -1.0]]
    """
    reward, mask = rows(token_rewards, cu_seqlens), rows(loss_mask, cu_seqlens)
    turn, state = rows(turn_ids, cu_seqlens), rows(turn_ids if state_ids is None else state_ids, cu_seqlens)
    group = np.asarray(group_ids).tolist()
    turns: list[tuple[int, list[int]]] = []
    returns: list[float] = []
    for i, row in enumerate(mask):
        trained = [t for t in range(len(row)) if row[t]]
        places = [list(run) for _, run in groupby(trained, key=lambda t: turn[i][t])]
        own = [sum(reward[i][t] for t in run) for run in places]
        turns += [(i, run) for run in places]
        returns += [sum(gamma**j * r for j, r in enumerate(own[k:])) for k in range(len(own))]
    keys = [(group[i], state[i][run[0]]) for i, run in turns]
    numbers = [keys.index(key) for key in keys]
    advantages = [[0.0] * len(row) for row in mask]
    for (i, run), advantage in zip(turns, group_advantages(returns, numbers, **options), strict=True):
        for t in run:
            advantages[i][t] = advantage
    return advantages
