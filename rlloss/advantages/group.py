"""Group-relative advantages: each completion against the others of its prompt, by one operator with named options."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_device, check_flag, check_like, check_range
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.rows import Rows, valid_rows
from rlloss.advantages.whiten import deviation
from rlloss.reduce import group_index

__all__ = ["group_advantages", "informative_groups"]

Baseline = Literal["mean", "leave_one_out", "weighted_mean", "batch", "none", "given"]
Scale = Literal["group", "batch", "none", "mean", "whiten"]
Std = Literal["sample", "population"]
Singleton = Literal["zero", "raw"]


def group_advantages(
    rewards: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    scale: Scale = "group",
    *,
    baseline: Baseline = "mean",
    baselines: Float[Tensor, " B"] | None = None,
    weights: Float[Tensor, " B"] | Int[Tensor, " B"] | None = None,
    std: Std = "sample",
    floor: float = 0.0,
    per_informative: bool = False,
    singleton: Singleton = "zero",
    valid: Bool[Tensor, " B"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, " B"]:
    """GRPO's advantages, section 4.1.2 of https://arxiv.org/abs/2402.03300, and by options those of many others.

        (R_i - baseline) / scale;   `rlloss.preset_advantages` has the choices of papers by their names

    It takes the rewards of a whole step. Groups may differ in size and stand in any order, and a group of identical
    rewards gets exact zeros. Rows with `valid` False or a NaN reward get 0 and have no say in any statistic; a reward
    function's None is such a NaN: `torch.tensor([math.nan if r is None else r for r in given])`.

    Args:
        group_ids: Any integer per row; rows with the same one are compared. `rlloss.joint_ids` makes one of several.
        scale: s + eps, where s is the deviation of the group (`group`) or of all rewards (`batch`); 1 (`none`); the
            mean reward of the group + eps (`mean`), for rewards that are never negative: a group without a success
            gets zeros. `whiten` takes off the mean over the step of what the baseline left, and divides by
            sqrt(var + eps); there a row counts `weights` times, and zeros of the baseline do not stay zeros.
        baseline: The mean of the group, of its other rows (`leave_one_out`: times n / (n - 1)), of the group by
            `weights` (`weighted_mean`) or of the batch; `none`; or the row's own of `baselines` (`given`).
        weights: How often `weighted_mean` and `whiten` count a row: its trained tokens, say.
        std: Whether squares are divided by n - 1 (`sample`) or n (`population`), in every deviation.
        floor: The deviation of a group counts as at least this share of the batch's: rewards that hardly differ are
            not blown up to the size of others.
        per_informative: Times rows / rows of `informative_groups`: a mean over all rows becomes one over those.
        singleton: What a row with nobody to compare with gets: 0 (`zero`), or its reward as it is (`raw`).
        valid: Rows that count; all of them where None.

    >>> rewards, group_ids = torch.tensor([1.0, 0.0, 0.0, 0.3, 0.3]), torch.tensor([0, 0, 0, 1, 1])
    >>> group_advantages(rewards, group_ids, scale="none", baseline="leave_one_out").tolist()
    [1.0, -0.5, -0.5, 0.0, 0.0]
    """
    who = "group_advantages"
    _check_options(scale, baseline, std, singleton, floor, per_informative, eps)
    _check_inputs(rewards, scale, baseline, baselines, weights)
    valid = valid_rows(who, rewards, group_ids, valid)
    if baselines is not None:
        valid = valid & ~baselines.isnan()
        baselines = baselines.detach().double()
    group, n_less = group_index(group_ids), 1 if std == "sample" else 0
    groups, everyone = Rows(group, valid), Rows(torch.zeros_like(group), valid)
    reward = rewards.detach().double()
    counts = valid.double() if weights is None else torch.where(valid, weights.detach(), 0).double()

    alone = valid & _has_no_peers(groups, counts, baseline, scale)
    centred = torch.where(valid, _above_baseline(groups, everyone, reward, counts, baseline, baselines), 0)
    if scale == "whiten":
        counts = torch.where(alone, 0, counts)
        total = counts.sum()
        centred = deviation(centred, (counts * centred).sum() / total.clamp(min=1))
        divisor = ((counts * centred.square()).sum() / (total - n_less).clamp(min=1) + eps).sqrt()
    else:
        divisor = _divisor(groups, everyone, reward, scale, n_less, floor, eps)
    advantages = torch.where(valid & (centred != 0), centred / divisor, 0)
    if per_informative:
        informative = valid & (groups.extreme(reward, "amin") != groups.extreme(reward, "amax"))
        advantages = advantages * valid.sum() / informative.sum().clamp(min=1)
    return torch.where(alone, reward if singleton == "raw" else 0, advantages).to(rewards.dtype)


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
    valid = valid_rows("informative_groups", rewards, group_ids, valid)
    groups = Rows(group_index(group_ids), valid)
    smallest = groups.extreme(rewards.detach(), "amin")
    return valid & (smallest != groups.extreme(rewards.detach(), "amax"))


def compares_within_groups(scale: str = "group", baseline: str = "mean", **others: Any) -> bool:
    """Whether these options of `group_advantages` ask a row's group for a statistic, which a group of one has not."""
    return baseline in ("mean", "leave_one_out", "weighted_mean") or scale in ("group", "mean")


