"""Several rewards per completion, each compared within its group before they are added up."""

import torch
from torch import Tensor

from rlloss._checks import check_device, check_full_precision, check_range
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.group import group_advantages
from rlloss.advantages.rows import Rows, valid_rows

__all__ = ["gdpo_advantages"]


def gdpo_advantages(
    rewards: Float[Tensor, "B K"],
    group_ids: Int[Tensor, " B"],
    weights: Float[Tensor, " K"] | None = None,
    *,
    valid: Bool[Tensor, " B"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " B"]:
    """GDPO's advantages, https://arxiv.org/abs/2601.05242: K rewards, each in units of its own group's deviation.

        x_i = sum_k weights_k (r_ik - mean of the group) / (s_k of the group + eps);   A_i = x_i / (s + eps)

    GRPO of the weighted sum gives completions that earned different rewards of the same sum one advantage; here they
    keep their own. s is the sample deviation of the step's x, whose mean is 0: that of every group is.

    A NaN says that a reward does not apply to a row: there it adds nothing, and has no say in its group. A row without
    any reward, or with `valid` False, gets 0 and has no say at all.

    >>> correct, brief = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    >>> advantages = gdpo_advantages(torch.stack([correct, brief], 1), torch.zeros(4).long())
    >>> [round(a, 2) for a in advantages.tolist()]
    [1.33, 0.21, -0.77, -0.77]
    """
    who = "gdpo_advantages"
    check_full_precision(who, "rewards", rewards)
    check_range(who, "eps", eps, 0)
    if rewards.ndim != 2 or not rewards.shape[1]:
        raise ValueError(f"{who}: rewards must be [B, K], one column per reward, got {list(rewards.shape)}")
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights
    check_full_precision(who, "weights", weights)
    if weights.shape != rewards.shape[1:]:
        raise ValueError(f"{who}: weights must be one per reward {list(rewards.shape[1:])}, got {list(weights.shape)}")
    check_device(who, "weights", weights, "rewards", rewards)

    in_double = rewards.detach().double()
    valid = valid_rows(who, torch.where(in_double.isnan().all(1), torch.nan, 0.0), group_ids, valid)
    columns = [group_advantages(column, group_ids, valid=valid, eps=eps) for column in in_double.unbind(1)]
    x = torch.stack(columns, 1) @ weights.detach().double()
    step = Rows(torch.zeros_like(group_ids, dtype=torch.long), valid)
    return torch.where(x == 0, 0, x / (step.std(x, 1) + eps)).to(rewards.dtype)
