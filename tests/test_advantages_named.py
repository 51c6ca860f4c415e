"""Advantages by the names of their papers: by hand, against the specification, what they estimate, and at the edges."""

# pyright: reportArgumentType=false

import itertools
import math
import re
from typing import Any

import pytest
import torch

import rlloss
from rlloss import RunningBaseline, gdpo_advantages, group_advantages, pass_at_k_advantages, preset_advantages
from rlloss.advantages.presets import needed_inputs, preset_options

NAMES = rlloss.list_advantages()
POISON = [torch.nan, torch.inf, -torch.inf, 1e30]


def batch(seed=0, rows=40):
    """Rewards of uneven groups, two of them alike, with NaN among them; ids, validity and lengths; in float64."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (rows,), generator=generator).double() / 3
    group_ids = torch.randint(-3, 9, (rows,), generator=generator)
    rewards[group_ids == 1], rewards[group_ids == 3] = 0.1, 0.0
    rewards[::9] = torch.nan
    return (
        rewards,
        group_ids,
        torch.rand(rows, generator=generator) > 0.2,
        torch.randint(1, 7, (rows,), generator=generator),
    )


def inputs_of(name, lengths, greedy):
    every = {"weights": lengths, "baselines": greedy}
    return {needed: every[needed] for needed in needed_inputs(**preset_options(name))}


# presets


def test_every_preset_by_hand():
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5]).double(), torch.tensor([3, 3, 3, 8, 8])
    inputs = {
        "opo": {"weights": torch.tensor([4, 2, 2, 7, 1])},
        "remax": {"baselines": torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5]).double()},
        "reinforce_pp_baseline": {"weights": torch.tensor([1, 2, 1, 3, 2])},
    }
    # its tokens: 2/3, three times -1/3, five times 0, of mean -1/27 and variance (4/9 + 3/9 - 9/729) / 8
    whitened = [(x + 1 / 27) / math.sqrt((7 / 9 - 1 / 81) / 8) for x in (2 / 3, -1 / 3, -1 / 3, 0.0, 0.0)]
    expected = {
        "dr_grpo": [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0],
        "gpg": [10 / 9, -5 / 9, -5 / 9, 0.0, 0.0],
        "grpo": [x / math.sqrt(1 / 3) for x in (2 / 3, -1 / 3, -1 / 3)] + [0.0] * 2,
        "lite_ppo": [x / math.sqrt(0.175) for x in (2 / 3, -1 / 3, -1 / 3)] + [0.0] * 2,
        "max_rl": [2.0, -1.0, -1.0, 0.0, 0.0],
        "opo": [0.5, -0.5, -0.5, 0.0, 0.0],
        "reinforce_pp_baseline": whitened,
        "remax": [0.5, -0.5, -0.5, 0.0, 0.0],
        "rloo": [1.0, -0.5, -0.5, 0.0, 0.0],
    }
    assert sorted(expected) == NAMES
    for name, advantages in expected.items():
        actual = preset_advantages(name, rewards, group_ids, **inputs.get(name, {}))
        assert actual.tolist() == pytest.approx(advantages, rel=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_agrees_with_its_papers_formula(name):
    for seed in range(5):
        rewards, group_ids, valid, lengths = batch(seed)
        inputs = inputs_of(name, lengths, rewards.nan_to_num(0).flip(0))
        expected = rlloss.reference.preset_advantages(name, rewards, group_ids, valid=valid, **inputs)
        actual = preset_advantages(name, rewards, group_ids, valid=valid, **inputs)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        assert len(set(expected)) > 5


@pytest.mark.parametrize("name", NAMES)
def test_identical_rewards_teach_nothing_by_any_name(name):
    for reward in (0.1, 0.0, 1.0):
        rewards = torch.full((7,), reward)
        inputs = inputs_of(name, torch.tensor([3, 1, 2, 5, 4, 4, 9]), rewards)
        assert preset_advantages(name, rewards, torch.tensor([0, 0, 0, 1, 2, 2, 2]), **inputs).tolist() == [0.0] * 7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", POISON)
def test_what_stands_in_invalid_rows_changes_no_bit(name, poison):
    rewards, group_ids, valid, lengths = batch()
    greedy = rewards.nan_to_num(0).flip(0)
    clean = preset_advantages(name, rewards, group_ids, valid=valid, **inputs_of(name, lengths, greedy))
    dirty = [torch.where(valid, x.double(), poison) for x in (rewards, lengths, greedy)]
    actual = preset_advantages(name, dirty[0], group_ids, valid=valid, **inputs_of(name, *dirty[1:]))
    assert torch.equal(actual, clean)
    assert not clean[~valid | rewards.isnan()].any()


def test_a_group_without_a_success_has_no_likelihood_to_raise():
    # also where rewards are negative, which the estimator does not know
    rewards, group_ids = torch.tensor([0.0, 0.0, -1.0, 0.5, 1.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert preset_advantages("max_rl", rewards, group_ids).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, -1.0]


def test_whitening_over_tokens_is_whiten_of_the_rows_tokens():
    rewards, group_ids, valid, lengths = batch()
    mask = (torch.arange(7) < lengths[:, None]) & (valid & ~rewards.isnan())[:, None]
    sizes = (group_ids[:, None] == group_ids)[:, valid & ~rewards.isnan()].sum(1)
    mask &= (sizes > 1)[:, None]  # tokens of a row without peers are not the step's to whiten
    centred = group_advantages(rewards, group_ids, "none", valid=valid)
    tokens = rlloss.whiten(rlloss.to_tokens(centred, mask), mask)
    actual = preset_advantages("reinforce_pp_baseline", rewards, group_ids, valid=valid, weights=lengths)
    torch.testing.assert_close(rlloss.to_tokens(actual, mask) * mask, tokens, rtol=1e-9, atol=1e-12)


def test_names_are_spelled_as_people_spell_them():
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3).long()
    for spelling in ("Dr.GRPO", "DR-GRPO", "dr grpo"):
        assert torch.equal(
            preset_advantages(spelling, rewards, group_ids), group_advantages(rewards, group_ids, "none")
        )


def test_an_option_replaces_a_choice_of_the_paper():
    rewards, group_ids = torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3).long()
    wide = preset_advantages("grpo", rewards, group_ids, eps=1.0, std="population")
    assert torch.equal(wide, group_advantages(rewards, group_ids, std="population", eps=1.0))
    assert torch.equal(preset_advantages("grpo", rewards, group_ids), group_advantages(rewards, group_ids))
    centred = preset_advantages("grpo", rewards, group_ids, scale="none")
    assert torch.equal(centred, group_advantages(rewards, group_ids, "none"))


@pytest.mark.unhooked
def test_presets_teach():
    rewards, group_ids = torch.zeros(2), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"unknown advantages 'rlo'; did you mean 'rloo'.* Known: dr_grpo, gpg, grpo"):
        preset_advantages("rlo", rewards, group_ids)
    with pytest.raises(ValueError, match=r"'remax' needs baselines \[B\], the reward of a greedy completion"):
        preset_advantages("remax", rewards, group_ids)
    with pytest.raises(ValueError, match=r"'opo' needs weights \[B\], the trained tokens of each row"):
        preset_advantages("opo", rewards, group_ids)
    with pytest.raises(ValueError, match=r"weights are for baseline='weighted_mean' and scale='whiten'"):
        preset_advantages("rloo", rewards, group_ids, weights=rewards)


# what they estimate: exact expectations over all outcomes of a policy that succeeds with probability p

N = 5
OUTCOMES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=N)), dtype=torch.float64)


def expected_gradient(advantages_of, p):
    """E[mean_i A_i d log prob(r_i) / d logit], where the derivative is r_i - p."""
    probabilities = (p**OUTCOMES * (1 - p) ** (1 - OUTCOMES)).prod(1)
    advantages = torch.stack([advantages_of(row, torch.zeros(N).long()) for row in OUTCOMES])
    return float((probabilities * (advantages * (OUTCOMES - p)).mean(1)).sum())


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_leave_one_out_climbs_the_success_rate(p):
    assert expected_gradient(lambda *row: preset_advantages("rloo", *row), p) == pytest.approx(p * (1 - p), rel=1e-9)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_max_rl_climbs_the_likelihood_of_success_to_the_order_below_the_groups_size(p):
    # sum_{k < N} pass@k / k, where log p is the sum without end: with its baseline the estimator loses the Nth term
    expected = sum((1 - p) ** (k - 1) * p * (1 - p) for k in range(1, N))
    assert expected_gradient(lambda *row: preset_advantages("max_rl", *row), p) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("k", [2, 3, N])
def test_the_best_of_k_left_one_out_climbs_pass_at_k(k, p):
    expected = (1 - p) ** (k - 1) * p * (1 - p)  # d pass@k / d logit, over k
    actual = expected_gradient(lambda rewards, ids: pass_at_k_advantages(rewards, ids, k), p)
    assert actual == pytest.approx(expected, rel=1e-9)


# several rewards


def test_gdpo_by_hand():
    # columns in units of their deviations: 1/sqrt 2 each way, and (1, -1) in the second group's first alone
    rewards = torch.tensor([[1.0, 5.0], [0.0, 9.0], [2.0, 3.0], [1.0, 3.0]]).double()
    group_ids = torch.tensor([0, 0, 1, 1])
    z = math.sqrt(0.5)
    x = torch.tensor([z - 2 * z, -z + 2 * z, z, -z], dtype=torch.float64)
    expected = x / x.std()
    actual = gdpo_advantages(rewards, group_ids, torch.tensor([1.0, 2.0]).double(), eps=0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gdpo_agrees_with_the_specification():
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        _, group_ids, valid, _ = batch(seed)
        rewards = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        rewards[::7, 1], rewards[4], rewards[group_ids == 2, 0] = torch.nan, torch.nan, 0.3
        weights = torch.tensor([1.0, 0.5, -2.0]).double()
        for w in (weights, None):
            expected = rlloss.reference.gdpo_advantages(rewards, group_ids, w, valid=valid)
            actual = gdpo_advantages(rewards, group_ids, w, valid=valid)
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
            assert not actual[~valid].any()
            assert actual[4] == 0
            single = gdpo_advantages(rewards.float(), group_ids, None if w is None else w.float(), valid=valid)
            assert single.dtype is torch.float32
            torch.testing.assert_close(single, actual.float(), rtol=1e-5, atol=1e-5)


def test_gdpo_tells_apart_what_a_sum_of_rewards_does_not():
    rewards, group_ids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]), torch.zeros(4).long()
    summed = group_advantages(rewards.sum(1), group_ids)
    assert summed[0] == summed[1]
    actual = gdpo_advantages(rewards, group_ids)
    assert actual[0] > actual[1] + 0.2  # the rarer reward is worth more


@pytest.mark.parametrize("poison", POISON)
def test_gdpo_invalid_rows_change_no_bit(poison):
    rewards = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    group_ids, valid = torch.arange(9) % 3, torch.arange(9) != 4
    dirty = torch.where(valid[:, None], rewards, poison)
    assert torch.equal(gdpo_advantages(dirty, group_ids, valid=valid), gdpo_advantages(rewards, group_ids, valid=valid))
    assert gdpo_advantages(torch.full((9, 2), 0.1), group_ids, eps=0.0).tolist() == [0.0] * 9
    assert gdpo_advantages(torch.zeros(0, 2), group_ids[:0]).tolist() == []


# the best of k


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("binary", [True, False])
def test_pass_at_k_agrees_with_all_subsets(baseline, binary):
    taught = set()
    for seed in range(4):
        rewards, group_ids, valid, _ = batch(seed, rows=30)
        group_ids = group_ids % 5
        rewards = (rewards > 0.5).double().where(~rewards.isnan(), torch.nan) if binary else rewards + group_ids
        for k in (1, 2, 3, 4, 6, None):
            if k == (1 if baseline == "leave_one_out" else None):
                continue
            expected = rlloss.reference.pass_at_k_advantages(rewards, group_ids, k, baseline=baseline, valid=valid)
            actual = pass_at_k_advantages(rewards, group_ids, k, baseline=baseline, valid=valid)
            taught |= {k} if any(expected) else set()
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert taught >= {2, 3, 4}


def test_only_the_best_of_a_group_beats_the_second():
    rewards, group_ids = torch.tensor([0.3, 1.0, 9.0, 9.0, 0.1, 7.0, 0.8]), torch.tensor([0, 0, 1, 1, 0, 1, 0])
    expected = [0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]  # two best share the first place
    assert pass_at_k_advantages(rewards, group_ids).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_first_of_k_is_grpo():
    rewards, group_ids, valid, _ = batch()
    expected = group_advantages(rewards, group_ids, std="population", valid=valid)
    actual = pass_at_k_advantages(rewards, group_ids, 1, baseline="mean", valid=valid)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_many_successes_leave_pass_at_k_nothing_to_teach():
    # four successes of six: every subset of three has one, if not always two
    rewards, group_ids = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]).double(), torch.zeros(6).long()
    for eps in (0.0, 1e-6):
        assert pass_at_k_advantages(rewards, group_ids, 3, baseline="mean", eps=eps).tolist() == [0.0] * 6
        assert pass_at_k_advantages(rewards, group_ids, 4, eps=eps).tolist() == [0.0] * 6
    alone_with_two_failures = pytest.approx([0.1 * r for r in rewards.tolist()], rel=1e-12)
    assert pass_at_k_advantages(rewards, group_ids, 3).tolist() == alone_with_two_failures


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("poison", POISON)
def test_pass_at_k_invalid_rows_change_no_bit_and_groups_stay_apart(baseline, poison):
    rewards, group_ids, valid, _ = batch()
    clean = pass_at_k_advantages(rewards, group_ids, 2, baseline=baseline, valid=valid)
    dirty = torch.where(valid, rewards, poison)
    assert torch.equal(pass_at_k_advantages(dirty, group_ids, 2, baseline=baseline, valid=valid), clean)
    assert pass_at_k_advantages(torch.full((4,), 0.1), group_ids[:4], 2, baseline=baseline).tolist() == [0.0] * 4
    assert pass_at_k_advantages(rewards[:0], group_ids[:0], 2, baseline=baseline).tolist() == []
    # another group's rewards, however large, are not in the sums of this one
    huge = torch.where(group_ids == 4, 1e18 * rewards, rewards)
    actual = pass_at_k_advantages(huge, group_ids, 2, baseline=baseline, valid=valid)
    others = group_ids != 4
    torch.testing.assert_close(actual[others], clean[others], rtol=1e-12, atol=1e-14)


def test_large_groups_have_subsets_beyond_counting():
    rewards = (torch.arange(1024) < 3).double()
    advantages = pass_at_k_advantages(rewards, torch.zeros(1024).long(), 512, baseline="mean")
    fails = math.comb(1021, 512) / math.comb(1024, 512)
    spread = math.sqrt(fails * (1 - fails))
    missed = math.comb(1020, 511) / math.comb(1023, 511)
    torch.testing.assert_close(advantages[:3], torch.full((3,), fails / (spread + 1e-6)).double(), rtol=1e-7, atol=0)
    expected = torch.full((1021,), (fails - missed) / (spread + 1e-6)).double()
    torch.testing.assert_close(advantages[3:], expected, rtol=1e-5, atol=0)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "baseline='leave_one_out' needs k of at least 2"),
        ({"k": None, "baseline": "mean"}, "baseline='mean' compares subsets of k completions and needs k, got None"),
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 2, "baseline": "median"}, "baseline must be one of ['leave_one_out', 'mean'], got 'median'"),
        ({"k": 2, "eps": -1.0}, "eps must be a number in [0, inf], got -1.0"),
    ],
)
def test_pass_at_k_teaches(options, message):
    with pytest.raises(ValueError, match=re.escape(f"pass_at_k_advantages: {message}")):
        pass_at_k_advantages(torch.zeros(2), torch.zeros(2).long(), **options)


@pytest.mark.unhooked
def test_gdpo_teaches():
    rewards, group_ids = torch.zeros(2, 3), torch.zeros(2).long()
    bad: list[tuple[tuple[Any, ...], str]] = [
        ((rewards[0], group_ids), "rewards must be [B, K], one column per reward, got [3]"),
        ((rewards[:, :0], group_ids), "rewards must be [B, K], one column per reward, got [2, 0]"),
        ((rewards, group_ids, torch.ones(2)), "weights must be one per reward [3], got [2]"),
        ((rewards, group_ids[:1]), "rewards [B] and integer group_ids [B] must match, got [2] and torch.int64 [1]"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=re.escape(f"gdpo_advantages: {message}")):
            gdpo_advantages(*arguments)


# a baseline that is carried along


def test_a_running_baseline_is_the_mean_of_its_keys_past():
    baseline = RunningBaseline(3, decay=0.9, start=0.5)
    expected = [0.5, 0.5, 0.5]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards, keys = torch.randn(3, generator=generator), torch.tensor([2, 0, 1])
        before = baseline(keys)
        assert before.tolist() == pytest.approx([expected[k] for k in keys.tolist()], rel=1e-12)
        baseline.update(rewards, keys)
        for reward, key in zip(rewards.tolist(), keys.tolist(), strict=True):
            expected[key] = 0.9 * expected[key] + 0.1 * reward
    assert baseline.baselines.dtype is torch.float64
    assert RunningBaseline(3)(torch.arange(3)).tolist() == [0.0] * 3
    again = RunningBaseline(3, decay=0.9)
    again.load_state_dict(baseline.state_dict())
    assert torch.equal(again(torch.arange(3)), baseline(torch.arange(3)))
    assert repr(again) == "RunningBaseline(keys=3, decay=0.9)"
    assert repr(RunningBaseline(3)) == "RunningBaseline(keys=3, decay=0.95)"


def test_rows_of_one_update_have_no_order_and_weigh_as_so_many_updates():
    rewards, keys = torch.tensor([1.0, 4.0, 2.0, 9.0, torch.nan, 7.0]), torch.tensor([0, 1, 0, 0, 1, 1])
    valid = torch.tensor([True] * 5 + [False])
    whole, moved, alike = RunningBaseline(2), RunningBaseline(2), RunningBaseline(2)
    whole.update(rewards, keys, valid=valid)
    order = torch.tensor([5, 3, 0, 4, 2, 1])
    moved.update(rewards[order], keys[order], valid=valid[order])
    torch.testing.assert_close(whole.baselines, moved.baselines, rtol=1e-15, atol=0)
    for _ in range(3):
        alike.update(torch.tensor([4.0]), torch.tensor([0]))
    alike.update(torch.tensor([4.0]), torch.tensor([1]))
    torch.testing.assert_close(whole.baselines, alike.baselines, rtol=1e-14, atol=0)  # key 0 has the mean 4
    before = whole.baselines.clone()
    whole.update(rewards, keys, valid=valid & False)
    assert torch.equal(whole.baselines, before)


# all of them


X, IDS = torch.linspace(0, 1, 12), torch.arange(12) % 4
CALLS = {
    "gdpo": lambda x, ids: gdpo_advantages(torch.stack([x, x.flip(0) ** 2], 1), ids, valid=x < 0.9),
    "pass_at_k": lambda x, ids: pass_at_k_advantages(x, ids),
    "pass_at_2": lambda x, ids: pass_at_k_advantages(x, ids, 2, baseline="mean", valid=x < 0.9),
    "informative": lambda x, ids: rlloss.informative_groups(x, rlloss.joint_ids(ids, ids)).to(x.dtype),
}


@pytest.mark.parametrize("name", CALLS)
def test_none_of_them_waits_for_the_device_carries_a_gradient_or_knows_an_order(name):
    assert CALLS[name](X.to("meta"), IDS.to("meta")).shape == (12,)
    assert not CALLS[name](X.clone().requires_grad_(), IDS).requires_grad
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    expected = CALLS[name](X.double(), IDS)
    assert expected.any()
    # gdpo's second column is the first one backwards: rows keep theirs
    if name != "gdpo":
        torch.testing.assert_close(CALLS[name](X.double()[order], IDS[order]), expected[order], rtol=1e-12, atol=1e-14)
    assert CALLS[name](X, IDS).dtype is torch.float32


@pytest.mark.unhooked
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_computes_them(name):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="eager")
    for rows in (12, 9):
        x, ids = X[:rows].double(), IDS[:rows]
        torch.testing.assert_close(compiled(x, ids), CALLS[name](x, ids), rtol=1e-12, atol=1e-14)
