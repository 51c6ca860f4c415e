"""What a role or a task has earned so far, as a baseline that is carried from step to step."""

import torch
from torch import Tensor, nn

from rlloss._checks import check_count, check_range
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.rows import valid_rows

__all__ = ["RunningBaseline"]


class RunningBaseline(nn.Module):
    """A running mean of rewards per key, role-conditioned advantage estimation of https://arxiv.org/abs/2506.24119.

        b_k <- decay b_k + (1 - decay) R   after every reward R of the key k

    For self-play, where the group's mean is the same whatever the policy does: there a role is compared with its own
    past. A call gives the baselines of rows, `update` learns their rewards: in this order a row's own reward is not in
    its baseline. n rewards of one key in an update count as n times their mean, so that rows have no order.

    Keys are numbers below `keys` (a game's role: 2 * game + role). The baselines are float64 buffers, which
    `state_dict` carries; they begin at `start` and stand on the CPU until the module is moved.

    >>> from rlloss import group_advantages
    >>> baseline = RunningBaseline(keys=2, decay=0.5)
    >>> rewards, roles = torch.tensor([1.0, -1.0]), torch.tensor([0, 1])
    >>> baseline.update(rewards, roles)
    >>> group_advantages(rewards, roles, "none", baseline="given", baselines=baseline(roles)).tolist()
    [0.5, -0.5]
    """

    baselines: Tensor

    def __init__(self, keys: int, decay: float = 0.95, start: float = 0.0) -> None:
        super().__init__()
        check_count("RunningBaseline", "keys", keys)
        check_range("RunningBaseline", "decay", decay, 0, 1)
        check_range("RunningBaseline", "start", start)
        self.decay = decay
        self.register_buffer("baselines", torch.full((keys,), start, dtype=torch.float64))

    def forward(self, keys: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The baseline of every row's key, in float64."""
        return self.baselines[keys]

    def update(
        self, rewards: Float[Tensor, " B"], keys: Int[Tensor, " B"], *, valid: Bool[Tensor, " B"] | None = None
    ) -> None:
        """Learns a step's rewards, those of all ranks; rows with a NaN reward or `valid` False are left out."""
        valid = valid_rows("RunningBaseline.update", rewards, keys, valid)
        counts, totals = (
            torch.zeros_like(self.baselines).index_add(0, keys, torch.where(valid, x, 0).to(self.baselines))
            for x in (torch.ones_like(rewards), rewards.detach())
        )
        kept = self.decay**counts
        self.baselines = torch.where(
            counts > 0, kept * self.baselines + (1 - kept) * totals / counts.clamp(min=1), self.baselines
        )

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return f"keys={len(self.baselines)}, decay={self.decay}"
