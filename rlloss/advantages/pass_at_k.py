"""Advantages for the best of k completions, where the usual ones are for the mean of all."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_choice, check_count, check_range
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.rows import Rows, valid_rows
from rlloss.reduce import group_index

__all__ = ["pass_at_k_advantages"]

_ROUNDING = 1e-12  # of sums over a group whose rewards lie in [0, 1]


def pass_at_k_advantages(
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    k: int | None = None,
    *,
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out",
    valid: Bool[Tensor, " B"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " B"]:
    """Pass@k's advantages: what a completion adds to the largest reward of k completions of its prompt.

        leave_one_out   mean over the k-subsets S with i of max(S) - max(S without i)
        mean            (mean over the k-subsets S with i of max(S) - m) / (s + eps)

    where m and s are mean and deviation of max(S) over all k-subsets of the group. `leave_one_out` with k = None,
    the whole group, is https://arxiv.org/abs/2503.19595: its best completion gets the distance to the second, the
    others 0; a smaller k averages that over the subsets, as https://arxiv.org/abs/2505.15201 does. `mean` is Pass@k
    Training, equations 11 to 15 of https://arxiv.org/abs/2508.10751, which are those of rewards 0 and 1; k = 1 is
    GRPO with the population deviation. Neither draws a subset: sorted rewards have their means in closed form.

    A group of fewer than k rows has no such subset and gets zeros, as does one of identical rewards. Rows with `valid`
    False or a NaN reward get 0 and have no say.

    Args:
        k: Of `leave_one_out` at least 2; None is each group's own size, where `mean` has a single subset and needs k.

    >>> rewards, group_ids = torch.tensor([1.0, 0.2, 0.5, 0.0]), torch.zeros(4).long()
    >>> pass_at_k_advantages(rewards, group_ids).tolist()
    [0.5, 0.0, 0.0, 0.0]
    >>> [round(a, 2) for a in pass_at_k_advantages(rewards.round(), group_ids, 2, baseline="mean").tolist()]
    [1.0, -0.33, -0.33, -0.33]
    """
    who = "pass_at_k_advantages"
    check_choice(who, "baseline", baseline, ("leave_one_out", "mean"))
    check_range(who, "eps", eps, 0)
    _check_k(k, baseline)
    valid = valid_rows(who, rewards, group_ids, valid)
    groups = Rows(group_index(group_ids), valid)
    reward = torch.where(valid, rewards.detach(), 0).double()
    smallest, largest = groups.extreme(reward, "amin"), groups.extreme(reward, "amax")
    width = torch.where(valid, largest - smallest, 0)
    # in units of the group's own range, whatever another group earned, and infinities come back by the width
    x = torch.where(valid & (width > 0), (reward - smallest) / width, 0).nan_to_num(0)

    order, below = _places(groups, x)
    n, x = groups.size[order], x[order]
    k_ = n if k is None else torch.full_like(n, k)  # a tensor, as n is
    # C(m, k - 1) of the C(n, k) subsets have the row with m rows below it for their largest
    if baseline == "leave_one_out":
        gain = _share(below, k_ - 1, n - 1, k_ - 1) * x - _sum_below(_share(below, k_ - 2, n - 1, k_ - 1) * x, below)
        spread, eps = torch.ones_like(x), 0.0
    else:
        wins = Rows(groups.group[order], valid[order])
        share = _share(below, k_ - 1, n, k_)
        mean = wins.total(share * x)
        above = _share(below - 1, k_ - 2, n - 1, k_ - 1) * x
        gain = _share(below, k_ - 1, n - 1, k_ - 1) * x + wins.total(above) - _sum_below(above, below) - above - mean
        spread = wins.total(share * (x - mean).square()).sqrt() * width[order]
    gain = torch.where(gain.abs() > _ROUNDING, gain * width[order] / (spread + eps), 0)
    advantages = torch.empty_like(gain).scatter(0, order, gain)
    return torch.where(valid, advantages, 0).to(rewards.dtype)


def _places(groups: Rows, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by group and `x` in it, those that do not count last, and how many of its group lie below each."""
    order = x.argsort(stable=True)
    key = torch.where(groups.valid, groups.group, len(x))
    order = order[key[order].argsort(stable=True)]
    sizes = torch.zeros_like(x).index_add(0, groups.group, groups.valid.double())
    begins = sizes.cumsum(0) - sizes
    return order, torch.arange(len(x), device=x.device) - begins[groups.group[order]]


def _sum_below(x: Tensor, below: Tensor) -> Tensor:
    """Every row gets the sum of those below it in its group, of rows in the order of `_places`."""
    so_far = F.pad(x.cumsum(0), (1, 0))[: len(x)]
    begin = torch.arange(len(x), device=x.device) - below.long()
    return so_far - so_far[begin]


def _share(m: Tensor, i: Tensor, n: Tensor, j: Tensor) -> Tensor:
    """C(m, i) / C(n, j), 0 where nobody can choose so many."""
    return torch.where((i >= 0) & (i <= m) & (j <= n), (_log_choose(m, i) - _log_choose(n, j)).exp(), 0)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _check_k(k: int | None, baseline: str) -> None:
    who = "pass_at_k_advantages"
    if k is not None:
        check_count(who, "k", k)
    if baseline == "mean" and k is None:
        raise ValueError(f"{who}: baseline='mean' compares subsets of k completions and needs k, got None")
    if baseline == "leave_one_out" and k == 1:
        raise ValueError(
            f"{who}: baseline='leave_one_out' needs k of at least 2, as nobody is left of 1; for k=1 see "
            "rlloss.group_advantages(baseline='leave_one_out', scale='none')"
        )
