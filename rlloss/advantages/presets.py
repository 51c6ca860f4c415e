"""Group advantages by the names of their papers: each is options of `group_advantages` and nothing else."""

from typing import Any

from torch import Tensor

from rlloss._checks import nearest
from rlloss._typing import Float, Int
from rlloss.advantages.group import group_advantages

__all__ = ["list_advantages", "needed_inputs", "preset_advantages", "preset_options"]

_PRESETS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"scale": "none"},
    "gpg": {"scale": "none", "per_informative": True},
    "grpo": {"scale": "group"},
    "lite_ppo": {"scale": "batch"},
    "max_rl": {"scale": "mean", "eps": 0.0},
    "opo": {"scale": "none", "baseline": "weighted_mean"},
    "reinforce_pp_baseline": {"scale": "whiten", "eps": 1e-8},
    "remax": {"scale": "none", "baseline": "given"},
    "rloo": {"scale": "none", "baseline": "leave_one_out"},
}
_INPUTS = {
    "weights": "weights [B], the trained tokens of each row (rlloss.sequence_lengths)",
    "baselines": "baselines [B], the reward of a greedy completion of each row's prompt",
}


def list_advantages() -> list[str]:
    """The names that `preset_advantages`, `rlloss.loop.GroupAdvantages` and `train_online(advantages=...)` know.

    >>> "rloo" in list_advantages()
    True
    """
    return sorted(_PRESETS)


def preset_options(name: str, *, who: str = "preset_options") -> dict[str, Any]:
    """The options of `group_advantages` behind a name; case, dashes and dots do not matter.

    >>> preset_options("Dr.GRPO")
    {'scale': 'none'}
    """
    key = str(name).lower().replace("-", "_").replace(".", "_").replace(" ", "_")
    if key not in _PRESETS:
        raise ValueError(
            f"{who}: unknown advantages {name!r}{nearest(key, _PRESETS)} Known: {', '.join(list_advantages())}"
        )
    return dict(_PRESETS[key])


def needed_inputs(scale: str = "group", baseline: str = "mean", **others: Any) -> list[str]:
    """The tensors that options of `group_advantages` take beside rewards and ids; `whiten` over tokens takes weights.

    >>> needed_inputs(**preset_options("remax"))
    ['baselines']
    """
    needs = {"weights": baseline == "weighted_mean" or scale == "whiten", "baselines": baseline == "given"}
    return [name for name, is_needed in needs.items() if is_needed]


def preset_advantages(
    name: str, rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], **options: Any
) -> Float[Tensor, " B"]:
    """The advantages of a paper, with mu and s the mean and the sample deviation of the group.

        grpo         (R - mu) / (s + eps)                  https://arxiv.org/abs/2402.03300, section 4.1.2
        dr_grpo      R - mu                                https://arxiv.org/abs/2503.20783
        rloo         R - mean of the group's others        https://arxiv.org/abs/2402.14740
        lite_ppo     (R - mu) / (s of the batch + eps)     https://arxiv.org/abs/2508.08221
        max_rl       (R - mu) / mu, 0 where mu is 0        https://arxiv.org/abs/2602.02710, algorithm 1
        opo          R - sum l R / sum l, l = `weights`    https://arxiv.org/abs/2505.23585
        remax        R - `baselines`                       https://arxiv.org/abs/2310.10505
        gpg          (R - mu) rows / informative rows      https://arxiv.org/abs/2504.02546
        reinforce_pp_baseline                              https://arxiv.org/abs/2501.03262
                     R - mu, whitened over all tokens of the step; `weights` are the tokens of each row

    `opo` and `reinforce_pp_baseline` take `weights`, the trained tokens of each row, and `remax` takes `baselines`, the
    reward of a greedy completion of each row's prompt.

    Args:
        **options: Of `rlloss.group_advantages`: `valid`, these inputs, or what replaces a choice of the paper.

    >>> import torch
    >>> rewards, group_ids = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4).long()
    >>> preset_advantages("max_rl", rewards, group_ids).tolist()
    [3.0, -1.0, -1.0, -1.0]
    >>> preset_advantages("opo", rewards, group_ids, weights=torch.tensor([5, 1, 2, 2])).tolist()
    [0.5, -0.5, -0.5, -0.5]
    """
    who = "preset_advantages"
    options = preset_options(name, who=who) | options
    for needed in needed_inputs(**options):
        if options.get(needed) is None:
            raise ValueError(f"{who}: {name!r} needs {_INPUTS[needed]}; got None")
    return group_advantages(rewards, group_ids, **options)