def _has_no_peers(groups: Rows, counts: Tensor, baseline: Baseline, scale: Scale) -> Tensor:
    if baseline == "weighted_mean":
        return (groups.size < 2) | (groups.total(counts) <= 0)
    return (groups.size < 2) & compares_within_groups(scale, baseline)


def _above_baseline(
    groups: Rows, everyone: Rows, reward: Tensor, counts: Tensor, baseline: Baseline, baselines: Tensor | None
) -> Tensor:
    if baseline == "leave_one_out":
        return groups.centred(reward) * groups.size / (groups.size - 1).clamp(min=1)
    if baseline in ("mean", "weighted_mean"):
        return groups.centred(reward, counts if baseline == "weighted_mean" else None)
    if baseline == "batch":
        return everyone.centred(reward)
    return reward if baselines is None else reward - baselines


def _divisor(
    groups: Rows, everyone: Rows, reward: Tensor, scale: Scale, n_less: int, floor: float, eps: float
) -> Tensor:
    if scale == "none":
        return torch.ones_like(reward)
    if scale == "mean":
        mean = groups.total(reward) / groups.size.clamp(min=1)
        return torch.where(mean > 0, mean + eps, torch.inf)
    if scale == "batch" or floor:
        of_batch = everyone.std(reward, n_less)
        if scale == "batch":
            return of_batch + eps
        return torch.maximum(groups.std(reward, n_less), floor * of_batch) + eps
    return groups.std(reward, n_less) + eps


def _check_options(
    scale: str, baseline: str, std: str, singleton: str, floor: float, per_informative: bool, eps: float
) -> None:
    who = "group_advantages"
    check_choice(who, "scale", scale, get_args(Scale))
    check_choice(who, "baseline", baseline, get_args(Baseline))
    check_choice(who, "std", std, get_args(Std))
    check_choice(who, "singleton", singleton, get_args(Singleton))
    check_flag(who, "per_informative", per_informative)
    check_range(who, "eps", eps, 0)
    check_range(who, "floor", floor, 0)
    if floor and scale != "group":
        raise ValueError(f"{who}: {floor=} bounds the deviation of a group, and scale={scale!r} has none; leave it out")


def _check_inputs(rewards: Tensor, scale: str, baseline: str, baselines: Tensor | None, weights: Tensor | None) -> None:
    who = "group_advantages"
    if (baseline == "given") != (baselines is not None):
        got = "None" if baselines is None else "a tensor"
        raise ValueError(f"{who}: baseline='given' takes baselines [B], and only it does; got {baseline=} and {got}")
    if baselines is not None:
        check_like(who, "baselines", baselines, "rewards", rewards)
    if baseline == "weighted_mean" and weights is None:
        raise ValueError(f"{who}: baseline='weighted_mean' needs weights [B], the trained tokens of each row, say")
    if weights is None:
        return
    if baseline != "weighted_mean" and scale != "whiten":
        raise ValueError(
            f"{who}: weights are for baseline='weighted_mean' and scale='whiten', and would reach nothing with "
            f"{baseline=} {scale=}; leave them out"
        )
    if not isinstance(weights, Tensor) or weights.shape != rewards.shape:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{who}: weights must be {list(rewards.shape)} as rewards, got {got}")
    check_device(who, "weights", weights, "rewards", rewards)
