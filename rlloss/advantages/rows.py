"""Rows and their groups: who is compared with whom, and the statistics that a group shares."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlloss._checks import check_device, check_full_precision, check_mask
from rlloss._typing import Int
from rlloss.reduce import group_index

__all__ = ["Rows", "joint_ids", "valid_rows"]


def joint_ids(*ids: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """One id per row from several: two rows have the same one where they agree in all.

    Who is compared with whom is a choice of ids. The hierarchical GRPO of prime-rl, say, compares solvers of one
    proposed problem and proposers of one task: `joint_ids(role, torch.where(is_solver, problem, task))`.

    >>> joint_ids(torch.tensor([5, 5, 9, 9]), torch.tensor([0, 1, 0, 0])).tolist()
    [0, 1, 2, 2]
    """
    if not ids or any(x.ndim != 1 or x.is_floating_point() or x.shape != ids[0].shape for x in ids):
        got = ", ".join(f"{x.dtype} {list(x.shape)}" for x in ids) or "none"
        raise ValueError(f"joint_ids: needs integer ids [N], all of one shape, got {got}")
    joint = group_index(ids[0])
    for x in ids[1:]:
        joint = group_index(joint * len(x) + group_index(x))
    return joint


class Rows(NamedTuple):
    """Rows that share statistics with those of their group: every row gets what its group has."""

    group: Tensor  # numbers from 0, as `group_index` gives them
    valid: Tensor

    @property
    def size(self) -> Tensor:
        """How many rows count."""
        return self.total(torch.ones_like(self.group, dtype=torch.float64))

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x`."""
        x = torch.where(self.valid, x, 0)
        return torch.zeros_like(x).index_add(0, self.group, x)[self.group]

    def extreme(self, x: Tensor, which: Literal["amin", "amax"]) -> Tensor:
        """The smallest or largest `x`; that of nothing where no row counts."""
        nothing = torch.inf if which == "amin" else -torch.inf
        x = torch.where(self.valid, x, nothing)
        return torch.full_like(x, nothing).scatter_reduce(0, self.group, x, which)[self.group]

    def centred(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """`x` minus its mean, in which `weights` count."""
        # measured from the smallest, identical values are exact zeros and so is their mean
        x = torch.where(self.valid, x - self.extreme(x, "amin"), 0)
        if weights is None:
            return x - self.total(x) / self.size.clamp(min=1)
        total = self.total(weights)
        return x - self.total(weights * x) / torch.where(total > 0, total, 1)

    def std(self, x: Tensor, n_less: int) -> Tensor:
        """The deviation of `x`, its squares divided by as many fewer than there are."""
        return (self.total(self.centred(x).square()) / (self.size - n_less).clamp(min=1)).sqrt()


def valid_rows(who: str, rewards: Tensor, group_ids: Tensor, valid: Tensor | None) -> Tensor:
    """The rows that count; raises ValueError for what is not rewards, ids and a mask of one length."""
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
