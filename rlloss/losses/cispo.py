"""CISPO: the importance weight is clipped, never the token."""

from typing import ClassVar, Unpack

from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import WeightedPolicyLoss, held_ratio

__all__ = ["CISPOLoss"]


class CISPOLoss(WeightedPolicyLoss):
    """CISPO, equations 4 and 5 of https://arxiv.org/abs/2506.13585.

    PPO's clip lets go of a token whose ratio has left its range, often a rare one that turns the reasoning; here the
    weight is held and carries no gradient, so that every token goes on teaching.

        loss = -(1/N) sum_t sg[clip(r_t, ratio_min, ratio_max)] A_t l_t    (N trained tokens)
        dloss/dl_t = -(1/N) clip(r_t, ratio_min, ratio_max) A_t

    Papers and systems write the bounds as offsets from 1 or as the bounds themselves; these are the bounds. `PRESETS`
    holds what each one means, as in `CISPOLoss(**CISPOLoss.PRESETS["scale_rl"])`:

        minimax_m1   0 to 1 + eps_high    the paper: eps_low so large that it holds nothing, eps_high not published
        scale_rl     0 to 5               min(r, eps_max) of https://arxiv.org/abs/2510.13786
        tinker       0 to 4               its clip_low_threshold and clip_high_threshold
        trl          0 to epsilon_high    5 in its own recipe; its default of 0.2 holds every weight at 0.2
        verl         0.8 to 1.2           offsets of 0.2 to either side

    Base class: inputs, options and metrics (ratio is the one before the clip); adds clip_frac, the share of tokens
    whose weight is clipped.

    Args:
        ratio_max: Largest weight, above 1; `math.inf` for none but the bound of every ratio, max_log_ratio.
        ratio_min: Least weight, at most 1.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> CISPOLoss(ratio_max=2.0)(l, l - 3, torch.tensor([0.5]), mask).loss  # 2 * 0.5 * (1 + 2) / 2
    tensor(1.5000)
    """

    reduction = "token_mean"
    PRESETS: ClassVar[dict[str, dict[str, float]]] = {
        "minimax_m1": {"ratio_min": 0.0},  # its ratio_max is for the user to say
        "scale_rl": {"ratio_min": 0.0, "ratio_max": 5.0},
        "tinker": {"ratio_min": 0.0, "ratio_max": 4.0},
        "trl": {"ratio_min": 0.0, "ratio_max": 5.0},
        "verl": {"ratio_min": 0.8, "ratio_max": 1.2},
    }

    def __init__(self, *, ratio_max: float, ratio_min: float = 0.0, **options: Unpack[PolicyOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "ratio_min", ratio_min, 0, 1)
        check_range(self._who, "ratio_max", ratio_max)
        if ratio_max <= 1:
            raise ValueError(
                f"{self._who}: ratio_max must be above 1, got {ratio_max!r}; it is the largest weight itself and no "
                "offset from 1, for which write 1 + eps_high (TRL's default epsilon_high=0.2 read as the bound clamps "
                "every weight)"
            )
        self.ratio_min, self.ratio_max = ratio_min, ratio_max

    def weights(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The token's ratio, clipped."""
        return held_ratio(batch, self.ratio_min, self.ratio_max)
