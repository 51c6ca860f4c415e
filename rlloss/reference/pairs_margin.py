"""Preferences over pairs, of one margin: hinge, robust, EXO, DiscoPOP."""

import math

from numpy.typing import ArrayLike

from rlloss.reference.preference import log_sigmoid, mean_of_counted, per_pair, score_margins, sigmoid


def hinge(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    length_normalized: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> float:
    """The hinge loss of https://arxiv.org/abs/2309.06657: mean over pairs of max(0, 1 - beta h).

    >>> hinge([-1.0], [-3.0], [0.0], [0.0], beta=0.25)
    0.5
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    return mean_of_counted([max(0.0, 1.0 - strength[i] * pairs[i]) for i in range(len(pairs))], mask, weights)


def robust(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    length_normalized: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    label_smoothing: float = 0.1,
) -> float:
    """Robust DPO, https://arxiv.org/abs/2403.00409: DPO's loss of the true labels, unbiased under flips.

    loss = mean over pairs of ((1 - e) L(beta h) - e L(-beta h)) / (1 - 2 e), L(x) = -log sigmoid(x)

    >>> round(robust([-1.0], [-1.0], [0.0], [0.0], label_smoothing=0.25) / math.log(2), 12)
    1.0
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    e = label_smoothing
    x = [strength[i] * pairs[i] for i in range(len(pairs))]
    losses = [((1.0 - e) * -log_sigmoid(v) - e * -log_sigmoid(-v)) / (1.0 - 2.0 * e) for v in x]
    return mean_of_counted(losses, mask, weights)


def exo(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    length_normalized: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    label_smoothing: float = 1e-3,
) -> float:
    """EXO on pairs, https://arxiv.org/abs/2402.00856: KL(q || p) of two coins, q = sigmoid(beta h), p = 1 - e.

    >>> exo([-1.0], [-1.0], [0.0], [0.0], label_smoothing=0.5)
    0.0
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    losses = []
    for i in range(len(pairs)):
        x = strength[i] * pairs[i]
        won = sigmoid(x) * (log_sigmoid(x) - math.log(1.0 - label_smoothing))
        losses.append(won + sigmoid(-x) * (log_sigmoid(-x) - math.log(label_smoothing)))
    return mean_of_counted(losses, mask, weights)


def discopop(
    chosen_logps: ArrayLike,
    rejected_logps: ArrayLike,
    ref_chosen_logps: ArrayLike | None = None,
    ref_rejected_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    beta: ArrayLike | float = 0.1,
    reference_free: bool = False,
    length_normalized: bool = False,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    tau: float = 0.05,
) -> float:
    """DiscoPOP, https://arxiv.org/abs/2406.08414: (1 - g) logistic + g exponential, g = sigmoid(beta h / tau).

    >>> discopop([-1.0], [-1.0], [0.0], [0.0]) == (math.log(2) + 1) / 2
    True
    """
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    pairs = score_margins(*logps, reference_free, divergence, divergence_alpha)
    strength = per_pair(beta, len(pairs))
    losses = []
    for i in range(len(pairs)):
        x = strength[i] * pairs[i]
        losses.append(-sigmoid(-x / tau) * log_sigmoid(x) + math.exp(log_sigmoid(x / tau) - x))
    return mean_of_counted(losses, mask, weights)
