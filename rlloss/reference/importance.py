"""Truncated importance sampling: REINFORCE on advantages that a clipped ratio scales."""

import math
from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.policy import reinforce
from rlloss.reference.reduce import advantage_rows, as_given, rows
from rlloss.reference.surrogate import importance_ratio


def importance_sampling(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ratio_level: str = "sequence",
    ratio_min: float = 0.0,
    ratio_max: float = 10.0,
    max_log_ratio: float = 20.0,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    **terms: Any,
) -> float:
    """Off-policy REINFORCE with truncated importance weights, https://doi.org/10.1198/106186008X320456.

    w_it = min(max(ratio_it, ratio_min), ratio_max), its gradient stopped
    loss = -(1 / S) sum_i sum_t w_it A_it logprob_it, and the other `terms` of `token_losses`

    The ratio is that of the whole sequence, or of the token under `ratio_level="token"`. In the KL term it is the
    token's own, pi / pi_old at first; where that leaves its bounds, the bound times pi / sg(pi).

    >>> importance_sampling([[-1.0, -2.0]], [[-4.0, -5.0]], [0.5], [[True, True]], ratio_max=2.0)  # 2 * 0.5 * 3
    3.0
    """
    mask = rows(loss_mask, cu_seqlens)
    frozen = rows(logprobs if frozen_logprobs is None else frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    weighted = advantage_rows(advantages, mask, cu_seqlens)
    held_old = [list(row) for row in old]
    for i in range(len(mask)):
        for t in range(len(mask[i])):
            if mask[i][t]:
                ratio = importance_ratio(frozen[i], old[i], mask[i], t, ratio_level, max_log_ratio)
                weighted[i][t] *= min(max(ratio, ratio_min), ratio_max)
                own = importance_ratio(frozen[i], old[i], mask[i], t, "token", max_log_ratio)
                if not ratio_min <= own <= ratio_max:
                    held_old[i][t] = frozen[i][t] - math.log(min(max(own, ratio_min), ratio_max))
    return reinforce(
        logprobs,
        as_given(held_old, cu_seqlens),
        as_given(weighted, cu_seqlens),
        loss_mask,
        max_log_ratio=max_log_ratio,
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        **terms,
    )
