"""What a prompt is worth to the best policy that stays near the reference."""

import math

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.rows import Rows, valid_rows
from rlloss.reduce import group_index

__all__ = ["optimal_value"]


def optimal_value(
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    beta: float,
    *,
    valid: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """V* of every row's prompt, estimated from the reference's answers, https://arxiv.org/abs/2505.20686.

    V* = beta log mean_j exp(r_j / beta) over the answers j to the prompt, the value of the policy that is best for the
    expected reward minus beta KL(pi||ref). The larger beta, the nearer it lies to the mean reward; the smaller, the
    nearer to the largest. It is A*-PO's target r - V*, DRO's V and the baseline in Kimi k1.5's surrogate loss.

    Every row of a group gets the group's value. Rows with a NaN reward or `valid` False have no say in it, and a group
    without any other row has no value: NaN.

    Args:
        group_ids: Any integer per row; rows with the same one answer the same prompt.
        beta: Temperature of the KL-regularised reward.
        valid: Rows that count; all of them where None.

    >>> rewards, group_ids = torch.tensor([1.0, 0.0, 0.3, 0.3]), torch.tensor([0, 0, 1, 1])
    >>> optimal_value(rewards, group_ids, beta=0.5)
    tensor([0.7169, 0.7169, 0.3000, 0.3000])
    """
    who = "optimal_value"
    check_range(who, "beta", beta, 0, open_low=True)
    if math.isinf(beta):
        raise ValueError(f"{who}: beta must be finite, got {beta!r}; without bound V* is the mean reward")
    valid = valid_rows(who, rewards, group_ids, valid)
    rows = Rows(group_index(group_ids), valid)
    x = torch.where(valid, rewards.detach(), 0).double()
    best = rows.extreme(x, "amax")
    # measured from the largest, nothing overflows; near 1, exp and log would lose what a large beta leaves
    excess = rows.total(torch.expm1((x - best) / beta)) / rows.size.clamp(min=1)
    value = best + beta * torch.log1p(excess)
    return torch.where(rows.size > 0, value, torch.nan).to(rewards.dtype)
