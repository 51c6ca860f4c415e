"""Preferences over pairs."""

import math

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.reduce import mean


def log_sigmoid(x: float) -> float:
    """Log of 1 / (1 + exp(-x)), where neither end overflows."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def dpo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> float:
    """DPO, equation 7 of https://arxiv.org/abs/2305.18290, with the label smoothing of cDPO.

    Smoothing is equation 3 of https://ericmitchell.ai/cdpo.pdf: each label is flipped with that probability.

    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = mean over pairs of -(1 - label_smoothing) * log sigmoid(margin) - label_smoothing * log sigmoid(-margin)

    `reference_free` replaces the reference by one that finds all answers equally likely, whatever is passed.

    >>> dpo([-1.0], [-1.0], [-2.0], [-2.0]) == math.log(2)
    True
    """
    chosen = np.asarray(chosen_logps, dtype=np.float64).tolist()
    rejected = np.asarray(rejected_logps, dtype=np.float64).tolist()
    if reference_free:
        ref_chosen = ref_rejected = [0.0] * len(chosen)
    elif ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError("dpo: needs ref_chosen_logps and ref_rejected_logps, or reference_free=True")
    else:
        ref_chosen = np.asarray(ref_chosen_logps, dtype=np.float64).tolist()
        ref_rejected = np.asarray(ref_rejected_logps, dtype=np.float64).tolist()
    valid = [True] * len(chosen) if mask is None else np.asarray(mask).tolist()
    weight = [1.0] * len(chosen) if weights is None else np.asarray(weights, dtype=np.float64).tolist()

    losses = []
    for i in range(len(chosen)):
        if not valid[i]:
            continue
        if weight[i] == 0.0:  # rejected: no numerator, whatever its value, but still a pair in the mean
            losses.append(0.0)
            continue
        margin = beta * ((chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i]))
        loss = -(1.0 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
        losses.append(weight[i] * loss)
    return mean(losses)
