"""What is carried from step to step: its default and its precision."""

import math

import pytest
import torch

from rlloss.advantages.running import AdaptiveKLController, RunningRewardNorm
from rlloss.output import Moments


def test_the_controllers_default_horizon_is_the_papers():
    assert AdaptiveKLController(0.1, target_kl=6.0).horizon == 10000


def test_running_norm_subtracts_in_float64():
    rewards = torch.tensor([2.0**24, 2.0**24 + 2])  # float32 has no number for their mean
    norm = RunningRewardNorm()
    norm.update(Moments.of(rewards.double(), rewards > 0))
    assert norm(rewards).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
