"""Preferences over pairs without a reference, and what other log-probs and weights go into preference losses."""

import math

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.preference import floats, logistic, mean_of_counted, per_pair


def cpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> float:
    """CPO, https://arxiv.org/abs/2401.08417: mean over pairs of -log sigmoid(beta (w - l)) - nll_coef w.

    >>> cpo([-2.0], [-2.0]) == math.log(2) + 2
    True
    """
    chosen, rejected = floats(chosen_logps), floats(rejected_logps)
    strength, losses = per_pair(beta, len(chosen)), []
    for i in range(len(chosen)):
        preference = logistic(strength[i] * (chosen[i] - rejected[i]), label_smoothing)
        losses.append(preference - nll_coef * chosen[i])
    return mean_of_counted(losses, mask, weights)


def tpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    *,
    gold_logps: ArrayLike | float = 0.0,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.01,
    nll_coef: float = 1.0,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> float:
    """TPO, https://arxiv.org/abs/2405.16681: mean over triples of -log sigmoid(beta (w - l) - margin) - nll_coef gold.

    `length_normalized` says that the inputs are means per token; the formula is the same.

    >>> tpo([-2.0], [-2.0], gold_logps=[-3.0]) == math.log(2) + 3
    True
    """
    chosen, rejected = floats(chosen_logps), floats(rejected_logps)
    strength, gold = per_pair(beta, len(chosen)), per_pair(gold_logps, len(chosen))
    losses = []
    for i in range(len(chosen)):
        preference = logistic(strength[i] * (chosen[i] - rejected[i]) - margin, label_smoothing)
        losses.append(preference - nll_coef * gold[i])
    return mean_of_counted(losses, mask, weights)


def alpha_po(
    chosen_mean_logps: ArrayLike,
    rejected_mean_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 2.0,
    alpha: float = 0.25,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
) -> float:
    """AlphaPO, https://arxiv.org/abs/2501.03884: SimPO with the reward (1 - p^-alpha) / alpha, exponents at most 20.

    >>> alpha_po([-1.0], [-1.0], margin=0.0) == math.log(2)
    True
    """

    def reward(mean_logp: float) -> float:
        return (1.0 - math.exp(min(-alpha * mean_logp, 20.0))) / alpha if alpha else mean_logp

    chosen, rejected = [reward(x) for x in floats(chosen_mean_logps)], [reward(x) for x in floats(rejected_mean_logps)]
    strength = per_pair(beta, len(chosen))
    values = [strength[i] * (chosen[i] - rejected[i]) - margin for i in range(len(chosen))]
    return mean_of_counted([logistic(x, label_smoothing) for x in values], mask, weights)


def orpo(
    chosen_mean_logps: ArrayLike,
    rejected_mean_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    nll_coef: float = 1.0,
) -> float:
    """ORPO, https://arxiv.org/abs/2403.07691, where beta is lambda.

    loss = mean over pairs of -nll_coef log p_w - beta log sigmoid(log odds_w - log odds_l), p = exp(mean log-prob)

    >>> round(orpo([math.log(0.5)], [math.log(0.5)], beta=1.0) / math.log(2), 12)
    2.0
    """

    def log_odds(mean_logp: float) -> float:
        return mean_logp - math.log(-math.expm1(min(mean_logp, -math.exp(-20.0))))

    chosen, rejected = floats(chosen_mean_logps), floats(rejected_mean_logps)
    strength, losses = per_pair(beta, len(chosen)), []
    for i in range(len(chosen)):
        odds_ratio = logistic(log_odds(chosen[i]) - log_odds(rejected[i]), 0.0)
        losses.append(strength[i] * odds_ratio - nll_coef * chosen[i])
    return mean_of_counted(losses, mask, weights)


def desensitized_logps(
    chosen_logprobs: ArrayLike,
    chosen_mask: ArrayLike,
    rejected_logprobs: ArrayLike,
    rejected_mask: ArrayLike,
    alpha: float,
) -> tuple[list[float], list[float]]:
    """LD-DPO's log-probs of both answers of every pair, https://arxiv.org/abs/2409.06411, from padded rows.

    >>> desensitized_logps([[-1.0, -2.0]], [[True, True]], [[-4.0]], [[True]], 0.5)
    ([-2.0], [-4.0])
    """
    sides = []
    for logprobs, mask in ((chosen_logprobs, chosen_mask), (rejected_logprobs, rejected_mask)):
        rows = zip(np.asarray(logprobs, dtype=np.float64).tolist(), np.asarray(mask).tolist(), strict=True)
        sides.append([[x for x, counts in zip(*row, strict=True) if counts] for row in rows])
    made = [[], []]
    for chosen, rejected in zip(*sides, strict=True):
        shared = min(len(chosen), len(rejected))
        for side, row in zip(made, (chosen, rejected), strict=True):
            side.append(sum(row[:shared]) + alpha * sum(row[shared:]))
    return made[0], made[1]


def wpo_weights(logprobs: ArrayLike, sum_p2: ArrayLike, loss_mask: ArrayLike) -> list[float]:
    """WPO's weights of answers, https://arxiv.org/abs/2406.11827: exp of the mean of log p - log sum p^2.

    >>> wpo_weights([[0.0, 0.0]], [[1.0, 1.0]], [[True, True]])
    [1.0]
    """
    weights = []
    rows = (np.asarray(x).tolist() for x in (logprobs, sum_p2, loss_mask))
    for row in zip(*rows, strict=True):
        aligned = [x - math.log(p2) for x, p2, counts in zip(*row, strict=True) if counts]
        weights.append(math.exp(min(sum(aligned) / max(len(aligned), 1), 20.0)))
    return weights
