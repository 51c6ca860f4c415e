"""Group advantages by hand, against the specification, and at the edges."""

import math

import pytest
import torch

import rlloss
from rlloss import group_advantages
from rlloss.advantages.group import informative_groups

SCALES = ["group", "batch", "none"]
BASELINES = ["mean", "leave_one_out"]


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


def test_leave_one_out_by_hand():
    rewards, group_ids = torch.tensor([1.0, 4.0, 0.0, 0.5, 9.0]).double(), torch.tensor([5, 2, 5, 5, 2])
    # 1 - (0 + 0.5) / 2, 4 - 9, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2, 9 - 4
    expected = [0.75, -5.0, -0.75, 0.0, 5.0]
    assert group_advantages(rewards, group_ids, "none", baseline="leave_one_out").tolist() == expected
    # the deviation stays that of the group around its mean: sqrt(2 * 2.5^2 / 1) for (4, 9)
    scaled = group_advantages(rewards, group_ids, "group", baseline="leave_one_out", eps=0.0)
    assert scaled[[1, 4]].tolist() == pytest.approx([-5 / math.sqrt(12.5), 5 / math.sqrt(12.5)], rel=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_specification_agrees(scale, dtype, baseline):
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        generator.manual_seed(seed)
        rewards = torch.randn(40, generator=generator, dtype=dtype)
        rewards[::9] = torch.nan
        group_ids = torch.randint(-3, 9, (40,), generator=generator)  # uneven sizes, any order, any integers
        valid = torch.rand(40, generator=generator) > 0.2
        expected = rlloss.reference.group_advantages(rewards.double(), group_ids, scale, baseline=baseline, valid=valid)
        advantages = group_advantages(rewards, group_ids, scale, baseline=baseline, valid=valid)
        assert advantages.dtype is dtype
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rewards_and_single_rows_get_exact_zeros(scale, eps, dtype, baseline):
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, 0.7], dtype=dtype)
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2])
    advantages = group_advantages(rewards, group_ids, scale, baseline=baseline, eps=eps)
    assert advantages.tolist() == [0.0] * 6
    advantages = group_advantages(rewards[:3], group_ids[:3], scale, baseline=baseline, eps=eps)
    assert advantages.tolist() == [0.0] * 3


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_invalid_rows_get_zero_and_have_no_say(scale, baseline):
    rewards, group_ids = torch.tensor([1.0, 0.0, torch.nan, 9.0]), torch.zeros(4).long()
    valid = torch.tensor([True, True, True, False])
    expected = group_advantages(rewards[:2], group_ids[:2], scale, baseline=baseline)
    advantages = group_advantages(rewards, group_ids, scale, baseline=baseline, valid=valid)
    assert advantages.tolist() == [*expected.tolist(), 0.0, 0.0]
    assert not group_advantages(rewards, group_ids, scale, baseline=baseline, valid=valid & False).any()
    assert group_advantages(torch.zeros(0), torch.zeros(0).long(), scale, baseline=baseline).tolist() == []


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


def test_informative_groups_by_hand():
    rewards = torch.tensor([1.0, 0.1, 0.0, 0.1, 1.0, 0.1, 5.0, torch.nan, 2.0, 3.0])
    group_ids = torch.tensor([4, -1, 4, -1, 4, -1, 7, 7, 9, 9])
    valid = torch.tensor([True] * 9 + [False])
    # group 4 differs; -1 is all alike, 7 and 9 have one valid reward each
    expected = [True, False, True, False, True, False, False, False, False, False]
    assert informative_groups(rewards, group_ids, valid=valid).tolist() == expected
    assert informative_groups(rewards, group_ids).tolist() == [*expected[:8], True, True]
    # an invalid row of an informative group is left out as well
    valid[0] = False
    assert informative_groups(rewards, group_ids, valid=valid).tolist() == [False, *expected[1:]]
    assert informative_groups(rewards[:0], group_ids[:0]).tolist() == []


def test_informative_groups_are_those_with_an_advantage():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (60,), generator=generator).float() / 3
    rewards[::11] = torch.nan
    group_ids = torch.randint(0, 20, (60,), generator=generator)
    valid = torch.rand(60, generator=generator) > 0.2
    informative = informative_groups(rewards, group_ids, valid=valid)
    assert informative.tolist() == rlloss.reference.informative_groups(rewards, group_ids, valid=valid)
    # two kinds of reward: the mean of a mixed group is neither
    assert torch.equal(informative, group_advantages(rewards, group_ids, valid=valid) != 0)
    assert 10 < int(informative.sum()) < 50


@pytest.mark.unhooked
def test_bad_input_teaches():
    rewards, group_ids = torch.zeros(2), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"baseline must be one of \['mean', 'leave_one_out'\], got 'loo'"):
        group_advantages(rewards, group_ids, baseline="loo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"informative_groups: rewards \[B\] and integer group_ids \[B\] must match"):
        informative_groups(rewards, group_ids[:1])
    with pytest.raises(ValueError, match="informative_groups: valid must be a bool tensor"):
        informative_groups(rewards, group_ids, valid=rewards)
