"""Group advantages by hand, against the specification, and at the edges."""

# pyright: reportArgumentType=false

import math
import re
from typing import Any

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


# the operator's options


def batch(seed=0, rows=40):
    """Rewards with NaN among them, ids of uneven groups in any order, validity, weights and baselines; in float64."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, generator=generator, dtype=torch.float64)
    rewards[::9] = torch.nan
    group_ids = torch.randint(-3, 9, (rows,), generator=generator)
    weights = torch.randint(0, 7, (rows,), generator=generator)
    weights[group_ids == 2] = 0
    baselines = torch.randn(rows, generator=generator, dtype=torch.float64)
    baselines[5] = torch.nan
    return rewards, group_ids, torch.rand(rows, generator=generator) > 0.2, weights, baselines


OPTIONS: list[dict[str, Any]] = [
    {"scale": "group", "std": "population"},
    {"scale": "batch", "std": "population", "baseline": "batch"},
    {"scale": "group", "floor": 0.7},
    {"scale": "group", "baseline": "none"},
    {"scale": "group", "baseline": "given"},
    {"scale": "none", "baseline": "given"},
    {"scale": "none", "baseline": "weighted_mean"},
    {"scale": "batch", "baseline": "weighted_mean", "singleton": "raw"},
    {"scale": "none", "baseline": "none", "per_informative": True},
    {"scale": "group", "per_informative": True, "singleton": "raw"},
    {"scale": "mean", "baseline": "mean", "eps": 0.1},
    {"scale": "mean", "baseline": "batch", "singleton": "raw"},
    {"scale": "whiten"},
    {"scale": "whiten", "baseline": "batch", "std": "population"},
    {"scale": "whiten", "baseline": "none", "weights": None},
    {"scale": "whiten", "baseline": "leave_one_out", "per_informative": True},
    {"scale": "whiten", "baseline": "weighted_mean", "eps": 0.5},
]


def with_inputs(options, weights, baselines):
    takes_weights = options.get("baseline") == "weighted_mean" or options["scale"] == "whiten"
    given: dict[str, Any] = {"weights": weights} if takes_weights else {}
    return given | ({"baselines": baselines} if options.get("baseline") == "given" else {}) | options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_agrees_with_the_specification(options):
    for seed in range(4):
        rewards, group_ids, valid, weights, baselines = batch(seed)
        rewards = rewards.abs() if options["scale"] == "mean" else rewards
        chosen = with_inputs(options, weights, baselines)
        expected = rlloss.reference.group_advantages(rewards, group_ids, valid=valid, **chosen)
        advantages = group_advantages(rewards, group_ids, valid=valid, **chosen)
        assert len(set(expected)) > 5
        torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("options", [{"scale": scale} for scale in SCALES] + OPTIONS, ids=str)
def test_what_stands_in_invalid_rows_changes_no_bit(options, poison):
    rewards, group_ids, valid, weights, baselines = batch()
    baselines = baselines.nan_to_num(0)
    clean = group_advantages(rewards, group_ids, valid=valid, **with_inputs(options, weights, baselines))
    dirty = [torch.where(valid, x.double(), poison) for x in (rewards, weights, baselines)]
    actual = group_advantages(dirty[0], group_ids, valid=valid, **with_inputs(options, *dirty[1:]))
    assert torch.equal(actual, clean)
    assert not clean[~valid].any()


@pytest.mark.parametrize("options", [{"scale": scale} for scale in SCALES] + OPTIONS, ids=str)
def test_the_order_of_rows_and_the_names_of_groups_do_not_matter(options):
    rewards, group_ids, valid, weights, baselines = batch()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    expected = group_advantages(rewards, group_ids, valid=valid, **with_inputs(options, weights, baselines))
    moved = with_inputs(options, weights[order], baselines[order])
    actual = group_advantages(rewards[order], 100 - 7 * group_ids[order].int(), valid=valid[order], **moved)
    torch.testing.assert_close(actual, expected[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"scale": scale} for scale in SCALES] + OPTIONS, ids=str)
def test_float32_is_float64_rounded_once(options):
    rewards, group_ids, valid, weights, baselines = batch()
    rewards, baselines = rewards.float(), baselines.float()
    double = with_inputs(options, weights, baselines.double())
    expected = group_advantages(rewards.double(), group_ids, valid=valid, **double)
    actual = group_advantages(rewards, group_ids, valid=valid, **with_inputs(options, weights, baselines))
    assert actual.dtype is torch.float32
    assert torch.equal(actual, expected.float())


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if o.get("baseline") not in ("none", "given") and not o.get("singleton")], ids=str
)
def test_identical_rewards_get_exact_zeros_from_every_group_baseline(options):
    weights = torch.tensor([3, 1, 2, 5, 4, 4])
    for eps in (0.0, 1e-6):
        rewards = torch.full((6,), 0.1)
        group_ids = torch.tensor([0, 0, 0, 1, 2, 2])
        chosen = with_inputs(options | {"eps": eps}, weights, None)
        assert group_advantages(rewards, group_ids, **chosen).tolist() == [0.0] * 6


def test_a_group_of_one_gets_zero_or_by_request_its_reward():
    # verl's GRPO and RLOO give the reward, its vectorised RLOO gives 0; here it is a word
    rewards, group_ids = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([0, 1, 1])
    for scale in SCALES:
        for baseline in BASELINES:
            advantages = group_advantages(rewards, group_ids, scale, baseline=baseline)
            raw = group_advantages(rewards, group_ids, scale, baseline=baseline, singleton="raw")
            assert advantages[0] == 0.0
            assert raw[0] == rewards[0]
            assert torch.equal(raw[1:], advantages[1:])
    # nothing is asked of the group: a row of its own is a row as any other
    lone = group_advantages(rewards, group_ids, "none", baseline="none")
    assert torch.equal(lone, rewards)
    # rows without weight do not make a group's mean
    weights = torch.tensor([1.0, 0.0, 0.0])
    heavy = group_advantages(rewards, group_ids, "none", baseline="weighted_mean", weights=weights, singleton="raw")
    assert torch.equal(heavy, rewards)


def test_leave_one_out_shares_one_deviation_so_no_winner_spikes():
    # the deviation of the others alone makes the winner's advantage 2154 here, from float32's rounding of 0.35
    rewards, group_ids = torch.tensor([0.35] * 7 + [0.7]), torch.zeros(8).long()
    winner = [(7 / 8) * math.sqrt(8), (7 / 8) * math.sqrt(8) * math.sqrt(8 / 7)]
    for std, mean_baseline in zip(("sample", "population"), winner, strict=True):
        for baseline, factor in (("mean", 1.0), ("leave_one_out", 8 / 7)):
            advantages = group_advantages(rewards, group_ids, baseline=baseline, std=std)
            assert advantages[7] == pytest.approx(factor * mean_baseline, rel=1e-4)
            assert advantages[:7].tolist() == pytest.approx([-factor * mean_baseline / 7] * 7, rel=1e-4)
    assert winner == pytest.approx([2.4749, 2.6458], abs=1e-4)


def test_one_winner_is_on_the_scale_of_the_losers():
    # with the deviation of the others the winner stays at 1.0, unscaled, while the losers are scaled
    advantages = group_advantages(torch.tensor([0.0] * 7 + [1.0]), torch.zeros(8).long(), baseline="leave_one_out")
    assert advantages[7] == pytest.approx(-7 * float(advantages[0]), rel=1e-6)
    assert advantages[7] == pytest.approx(math.sqrt(8), rel=1e-5)


def test_a_floor_keeps_rewards_that_hardly_differ_small():
    rewards = torch.tensor([0.5, 0.5 + 1e-5, 1.0, 0.0], dtype=torch.float64)
    group_ids = torch.tensor([0, 0, 1, 1])
    of_batch = float(rewards.std())
    free, bounded = (group_advantages(rewards, group_ids, floor=floor, eps=0.0) for floor in (0.0, 0.1))
    assert free.abs().tolist() == pytest.approx([math.sqrt(0.5)] * 4, rel=1e-6)
    assert bounded[:2].abs().tolist() == pytest.approx([0.5e-5 / (0.1 * of_batch)] * 2, rel=1e-6)
    assert torch.equal(bounded[2:], free[2:])


def test_per_informative_makes_the_mean_over_rows_one_over_the_rows_that_teach():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, torch.nan, 2.0]).double()
    group_ids = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
    plain = group_advantages(rewards, group_ids, "none")
    scaled = group_advantages(rewards, group_ids, "none", per_informative=True)
    torch.testing.assert_close(scaled, plain * 7 / 3)  # seven rows count, three of them in a group that differs
    identical = group_advantages(torch.ones(4), torch.tensor([0, 0, 1, 1]), "none", per_informative=True)
    assert identical.tolist() == [0.0] * 4


def test_whitened_rewards_have_mean_zero_and_variance_one_over_the_tokens_of_rows():
    rewards, group_ids, _, weights, _ = batch()
    group_ids = group_ids % 3
    advantages = group_advantages(rewards, group_ids, "whiten", weights=weights, eps=0.0)
    counts = torch.where(rewards.isnan(), 0, weights)
    tokens = advantages.repeat_interleave(counts)
    assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(tokens.var()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_waits_for_the_device(scale):
    # a meta tensor has no values: whoever asks for one, raises
    rewards, group_ids = torch.zeros(6, device="meta"), torch.zeros(6, device="meta").long()
    assert group_advantages(rewards, group_ids, scale, per_informative=True).shape == (6,)
    given = group_advantages(rewards, group_ids, scale, baseline="given", baselines=rewards, valid=rewards > 0)
    assert given.shape == (6,)
    whitened = group_advantages(rewards, group_ids, "whiten", baseline="weighted_mean", weights=rewards)
    assert whitened.shape == (6,)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    "options", [{"scale": "group", "floor": 0.1}, *OPTIONS[5:8], OPTIONS[10], OPTIONS[-1]], ids=str
)
def test_one_graph_computes_them(options):
    compiled = torch.compile(group_advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 24):
        rewards, group_ids, valid, weights, baselines = batch(rows=rows)
        chosen = with_inputs(options, weights, baselines)
        expected = group_advantages(rewards, group_ids, valid=valid, **chosen)
        torch.testing.assert_close(compiled(rewards, group_ids, valid=valid, **chosen), expected, rtol=1e-12, atol=0)


# who is compared with whom


def test_joint_ids_agree_where_all_do():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(-4, 4, (50,), generator=generator) * 10**k for k in (0, 9, 3)]
    joint = rlloss.joint_ids(*ids)
    same = torch.stack([x[:, None] == x for x in ids]).all(0)
    assert torch.equal(joint[:, None] == joint, same)
    assert torch.equal(rlloss.joint_ids(ids[0])[:, None] == rlloss.joint_ids(ids[0]), ids[0][:, None] == ids[0])
    assert rlloss.joint_ids(torch.zeros(0).long(), torch.zeros(0).int()).tolist() == []


def test_hierarchical_groups_are_a_choice_of_ids():
    # two proposals of one task, three solutions of each; solvers meet those of their problem, proposers each other
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.3])
    is_solver = torch.tensor([False, True, True, True, True, True, True, False])
    problem, task = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.zeros(8).long()
    ids = rlloss.joint_ids(is_solver.long(), torch.where(is_solver, problem, task))
    advantages = group_advantages(rewards, ids, "none")
    expected = [0.35, -2 / 3, 1 / 3, 1 / 3, 0.0, 0.0, 0.0, -0.35]
    torch.testing.assert_close(advantages, torch.tensor(expected))


X, IDS = torch.zeros(2), torch.zeros(2).long()
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"baseline": "loo"},
        "baseline must be one of ['mean', 'leave_one_out', 'weighted_mean', 'batch', 'none', 'given']",
    ),
    ({"scale": "std"}, "scale must be one of ['group', 'batch', 'none', 'mean', 'whiten'], got 'std'"),
    ({"std": "biased"}, "std must be one of ['sample', 'population'], got 'biased'"),
    ({"singleton": "one"}, "singleton must be one of ['zero', 'raw'], got 'one'"),
    ({"per_informative": 1}, "per_informative must be True or False, got 1"),
    ({"eps": -1.0}, "eps must be a number in [0, inf], got -1.0"),
    ({"floor": -1.0}, "floor must be a number in [0, inf], got -1.0"),
    ({"floor": 0.1, "scale": "batch"}, "floor=0.1 bounds the deviation of a group, and scale='batch' has none"),
    ({"baseline": "given"}, "baseline='given' takes baselines [B], and only it does; got baseline='given' and None"),
    ({"baselines": X}, "baseline='given' takes baselines [B], and only it does; got baseline='mean' and a tensor"),
    ({"baseline": "given", "baselines": X[:1]}, "baselines must have the shape of rewards, [2], got [1]"),
    ({"baseline": "weighted_mean"}, "baseline='weighted_mean' needs weights [B]"),
    ({"weights": X}, "would reach nothing with baseline='mean' scale='group'; leave them out"),
    ({"scale": "whiten", "weights": X[:1]}, "weights must be [2] as rewards, got [1]"),
    ({"scale": "whiten", "weights": 1.0}, "weights must be [2] as rewards, got float"),
    ({"rewards": X[0]}, "rewards [B] and integer group_ids [B] must match, got []"),
    ({"rewards": X.half()}, "rewards must be float32 or float64, got torch.float16"),
    ({"group_ids": X}, "rewards [B] and integer group_ids [B] must match, got [2] and torch.float32 [2]"),
    ({"valid": X}, "valid must be a bool tensor"),
    ({"valid": X[:1] > 0}, "valid must be [2] as rewards, got [1]"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_options_teach(bad, message):
    with pytest.raises(ValueError, match=re.escape("group_advantages: ") + ".*" + re.escape(message)):
        group_advantages(**{"rewards": X, "group_ids": IDS} | bad)


@pytest.mark.unhooked
def test_bad_input_teaches():
    with pytest.raises(ValueError, match=r"informative_groups: rewards \[B\] and integer group_ids \[B\] must match"):
        informative_groups(X, IDS[:1])
    with pytest.raises(ValueError, match="informative_groups: valid must be a bool tensor"):
        informative_groups(X, IDS, valid=X)
    with pytest.raises(
        ValueError, match=r"joint_ids: needs integer ids \[N\], all of one shape, got torch.float32 \[2\]"
    ):
        rlloss.joint_ids(X)
    with pytest.raises(ValueError, match=r"joint_ids: needs integer ids \[N\], all of one shape, got none"):
        rlloss.joint_ids()
