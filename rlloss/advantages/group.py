"""Group-relative advantages: each completion against the others of its prompt."""

from typing import Literal

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_full_precision, check_mask, check_range
from rlloss._typing import Bool, Float, Int

__all__ = ["group_advantages"]


def group_advantages(
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    scale: Literal["group", "batch", "none"] = "group",
    *,
    valid: Bool[Tensor, " B"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " B"]:
    """GRPO's advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300; `scale="none"` is Dr. GRPO's.

    (R_i - mean of the group) / (s + eps), where s is the sample standard deviation (n - 1) of the group (`group`),
    of all valid rewards (`batch`), or absent (`none`). Groups may differ in size and stand in any order.

    A group whose rewards are identical gets exact zeros, and so does a group of one. Rows with a NaN reward or
    `valid` False are invalid: they get 0 and have no say in any mean or deviation.

    Args:
        group_ids: Any integer per row; rows with the same one answer the same prompt.
        valid: Rows that count; all of them where None.
        eps: Added to the deviation.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.3, 0.3]), torch.tensor([0, 0, 1, 1]), scale="none").tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    who = "group_advantages"
    check_choice(who, "scale", scale, ("group", "batch", "none"))
    check_range(who, "eps", eps, 0)
    check_full_precision(who, "rewards", rewards)
    if rewards.ndim != 1 or group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise ValueError(
            f"{who}: rewards [B] and integer group_ids [B] must match, got {list(rewards.shape)} and "
            f"{group_ids.dtype} {list(group_ids.shape)}"
        )
    valid = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
    check_mask(who, "valid", valid, ndim=(1,))
    valid = valid & ~rewards.isnan()

    _, group = torch.unique(group_ids, return_inverse=True)
    x = torch.where(valid, rewards.detach(), 0).double()
    # measured from the group's smallest reward, identical rewards are exact zeros and so is their mean
    smallest = torch.full_like(x, torch.inf).scatter_reduce(0, group, torch.where(valid, x, torch.inf), "amin")
    x = torch.where(valid, x - smallest[group], 0)
    sizes = _group_sum(valid.double(), group)
    mean = _group_sum(x, group) / sizes.clamp(min=1)
    centred = torch.where(valid, x - mean, 0)
    if scale == "group":
        std = (_group_sum(centred.square(), group) / (sizes - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale == "batch":
        everything = torch.where(valid, rewards.detach(), 0).double()
        deviation = torch.where(valid, everything - everything.sum() / valid.sum().clamp(min=1), 0)
        centred = centred / ((deviation.square().sum() / (valid.sum() - 1).clamp(min=1)).sqrt() + eps)
    return torch.where(valid & (x != mean), centred, 0).to(rewards.dtype)


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Every row gets the sum over its group."""
    return torch.zeros_like(x).index_add(0, group, x)[group]
