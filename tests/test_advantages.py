"""Group advantages by hand, against the specification, and at the edges."""

import math

import pytest
import torch

import rlloss
from rlloss import group_advantages

SCALES = ["group", "batch", "none"]


def test_each_scale_by_hand():
    rewards, group_ids = torch.tensor([1.0, 4.0, 0.0, 3.0]).double(), torch.tensor([5, 2, 5, 2])
    # centred: 0.5, 0.5, -0.5, -0.5; every group's sample deviation is 0.707 for (1, 0) and for (4, 3)
    assert group_advantages(rewards, group_ids, "none").tolist() == [0.5, 0.5, -0.5, -0.5]
    group = 0.5 / (math.sqrt(0.5) + 1e-6)
    expected = [group, group, -group, -group]
    assert group_advantages(rewards, group_ids).tolist() == pytest.approx(expected, rel=1e-12)
    # all rewards: mean 2, deviation sqrt((1 + 4 + 4 + 1) / 3)
    batch = 0.5 / (math.sqrt(10 / 3) + 1e-6)
    expected = [batch, batch, -batch, -batch]
    assert group_advantages(rewards, group_ids, "batch").tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_specification_agrees(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        generator.manual_seed(seed)
        rewards = torch.randn(40, generator=generator, dtype=dtype)
        rewards[::9] = torch.nan
        group_ids = torch.randint(-3, 9, (40,), generator=generator)  # uneven sizes, any order, any integers
        valid = torch.rand(40, generator=generator) > 0.2
        expected = rlloss.reference.group_advantages(rewards.double(), group_ids, scale, valid=valid)
        advantages = group_advantages(rewards, group_ids, scale, valid=valid)
        assert advantages.dtype is dtype
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rewards_and_single_rows_get_exact_zeros(scale, eps, dtype):
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, 0.7], dtype=dtype)
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2])
    assert group_advantages(rewards, group_ids, scale, eps=eps).tolist() == [0.0] * 6
    assert group_advantages(rewards[:3], group_ids[:3], scale, eps=eps).tolist() == [0.0] * 3


@pytest.mark.parametrize("scale", SCALES)
def test_invalid_rows_get_zero_and_have_no_say(scale):
    rewards, group_ids = torch.tensor([1.0, 0.0, torch.nan, 9.0]), torch.zeros(4).long()
    valid = torch.tensor([True, True, True, False])
    expected = group_advantages(rewards[:2], group_ids[:2], scale)
    assert group_advantages(rewards, group_ids, scale, valid=valid).tolist() == [*expected.tolist(), 0.0, 0.0]
    assert not group_advantages(rewards, group_ids, scale, valid=valid & False).any()
    assert group_advantages(torch.zeros(0), torch.zeros(0).long(), scale).tolist() == []


@pytest.mark.parametrize("scale", SCALES)
def test_a_common_offset_changes_nothing(scale):
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.5, 2.0]).double(), torch.tensor([0, 0, 1, 1])
    moved = group_advantages(rewards + 2**20, group_ids, scale)
    torch.testing.assert_close(moved, group_advantages(rewards, group_ids, scale), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_sum_to_zero_in_every_group(scale):
    rewards = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group_ids = torch.arange(30) % 7
    advantages = group_advantages(rewards, group_ids, scale)
    sums = torch.zeros(7, dtype=torch.float64).index_add(0, group_ids, advantages)
    torch.testing.assert_close(sums, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_carry_no_gradient(scale):
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_advantages(rewards, torch.zeros(2).long(), scale).requires_grad
