"""What carries no gradient, where no loss would show it."""

import torch

from rlloss import LossOutput, Mean, Moments, waist_gradient
from rlloss.advantages.running import RunningRewardNorm


def test_a_constant_metric_carries_no_gradient():
    value = torch.tensor(1.0, requires_grad=True)
    assert not any(x.requires_grad for x in Mean.constant(value, torch.tensor(3)))


def test_running_norm_learns_no_gradient():
    mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    norm = RunningRewardNorm()
    norm.update(Moments(torch.tensor(2), mean, 2 * mean))
    assert not any(x.requires_grad for x in norm.moments)


def test_waist_gradient_leaves_the_callers_tensors_as_they_are():
    logprobs = torch.tensor([1.0])
    waist_gradient(lambda x: LossOutput(x.sum(), {}), logprobs)
    assert not logprobs.requires_grad
