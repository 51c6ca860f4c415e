"""Group-relative advantages: each completion against the others of its prompt."""

from typing import Literal

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_device, check_full_precision, check_mask, check_range
from rlloss._typing import Bool, Float, Int
from rlloss.reduce import group_index

__all__ = ["group_advantages", "informative_groups"]


def group_advantages(
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    scale: Literal["group", "batch", "none"] = "group",
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    valid: Bool[Tensor, " B"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " B"]:
    """GRPO's advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300; `scale="none"` is Dr. GRPO's.

    (R_i - baseline) / (s + eps), where s is the sample standard deviation (n - 1) of the group (`group`),
    of all valid rewards (`batch`), or absent (`none`). The baseline is the mean of the group, or the mean of the
    group's other rewards (`leave_one_out`), which is the same advantage times n / (n - 1): with `scale="none"` it is
    RLOO's, https://arxiv.org/abs/2402.14740. Groups may differ in size and stand in any order.

    A group whose rewards are identical gets exact zeros, and so does a group of one. Rows with a NaN reward or
    `valid` False are invalid: they get 0 and have no say in any mean or deviation.

    Args:
        group_ids: Any integer per row; rows with the same one answer the same prompt.
        valid: Rows that count; all of them where None.
        eps: Added to the deviation.

    >>> rewards, group_ids = torch.tensor([1.0, 0.0, 0.0, 0.3, 0.3]), torch.tensor([0, 0, 0, 1, 1])
    >>> group_advantages(rewards, group_ids, scale="none", baseline="leave_one_out").tolist()
    [1.0, -0.5, -0.5, 0.0, 0.0]
    """
    who = "group_advantages"
    check_choice(who, "scale", scale, ("group", "batch", "none"))
    check_choice(who, "baseline", baseline, ("mean", "leave_one_out"))
    check_range(who, "eps", eps, 0)
    valid = _valid_rows(who, rewards, group_ids, valid)

    group = group_index(group_ids)
    x = torch.where(valid, rewards.detach(), 0).double()
    # measured from the group's smallest reward, identical rewards are exact zeros and so is their mean
    x = torch.where(valid, x - _group_extreme(x, group, valid, "amin"), 0)
    sizes = _group_sum(valid.double(), group)
    mean = _group_sum(x, group) / sizes.clamp(min=1)
    centred = torch.where(valid, x - mean, 0)
    advantages = centred
    if scale == "group":
        std = (_group_sum(centred.square(), group) / (sizes - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + eps)
    elif scale == "batch":
        everything = torch.where(valid, rewards.detach(), 0).double()
        deviation = torch.where(valid, everything - everything.sum() / valid.sum().clamp(min=1), 0)
        advantages = centred / ((deviation.square().sum() / (valid.sum() - 1).clamp(min=1)).sqrt() + eps)
    if baseline == "leave_one_out":
        advantages = advantages * sizes / (sizes - 1).clamp(min=1)
    return torch.where(valid & (x != mean), advantages, 0).to(rewards.dtype)


def informative_groups(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, valid: Bool[Tensor, " B"] | None = None
) -> Bool[Tensor, " B"]:
    """DAPO's dynamic sampling, the condition of equation 11 of https://arxiv.org/abs/2503.14476: groups that teach.

    True for the valid rows of groups with at least two different valid rewards; all other groups have zero
    advantages. Invalid rows (`valid` False or a NaN reward) are False. The paper looks at correctness alone: pass
    rewards without a length penalty, which makes every group look informative.

    >>> informative_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 8, 8])).tolist()
    [True, True, False, False]
    """
    valid = _valid_rows("informative_groups", rewards, group_ids, valid)
    group = group_index(group_ids)
    smallest = _group_extreme(rewards.detach(), group, valid, "amin")
    return valid & (smallest != _group_extreme(rewards.detach(), group, valid, "amax"))


def _valid_rows(who: str, rewards: Tensor, group_ids: Tensor, valid: Tensor | None) -> Tensor:
    check_full_precision(who, "rewards", rewards)
    if rewards.ndim != 1 or group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise ValueError(
            f"{who}: rewards [B] and integer group_ids [B] must match, got {list(rewards.shape)} and "
            f"{group_ids.dtype} {list(group_ids.shape)}"
        )
    valid = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
    check_mask(who, "valid", valid, ndim=(1,))
    if valid.shape != rewards.shape:
        raise ValueError(f"{who}: valid must be {list(rewards.shape)} as rewards, got {list(valid.shape)}")
    check_device(who, "valid", valid, "rewards", rewards)
    check_device(who, "group_ids", group_ids, "rewards", rewards)
    return valid & ~rewards.isnan()


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Every row gets the sum over its group."""
    return torch.zeros_like(x).index_add(0, group, x)[group]


def _group_extreme(x: Tensor, group: Tensor, valid: Tensor, which: Literal["amin", "amax"]) -> Tensor:
    """Every row gets the smallest or largest valid entry of its group."""
    nothing = torch.inf if which == "amin" else -torch.inf
    return torch.full_like(x, nothing).scatter_reduce(0, group, torch.where(valid, x, nothing), which)[group]
