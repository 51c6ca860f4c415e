"""Preferences over pairs, of both log-ratios: each answer has a target of its own, or the step has a statistic."""

from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.preference import floats, log_sigmoid, logistic, margins, mean_of_counted, per_pair, sigmoid


def log_ratios(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None,
    ref_rejected_logps: ArrayLike | None,
    reference_free: bool,
) -> tuple[list[float], list[float]]:
    """Every pair's log-ratios to the reference, of the chosen and of the rejected answer."""
    nothing = np.zeros(len(floats(chosen_logps)))
    chosen = margins(chosen_logps, nothing, ref_chosen_logps, nothing, reference_free)
    return chosen, margins(rejected_logps, nothing, ref_rejected_logps, nothing, reference_free)


def nca(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
) -> float:
    """NCA on pairs, https://arxiv.org/abs/2402.05369.

    loss = mean over pairs of -log s(beta c) - 1/2 (log s(-beta c) + log s(-beta r)), s = sigmoid

    >>> nca([-1.0], [-1.0], [-1.0], [-1.0]) == 2 * logistic(0.0, 0.0)
    True
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    losses = []
    for i in range(len(chosen)):
        c, r = strength[i] * chosen[i], strength[i] * rejected[i]
        losses.append(-log_sigmoid(c) - 0.5 * (log_sigmoid(-c) + log_sigmoid(-r)))
    return mean_of_counted(losses, mask, weights)


def sppo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    chosen_win_rate: ArrayLike | float = 1.0,
    rejected_win_rate: ArrayLike | float = 0.0,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
) -> float:
    """SPPO, https://arxiv.org/abs/2405.00675, with eta = 1 / beta.

    loss = mean over pairs of the squares of log-ratio - eta (win rate - 1/2), of both answers

    >>> sppo([-1.0], [-1.0], [-1.0], [-1.0], beta=0.25)
    8.0
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    wins = [per_pair(rate, len(chosen)) for rate in (chosen_win_rate, rejected_win_rate)]
    losses = []
    for i in range(len(chosen)):
        eta = 1.0 / strength[i]
        losses.append((chosen[i] - eta * (wins[0][i] - 0.5)) ** 2 + (rejected[i] - eta * (wins[1][i] - 0.5)) ** 2)
    return mean_of_counted(losses, mask, weights)


def apo_zero(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
) -> float:
    """APO-zero, https://arxiv.org/abs/2408.06266: mean over pairs of 1 - sigmoid(beta c) + sigmoid(beta r).

    >>> apo_zero([-1.0], [-1.0], [-1.0], [-1.0])
    1.0
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    losses = [1.0 - sigmoid(strength[i] * chosen[i]) + sigmoid(strength[i] * rejected[i]) for i in range(len(chosen))]
    return mean_of_counted(losses, mask, weights)


def apo_down(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
) -> float:
    """APO-down, https://arxiv.org/abs/2408.06266: mean over pairs of sigmoid(beta c) + 1 - sigmoid(beta (c - r)).

    >>> apo_down([-1.0], [-1.0], [-1.0], [-1.0])
    1.0
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    falls = [sigmoid(strength[i] * chosen[i]) for i in range(len(chosen))]
    losses = [falls[i] + 1.0 - sigmoid(strength[i] * (chosen[i] - rejected[i])) for i in range(len(chosen))]
    return mean_of_counted(losses, mask, weights)


def counted_mean(values: list[float], mask: ArrayLike | None, weights: ArrayLike | None) -> float:
    """The mean over the pairs that count and are not rejected by weight 0; 0 where there is none."""
    counts = [True] * len(values) if mask is None else np.asarray(mask).tolist()
    weight = [1.0] * len(values) if weights is None else floats(weights)
    kept = [values[i] for i in range(len(values)) if counts[i] and weight[i] != 0.0]
    return sum(kept) / len(kept) if kept else 0.0


def bco_pair(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    delta: SupportsFloat | None = None,
) -> float:
    """BCO on pairs, https://arxiv.org/abs/2404.04656.

    loss = mean over pairs of -log sigmoid(beta c - delta) - log sigmoid(-(beta r - delta))
    delta = half the sum of the mean rewards of the chosen and of the rejected answers, without gradient

    >>> bco_pair([1.0], [1.0], [0.0], [0.0]) == 2 * logistic(0.0, 0.0)  # delta is their reward
    True
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    rewards = [[strength[i] * x[i] for i in range(len(x))] for x in (chosen, rejected)]
    shift = 0.5 * sum(counted_mean(x, mask, weights) for x in rewards) if delta is None else float(delta)
    losses = [-log_sigmoid(c - shift) - log_sigmoid(-(r - shift)) for c, r in zip(*rewards, strict=True)]
    return mean_of_counted(losses, mask, weights)


def beta_dpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    alpha: float = 0.6,
    momentum: float = 0.9,
    min_beta: float = 1e-3,
    running_margin: float = 0.0,
    step_margin: SupportsFloat | None = None,
) -> float:
    """beta-DPO, https://arxiv.org/abs/2407.08639, at the level of batches: DPO under one beta for the step.

    beta_step = max(min_beta, beta (1 + alpha (mean h - running_margin))), without gradient

    `momentum` is the running margin's and no part of the loss.

    >>> beta_dpo([2.0], [0.0], [0.0], [0.0], beta=0.25, alpha=0.5) == logistic(0.5 * 2.0, 0.0)
    True
    """
    pairs = margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    apart = (counted_mean(pairs, mask, weights) if step_margin is None else float(step_margin)) - running_margin
    strength = [max(min_beta, b * (1.0 + alpha * apart)) for b in per_pair(beta, len(pairs))]
    return mean_of_counted([logistic(strength[i] * pairs[i], 0.0) for i in range(len(pairs))], mask, weights)


def cal_dpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
) -> float:
    """Cal-DPO, https://arxiv.org/abs/2412.14516.

    loss = mean over pairs of -log sigmoid(h) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2

    >>> cal_dpo([2.0], [-2.0], [0.0], [0.0], beta=0.25) == logistic(4.0, 0.0)
    True
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    strength = per_pair(beta, len(chosen))
    losses = []
    for i in range(len(chosen)):
        target = 1.0 / (2.0 * strength[i])
        calibration = (chosen[i] - target) ** 2 + (rejected[i] + target) ** 2
        losses.append(logistic(chosen[i] - rejected[i], 0.0) + calibration)
    return mean_of_counted(losses, mask, weights)


def tdpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike,
    ref_rejected_logps: ArrayLike,
    *,
    chosen_kl: ArrayLike,
    rejected_kl: ArrayLike,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    alpha: float = 0.5,
    stop_chosen: bool = True,
    frozen_chosen_kl: ArrayLike | None = None,
) -> float:
    """TDPO, https://arxiv.org/abs/2404.11999: mean over pairs of -log sigmoid(beta (h - alpha (K_r - K_c))).

    K are sums along an answer of KL(ref || pi). With `stop_chosen`, K_c is read from `frozen_chosen_kl` where given.

    >>> tdpo([1.0], [1.0], [0.0], [0.0], chosen_kl=[3.0], rejected_kl=[3.0]) == logistic(0.0, 0.0)
    True
    """
    pairs = margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, False)
    read = frozen_chosen_kl if stop_chosen and frozen_chosen_kl is not None else chosen_kl
    strength, above, below = per_pair(beta, len(pairs)), floats(rejected_kl), floats(read)
    values = [strength[i] * (pairs[i] - alpha * (above[i] - below[i])) for i in range(len(pairs))]
    return mean_of_counted([logistic(x, 0.0) for x in values], mask, weights)
