"""Numbers that carry no gradient, where no loss would show it."""

import torch

from rlloss import Mean
from rlloss.advantages.running import RunningRewardNorm
from rlloss.output import Moments


def test_a_constant_metric_carries_no_gradient():
    value = torch.tensor(1.0, requires_grad=True)
    assert not any(x.requires_grad for x in Mean.constant(value, torch.tensor(3)))


def test_running_norm_learns_no_gradient():
    mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    norm = RunningRewardNorm()
    norm.update(Moments(torch.tensor(2), mean, 2 * mean))
    assert not any(x.requires_grad for x in norm.moments)
