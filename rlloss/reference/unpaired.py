"""Single judged answers: APO-zero without pairs, and BCO."""

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.preference import floats, logistic, mean_of_counted


def apo_zero_unpaired(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    """The halves of APO-zero, equation 7 of https://arxiv.org/abs/2408.06266, each a row.

    loss_i = 1 - sigmoid(beta log-ratio_i) of a good answer, sigmoid(beta log-ratio_i) of a bad one

    >>> apo_zero_unpaired([-1.0], [-1.0], [True])
    0.5
    """
    policy, ref = floats(logps), floats(ref_logps)
    losses = []
    for i, up in enumerate(np.asarray(desirable).tolist()):
        likelier = 0.5 * (1.0 + float(np.tanh(beta * (policy[i] - ref[i]) / 2.0)))
        losses.append(desirable_weight * (1.0 - likelier) if up else undesirable_weight * likelier)
    return mean_of_counted(losses, mask, weights)


def bco(
    logps: ArrayLike,
    ref_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: float = 0.1,
    delta: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> float:
    """BCO, https://arxiv.org/abs/2404.04656: binary cross-entropy of the reward less the shift delta.

    r_i = beta (logps_i - ref_logps_i)
    loss_i = -log sigmoid(r_i - delta) of a good answer, -log sigmoid(-(r_i - delta)) of a bad one

    >>> round(bco([-1.0], [-2.0], [False], beta=1.0, delta=1.0), 12) == round(float(np.log(2)), 12)
    True
    """
    policy, ref = floats(logps), floats(ref_logps)
    losses = []
    for i, up in enumerate(np.asarray(desirable).tolist()):
        shifted = beta * (policy[i] - ref[i]) - delta
        losses.append(desirable_weight * logistic(shifted, 0.0) if up else undesirable_weight * logistic(-shifted, 0.0))
    return mean_of_counted(losses, mask, weights)
