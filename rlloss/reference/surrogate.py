"""Importance ratios and the clipped surrogate."""

import math

from rlloss.reference.divergence import bounded
from rlloss.reference.reduce import mean


def importance_log_ratio(new: list[float], old: list[float], mask: list[float], t: int, level: str) -> float:
    """log(pi / pi_old) of token t, summed over its sequence (`sequence`), or that sum's mean (`geometric`)."""
    log_ratios = [new[u] - old[u] for u in range(len(mask)) if mask[u]]
    if level == "token":
        return new[t] - old[t]
    if level == "sequence":
        return sum(log_ratios)
    if level == "geometric":
        return mean(log_ratios)
    raise ValueError(f"ratio_level must be 'token', 'sequence' or 'geometric', got {level!r}")


def importance_ratio(
    new: list[float], old: list[float], mask: list[float], t: int, level: str, max_log_ratio: float
) -> float:
    """The ratio pi / pi_old of token t, of its sequence, or of its sequence's geometric mean."""
    return math.exp(bounded(importance_log_ratio(new, old, mask, t, level), max_log_ratio))


def surrogate(
    ratio: float, advantage: float, clip_eps_low: float, clip_eps_high: float, dual_clip: float | None
) -> float:
    """The clipped surrogate, equation 7 of https://arxiv.org/abs/1707.06347, as a loss.

    loss = max(-r * A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) * A)

    Dual clip, equation 5 of https://arxiv.org/abs/1912.09729: where A < 0 the loss is at most -c * A, c > 1.
    """
    clipped_ratio = min(max(ratio, 1.0 - clip_eps_low), 1.0 + clip_eps_high)
    loss = max(-ratio * advantage, -clipped_ratio * advantage)
    if dual_clip is not None and advantage < 0.0:
        loss = min(loss, -dual_clip * advantage)
    return loss
