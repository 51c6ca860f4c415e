"""Off-policy corrections, token by token."""

import math

from numpy.typing import ArrayLike

from rlloss.reference.divergence import bounded
from rlloss.reference.reduce import mean, rows


def importance_weights(
    old_logprobs: ArrayLike,
    rollout_logprobs: ArrayLike,
    loss_mask: ArrayLike,
    kind: str,
    *,
    level: str = "token",
    ratio_min: float,
    ratio_max: float,
    log_kept_mass: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    max_log_ratio: float = 20.0,
) -> list[list[float]]:
    """The weight of every token, 0 where it is masked: truncated (tis), masked (mis, icepop) or a filter (reject).

    rho = exp(log pi_old - log kept mass - log pi_rollout) of the token, or of the sum or mean of the exponents over
    its sequence, or of their mean over its run of neighbours with one mask and one segment id.

    >>> importance_weights([[-1.0, -1.0]], [[-1.0, -3.0]], [[True, True]], "tis", ratio_min=0.0, ratio_max=2.0)
    [[1.0, 2.0]]
    """
    mask, old = rows(loss_mask, cu_seqlens), rows(old_logprobs, cu_seqlens)
    rollout = rows(rollout_logprobs, cu_seqlens)
    mass = [[0.0] * len(row) for row in mask] if log_kept_mass is None else rows(log_kept_mass, cu_seqlens)
    ids = [[0.0] * len(row) for row in mask] if segment_ids is None else rows(segment_ids, cu_seqlens)

    weights = []
    for i in range(len(mask)):
        exponents = []
        for t in range(len(mask[i])):
            known = mask[i][t] and math.isfinite(rollout[i][t])
            exponents.append(old[i][t] - mass[i][t] - rollout[i][t] if known else 0.0)
        weights.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                weights[i].append(0.0)
                continue
            trained = [exponents[u] for u in range(len(mask[i])) if mask[i][u]]
            if level == "token":
                exponent = exponents[t]
            elif level == "sequence":
                exponent = sum(trained)
            elif level == "geometric":
                exponent = mean(trained)
            else:
                first, last = t, t
                while first > 0 and mask[i][first - 1] and ids[i][first - 1] == ids[i][t]:
                    first -= 1
                while last + 1 < len(mask[i]) and mask[i][last + 1] and ids[i][last + 1] == ids[i][t]:
                    last += 1
                exponent = mean(exponents[first : last + 1])
            rho = math.exp(bounded(exponent, max_log_ratio))
            within = ratio_min <= rho <= ratio_max
            if kind == "tis":
                weights[i].append(min(max(rho, ratio_min), ratio_max))
            elif kind == "reject":
                weights[i].append(1.0 if within else 0.0)
            else:
                weights[i].append(rho if within else 0.0)
    return weights


def top_entropy(
    entropy: ArrayLike, loss_mask: ArrayLike, fraction: float, *, cu_seqlens: ArrayLike | None = None
) -> list[list[bool]]:
    """Whose entropy is among the largest ceil(fraction n) of the n counted tokens, with those that tie.

    >>> top_entropy([[0.1, 2.0, 0.3]], [[True, True, True]], 0.5)
    [[False, True, True]]
    """
    mask, values = rows(loss_mask, cu_seqlens), rows(entropy, cu_seqlens)
    counted = sorted((h for row, m in zip(values, mask, strict=True) for h, k in zip(row, m, strict=True) if k))
    if not counted:
        return [[False] * len(row) for row in mask]
    threshold = counted[-math.ceil(fraction * len(counted) - 1e-9)]
    return [
        [bool(k) and h >= threshold for h, k in zip(row, m, strict=True)] for row, m in zip(values, mask, strict=True)
    ]
