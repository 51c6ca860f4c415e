"""Preferences over pairs, thumbs over single answers, and rewards over pairs."""

import math
from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.reduce import mean


def log_sigmoid(x: float) -> float:
    """Log of 1 / (1 + exp(-x)), where neither end overflows."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), where neither end overflows."""
    return math.exp(log_sigmoid(x))


def logistic(x: float, label_smoothing: float) -> float:
    """The negative log-likelihood of a label that is flipped with probability `label_smoothing`."""
    flipped = label_smoothing * log_sigmoid(-x) if label_smoothing else 0.0
    return -(1.0 - label_smoothing) * log_sigmoid(x) - flipped


def floats(x: ArrayLike) -> list[float]:
    """A vector as floats."""
    return np.asarray(x, dtype=np.float64).tolist()


def mean_of_counted(losses: list[float], mask: ArrayLike | None, weights: ArrayLike | None) -> float:
    """The weighted losses over the number of rows that count; weight 0 rejects a row, whatever its loss."""
    counts = [True] * len(losses) if mask is None else np.asarray(mask).tolist()
    weight = [1.0] * len(losses) if weights is None else floats(weights)
    rows = [i for i in range(len(losses)) if counts[i]]
    return mean([0.0 if weight[i] == 0.0 else weight[i] * losses[i] for i in rows])


def margins(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None,
    ref_rejected_logps: ArrayLike | None,
    reference_free: bool,
) -> list[float]:
    """Every pair's h = (chosen - ref_chosen) - (rejected - ref_rejected); a free reference is left out."""
    chosen, rejected = floats(chosen_logps), floats(rejected_logps)
    if reference_free:
        ref_chosen = ref_rejected = [0.0] * len(chosen)
    elif ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError("needs ref_chosen_logps and ref_rejected_logps, or reference_free=True")
    else:
        ref_chosen, ref_rejected = floats(ref_chosen_logps), floats(ref_rejected_logps)
    return [(chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i]) for i in range(len(chosen))]


def per_pair(value: ArrayLike | float, count: int) -> list[float]:
    """A number for all pairs, or one for each of them."""
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (count,)).tolist()


def divergence_score(log_ratio: float, divergence: str, alpha: float) -> float:
    """f'(u) - f'(1) at u = exp(log_ratio), table 1 of https://arxiv.org/abs/2309.16240; exponents at most 20."""
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return 1.0 - math.exp(min(-log_ratio, 20.0))
    if divergence == "jensen_shannon":
        return math.log(2.0) + log_sigmoid(log_ratio)
    return (1.0 - math.exp(min(-alpha * log_ratio, 20.0))) / alpha


def score_margins(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None,
    ref_rejected_logps: ArrayLike | None,
    reference_free: bool,
    divergence: str,
    divergence_alpha: float,
) -> list[float]:
    """The margins of the scores that a divergence makes of the two log-ratios."""
    if divergence == "reverse_kl":
        return margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    sides = [(chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps)]
    nothing = np.zeros(len(floats(chosen_logps)))
    chosen, rejected = (margins(x, nothing, ref, nothing, False) for x, ref in sides)
    scores = [[divergence_score(x, divergence, divergence_alpha) for x in side] for side in (chosen, rejected)]
    return [c - r for c, r in zip(*scores, strict=True)]


def dpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    soft_labels: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    length_normalized: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> float:
    """DPO, equation 7 of https://arxiv.org/abs/2305.18290, with the label smoothing of cDPO.

    Smoothing is equation 3 of https://ericmitchell.ai/cdpo.pdf: each label is flipped with that probability.

    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = mean over pairs of -(1 - label_smoothing) * log sigmoid(margin) - label_smoothing * log sigmoid(-margin)

    `reference_free` replaces the reference by one that finds all answers equally likely, whatever is passed.
    `length_normalized` says that the inputs are means per token; the formula is the same. `soft_labels` are each pair's
    probability of being as labelled. Under a divergence, the margin is one of its scores.

    >>> dpo([-1.0], [-1.0], [-2.0], [-2.0]) == math.log(2)
    True
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    flipped = per_pair(label_smoothing, len(pairs)) if soft_labels is None else [1.0 - p for p in floats(soft_labels)]
    losses = [logistic(strength[i] * pairs[i], flipped[i]) for i in range(len(pairs))]
    return mean_of_counted(losses, mask, weights)


def ipo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    length_normalized: bool = False,
    reference_free: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> float:
    """IPO, equation 17 of https://arxiv.org/abs/2310.12036, where beta is tau.

    loss = mean over pairs of (h - 1 / (2 beta))^2, h = (chosen - ref_chosen) - (rejected - ref_rejected)

    `length_normalized` says that the inputs are means per token; the formula is the same.

    >>> ipo([-3.0], [-6.0], [-5.0], [-5.0], beta=0.1)
    4.0
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    losses = [(pairs[i] - 1.0 / (2.0 * strength[i])) ** 2 for i in range(len(pairs))]
    return mean_of_counted(losses, mask, weights)


def simpo(
    chosen_mean_logps: ArrayLike,
    rejected_mean_logps: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 2.0,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
) -> float:
    """SimPO, equation 6 of https://arxiv.org/abs/2405.14734, where margin is gamma.

    loss = mean over pairs of -log sigmoid(beta chosen - beta rejected - margin), of mean log-probs per token

    >>> simpo([-0.5], [-1.0], beta=2.0, margin=1.0) == math.log(2)
    True
    """
    chosen, rejected = floats(chosen_mean_logps), floats(rejected_mean_logps)
    strength = per_pair(beta, len(chosen))
    scores = [strength[i] * chosen[i] - strength[i] * rejected[i] - margin for i in range(len(chosen))]
    return mean_of_counted([logistic(x, label_smoothing) for x in scores], mask, weights)


def kto_kl(kl_logps: ArrayLike, ref_kl_logps: ArrayLike, mask: ArrayLike | None = None) -> float:
    """KTO's z_0, section 4.1 of https://arxiv.org/abs/2402.01306: the mean log-ratio of mismatched pairs, at least 0.

    >>> kto_kl([-1.0, -5.0], [-2.0, -4.5])
    0.25
    """
    policy, ref = floats(kl_logps), floats(ref_kl_logps)
    return max(0.0, mean_of_counted([policy[i] - ref[i] for i in range(len(policy))], mask, None))


def kto(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    kl: SupportsFloat,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    """KTO, equation 8 of https://arxiv.org/abs/2402.01306.

    r_i = logps_i - ref_logps_i
    value_i = desirable_weight * sigmoid(beta (r_i - kl)), or undesirable_weight * sigmoid(beta (kl - r_i))
    loss = mean over rows of (the row's weight - value_i)

    >>> kto([-1.0], [-1.0], [True], kl=0.0)
    0.5
    """
    policy, ref = floats(logps), floats(ref_logps)
    losses = []
    for i, up in enumerate(np.asarray(desirable).tolist()):
        weight = desirable_weight if up else undesirable_weight
        gain = (policy[i] - ref[i]) - float(kl)
        value = weight * math.exp(log_sigmoid(beta * gain if up else -beta * gain))
        losses.append(weight - value)
    return mean_of_counted(losses, mask, weights)


def bradley_terry(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    margin: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> float:
    """The reward model's loss, equation 1 of https://arxiv.org/abs/2203.02155.

    The margin is that of equation 2 of https://arxiv.org/abs/2307.09288, the centring that of
    https://arxiv.org/abs/2312.09244.

    loss = mean over pairs of -log sigmoid((chosen - rejected - margin) / temperature)
           + center_coef (chosen + rejected)^2

    >>> bradley_terry([2.0], [1.0], margin=[1.0]) == math.log(2)
    True
    """
    chosen, rejected = floats(chosen_rewards), floats(rejected_rewards)
    asked = [0.0] * len(chosen) if margin is None else floats(margin)
    losses = []
    for i in range(len(chosen)):
        loss = logistic((chosen[i] - rejected[i] - asked[i]) / temperature, label_smoothing)
        losses.append(loss + center_coef * (chosen[i] + rejected[i]) ** 2)
    return mean_of_counted(losses, mask, weights)
