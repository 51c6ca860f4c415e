"""Importance ratios and the clipped surrogate."""

import math

from rlloss.reference.divergence import bounded
from rlloss.reference.reduce import mean


def importance_ratio(
    new: list[float], old: list[float], mask: list[float], t: int, level: str, max_log_ratio: float
) -> float:
    """The ratio of token t: pi / pi_old, or for `level="sequence"` the geometric mean over its sequence."""
    if level == "token":
        return math.exp(bounded(new[t] - old[t], max_log_ratio))
    if level == "sequence":
        log_ratios = [new[u] - old[u] for u in range(len(mask)) if mask[u]]
        return math.exp(bounded(mean(log_ratios), max_log_ratio))
    raise ValueError(f"ratio_level must be 'token' or 'sequence', got {level!r}")


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
