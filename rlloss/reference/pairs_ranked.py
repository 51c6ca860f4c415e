"""Preferences by rank: AOT, over pairs and over unpaired answers."""

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.pairs import log_ratios
from rlloss.reference.preference import floats, logistic, margins


def ranked(
    above: list[float], below: list[float], mask: ArrayLike | None, beta: float, label_smoothing: float
) -> float:
    """The mean logistic loss of beta times the differences of two sorted samples, of the rows that count."""
    counts = [True] * len(above) if mask is None else np.asarray(mask).tolist()
    upper, lower = (sorted(x[i] for i in range(len(x)) if counts[i]) for x in (above, below))
    losses = [logistic(beta * (upper[k] - lower[k]), label_smoothing) for k in range(len(upper))]
    return sum(losses) / max(len(losses), 1)


def aot(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> float:
    """AOT on pairs, https://arxiv.org/abs/2406.05882: the policy's margins against the reference's, both sorted.

    >>> aot([1.0, 3.0], [0.0, 0.0], [3.0, 1.0], [0.0, 0.0]) == logistic(0.0, 0.0)
    True
    """
    zeros = [0.0] * len(floats(chosen_logps))
    policy = margins(chosen_logps, rejected_logps, zeros, zeros, False)
    if reference_free or ref_chosen_logps is None or ref_rejected_logps is None:
        ref_chosen_logps = ref_rejected_logps = zeros
    reference = margins(ref_chosen_logps, ref_rejected_logps, zeros, zeros, False)
    return ranked(policy, reference, mask, beta, label_smoothing)


def aot_unpaired(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> float:
    """AOT on unpaired answers, https://arxiv.org/abs/2406.05882: chosen log-ratios against rejected ones, both sorted.

    >>> aot_unpaired([1.0, 3.0], [3.0, 1.0], [0.0, 0.0], [0.0, 0.0]) == logistic(0.0, 0.0)
    True
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, reference_free)
    return ranked(chosen, rejected, mask, beta, label_smoothing)
