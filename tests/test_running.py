"""The precision of what is carried from step to step."""

import math

import pytest
import torch

from rlloss import Moments
from rlloss.advantages.running import RunningRewardNorm


def test_running_norm_subtracts_in_float64():
    rewards = torch.tensor([2.0**24, 2.0**24 + 2])  # float32 has no number for their mean
    norm = RunningRewardNorm()
    norm.update(Moments.of(rewards.double(), rewards > 0))
    assert norm(rewards).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
