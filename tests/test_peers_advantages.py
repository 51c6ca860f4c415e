"""Other systems' advantages, written from their equations, against ours on random batches in float64."""

# pyright: reportArgumentType=false

import math

import pytest
import torch

import rlloss
from rlloss import (
    gae,
    gdpo_advantages,
    group_advantages,
    optimal_token_baseline,
    pass_at_k_advantages,
    preset_advantages,
    returns_to_go,
    turn_advantages,
    whiten,
)

G = 4


def batch(seed):
    """Rewards of five groups of four, in order; ids; the trained tokens of ragged rows."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(5 * G, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 8, (5 * G,), generator=generator)
    return rewards, torch.arange(5).repeat_interleave(G), torch.arange(7) < lengths[:, None]


def by_group(group_ids, function, *columns):
    """What `function` gives for the rows of each group, put back into their places."""
    out = torch.zeros(len(group_ids), dtype=torch.float64)
    for group in group_ids.unique():
        own = group_ids == group
        out[own] = function(*(x[own] for x in columns)).double()
    return out


def rows(x):
    """[groups, G], as the systems that reshape have it, and back."""
    return x.view(-1, G)


def verl_grpo(r, ids, mask):
    return by_group(ids, lambda x: (x - x.mean()) / (x.std() + 1e-6), r)


def verl_rloo(r, ids, mask):
    return by_group(ids, lambda x: len(x) / (len(x) - 1) * x - x.mean() * len(x) / (len(x) - 1), r)


def verl_rloo_vectorized(r, ids, mask):
    n, total = torch.bincount(ids)[ids], torch.bincount(ids, weights=r)[ids]
    return (n * r - total) / (n - 1)


def verl_opo(r, ids, mask):
    return by_group(ids, lambda x, length: x - (length * x).sum() / length.sum(), r, mask.sum(-1).double())


def openrlhf_dr_grpo(r, ids, mask):
    return (rows(r) - rows(r).mean(-1, keepdim=True)).flatten()


def openrlhf_rloo(r, ids, mask):
    others = (rows(r).sum(-1, keepdim=True) - rows(r)) / (G - 1)
    return (rows(r) - others).flatten()


def skyrl_maxrl(r, ids, mask):
    mean = rows(r).mean(-1, keepdim=True)
    return ((rows(r) - mean) / (mean + 1e-6)).flatten()


def prime_rl_max_rl(r, ids, mask):
    mean = rows(r).mean(-1, keepdim=True)
    return torch.where(mean > 0, (rows(r) - mean) / mean, 0).flatten()


EQUAL = [
    ("grpo", verl_grpo, {}),
    ("rloo", verl_rloo, {}),
    ("rloo", verl_rloo_vectorized, {}),
    ("opo", verl_opo, {}),
    ("dr_grpo", openrlhf_dr_grpo, {}),
    ("rloo", openrlhf_rloo, {}),
    ("max_rl", skyrl_maxrl, {"eps": 1e-6}),
    ("max_rl", prime_rl_max_rl, {}),
]


@pytest.mark.parametrize(("name", "theirs", "options"), EQUAL, ids=[f.__name__ for _, f, _ in EQUAL])
def test_a_preset_is_what_others_compute_by_the_name(name, theirs, options):
    for seed in range(5):
        rewards, ids, mask = batch(seed)
        inputs = {"weights": mask.sum(-1)} if name == "opo" else {}
        actual = preset_advantages(name, rewards, ids, **inputs, **options)
        torch.testing.assert_close(actual, theirs(rewards, ids, mask), rtol=1e-9, atol=1e-9)


def nanstd(x, dim=None):
    """TRL's: of what is not NaN, with n - 1."""
    n = (~x.isnan()).sum(dim, keepdim=dim is not None)
    mean = x.nanmean(dim, keepdim=dim is not None) if dim is not None else x.nanmean()
    return ((x - mean).square().nansum(dim, keepdim=dim is not None) / (n - 1)).sqrt()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_leaves_out_rows_without_a_reward(scale):
    for seed in range(5):
        rewards, ids, _ = batch(seed)
        rewards[[2, 9, 10]] = math.nan  # every reward function said None
        centred = rows(rewards) - rows(rewards).nanmean(-1, keepdim=True)
        divisor = {"group": nanstd(rows(rewards), -1), "batch": nanstd(rewards)}.get(
            scale, torch.ones(()).double() - 1e-4
        )
        theirs = (centred / (divisor + 1e-4)).flatten().nan_to_num(0)
        torch.testing.assert_close(group_advantages(rewards, ids, scale, eps=1e-4), theirs, rtol=1e-9, atol=1e-9)


def test_trl_and_gdpos_authors_whiten_the_sum_of_decoupled_rewards():
    for seed in range(5):
        _, ids, _ = batch(seed)
        rewards = torch.rand(5 * G, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights = torch.tensor([1.0, 0.5, 2.0]).double()
        by_column = rewards.view(-1, G, 3)
        z = (by_column - by_column.mean(1, keepdim=True)) / (by_column.std(1, keepdim=True) + 1e-4)
        x = (z * weights).sum(-1).flatten()
        theirs = (x - x.mean()) / (x.std() + 1e-4)
        torch.testing.assert_close(gdpo_advantages(rewards, ids, weights, eps=1e-4), theirs, rtol=1e-9, atol=1e-9)


LEVELS = ["group", "batch", None]


@pytest.mark.parametrize(
    ("mean_level", "leave_one_out"), [*((level, False) for level in LEVELS), ("group", True)], ids=str
)
@pytest.mark.parametrize("std_level", LEVELS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_areals_norm_config_is_a_corner_of_the_operator(mean_level, std_level, unbiased, leave_one_out):
    rewards, ids, _ = batch(0)
    level = {"group": rows(rewards), "batch": rewards[None]}
    mean = torch.zeros_like(rewards)
    if mean_level:
        x = level[mean_level]
        other = (x.sum(-1, keepdim=True) - x) / (x.shape[-1] - 1)
        mean = (other if leave_one_out else x.mean(-1, keepdim=True).expand_as(x)).flatten()
    std = torch.ones_like(rewards) - 1e-5
    if std_level:
        x = level[std_level]
        std = x.std(-1, correction=int(unbiased), keepdim=True).expand_as(x).flatten()
    theirs = (rewards - mean) / (std + 1e-5)
    baseline = "leave_one_out" if leave_one_out else {"group": "mean", "batch": "batch", None: "none"}[mean_level]
    ours = group_advantages(
        rewards, ids, std_level or "none", baseline=baseline, std="sample" if unbiased else "population", eps=1e-5
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_verls_gpg_counts_rewards_that_are_not_zero_where_the_paper_counts_groups():
    rewards, ids, _ = batch(0)
    rewards = (rewards > 0.6).double()
    theirs = len(rewards) / rewards.count_nonzero() * by_group(ids, lambda x: x - x.mean(), rewards)
    informative = rlloss.informative_groups(rewards, ids).sum()
    assert 0 < informative < len(rewards)
    ours = preset_advantages("gpg", rewards, ids) * informative / rewards.count_nonzero()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_verls_remax_takes_the_greedy_reward_from_every_return():
    rewards, _, mask = batch(0)
    greedy = torch.rand(len(rewards), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    per_token = torch.where(rlloss.last_tokens(mask), rewards[:, None], 0)
    theirs = (per_token * mask).flip(-1).cumsum(-1).flip(-1) - greedy[:, None] * mask
    ours = preset_advantages("remax", rewards, torch.arange(len(rewards)), baselines=greedy)
    torch.testing.assert_close(rlloss.to_tokens(ours, mask) * mask, theirs, rtol=1e-9, atol=1e-9)


def test_openrlhf_whitens_reinforce_plus_plus_baseline_over_the_tokens():
    for seed in range(5):
        rewards, ids, mask = batch(seed)
        centred = (openrlhf_dr_grpo(rewards, ids, mask)[:, None] * mask)[mask]
        theirs = (centred - centred.mean()) / (centred.var() + 1e-8).sqrt()
        ours = preset_advantages("reinforce_pp_baseline", rewards, ids, weights=mask.sum(-1))
        torch.testing.assert_close(rlloss.to_tokens(ours, mask)[mask], theirs, rtol=1e-9, atol=1e-9)


def test_verls_reinforce_plus_plus_without_gaps():
    rewards, _, mask = batch(0)
    per_token = torch.where(rlloss.last_tokens(mask), rewards[:, None], -0.01)
    running, returns = torch.zeros(len(rewards)).double(), torch.zeros_like(per_token)
    for t in reversed(range(7)):
        running = (per_token[:, t] + 0.9 * running) * mask[:, t]
        returns[:, t] = running
    centred = returns[mask] - returns[mask].mean()
    theirs = centred * (returns[mask].var() + 1e-8).rsqrt()
    ours = whiten(returns_to_go(per_token, mask, 0.9), mask)
    torch.testing.assert_close(ours[mask], theirs, rtol=1e-9, atol=1e-9)


def test_verls_grpo_passk_pays_the_best_alone():
    for seed in range(5):
        rewards, ids, _ = batch(seed)

        def best(x):
            first, second = x.topk(2).values
            return torch.where(x == first, first - second, 0)

        theirs = by_group(ids, best, rewards)
        torch.testing.assert_close(pass_at_k_advantages(rewards, ids), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_trainings_two_numbers_per_group(k):
    for seed in range(5):
        rewards, ids, _ = batch(seed)
        rewards = (rewards > 0.6).double()

        def two(x, k=k):
            n, wrong = len(x), int((x == 0).sum())
            mean = 1 - math.comb(wrong, k) / math.comb(n, k)
            std = math.sqrt(mean * (1 - mean)) + 1e-6
            of_wrong = 1 - mean - math.comb(max(wrong - 1, 0), k - 1) / math.comb(n - 1, k - 1)
            return x * (1 - mean) / std + (1 - x) * of_wrong / std

        theirs = by_group(ids, two, rewards)
        if k == 1:  # C(0, 0) is 1: of a group without a mistake the formula for mistakes is not asked
            theirs = torch.where(rlloss.informative_groups(rewards, ids), theirs, 0)
        ours = pass_at_k_advantages(rewards, ids, k, baseline="mean")
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero_tail", [True, False])
def test_verls_optimal_token_baseline_of_single_turns(zero_tail):
    for seed in range(5):
        rewards, ids, mask = batch(seed)
        generator = torch.Generator().manual_seed(seed)
        p = torch.randn(5 * G, 7, 5, generator=generator, dtype=torch.float64).softmax(-1)
        logprobs, sum_p2 = p[..., 0].log(), p.square().sum(-1)
        returns = returns_to_go(torch.where(rlloss.last_tokens(mask), rewards[:, None], 0), mask)
        energy = ((1 - 2 * logprobs.exp() + sum_p2) * mask).cumsum(-1)
        theirs = torch.zeros_like(returns)
        for group in range(5):
            own = ids == group
            w, m = energy[own], mask[own]
            baseline = ((returns[own] * w * m).sum(0) / ((w * m).sum(0) + 1e-8)).expand(G, -1).clone()
            if zero_tail:
                baseline[:, m.sum(0) == 1] = 0
            theirs[own] = (returns[own] - baseline) * m
        singleton = "raw" if zero_tail else "zero"
        ours = optimal_token_baseline(returns, logprobs, sum_p2, mask, ids, singleton=singleton)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # their 1e-8 beside energies


def test_nemos_decoupled_lambdas():
    rewards, _, mask = batch(0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    per_token = torch.where(rlloss.last_tokens(mask), rewards[:, None], 0)
    lengths = mask.sum(-1).double()
    policy = (1 - 1 / (0.4 * lengths)).clamp(min=0)

    def loop(lambdas):
        advantage, after = torch.zeros(len(rewards)).double(), torch.zeros(len(rewards)).double()
        out = torch.zeros_like(values)
        for t in reversed(range(7)):
            delta = per_token[:, t] + 0.99 * after - values[:, t]
            advantage = torch.where(mask[:, t], delta + 0.99 * lambdas * advantage, advantage)
            after = torch.where(mask[:, t], values[:, t], after)
            out[:, t] = advantage * mask[:, t]
        return out

    theirs = loop(policy), (loop(torch.ones_like(policy)) + values) * mask
    ours = gae(per_token, values, mask, 0.99, rlloss.length_adaptive_lambda(mask, 0.4), value_lambda=1.0)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_prime_rls_hierarchical_grpo_and_role_baseline():
    rewards, episode, _ = batch(0)
    is_solver = torch.arange(len(rewards)) % G > 0
    theirs = torch.zeros_like(rewards)
    theirs[is_solver] = by_group(episode[is_solver], lambda x: x - x.mean(), rewards[is_solver])
    theirs[~is_solver] = rewards[~is_solver] - rewards[~is_solver].mean()
    ids = rlloss.joint_ids(is_solver.long(), torch.where(is_solver, episode, 0))
    torch.testing.assert_close(preset_advantages("dr_grpo", rewards, ids), theirs, rtol=1e-9, atol=1e-9)

    running, baseline = [0.0, 0.0], rlloss.RunningBaseline(2, decay=0.95)
    for reward, role in zip(rewards, is_solver.long(), strict=True):
        own, key = reward[None], role[None]
        ours = group_advantages(own, key, "none", baseline="given", baselines=baseline(key))
        baseline.update(own, key)
        assert float(ours) == pytest.approx(float(reward) - running[int(role)], rel=1e-12)
        running[int(role)] = 0.95 * running[int(role)] + 0.05 * float(reward)


def test_roll_gives_a_turn_what_it_and_the_discounted_turns_behind_it_earned():
    # agentic_reinforce: a reward at the last token of each run of trained tokens
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 20, generator=generator) > 0.4
    begins = mask & ~torch.cat([torch.zeros(6, 1).bool(), mask[:, :-1]], 1)
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros(6, 1).bool()], 1)
    rewards = torch.where(ends, torch.randn(6, 20, generator=generator, dtype=torch.float64), 0)
    theirs = torch.zeros_like(rewards)
    for i in range(6):
        earned = 0.0
        runs = zip(begins[i].nonzero().flatten().tolist(), ends[i].nonzero().flatten().tolist(), strict=True)
        for first, last in reversed(list(runs)):
            earned = float(rewards[i, last]) + 0.9 * earned
            theirs[i, first : last + 1] = earned
    ours = turn_advantages(rewards, begins.cumsum(1), mask, torch.arange(6), 0.9, scale="none", baseline="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gigpo_compares_steps_of_one_state_beside_whole_episodes():
    # one token per step: 12 episodes of 5 steps, in groups of four, five states
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    states, group = torch.randint(5, (12, 5), generator=generator), torch.arange(12) // 4
    mask, steps = torch.ones(12, 5).bool(), torch.arange(5).expand(12, 5)
    discounted = sum(0.95**k * torch.nn.functional.pad(rewards[:, k:], (0, k)) for k in range(5))
    assert isinstance(discounted, torch.Tensor)
    of_episode = by_group(group, lambda x: (x - x.mean()) / (x.std() + 1e-6), rewards.sum(1))
    anchors = (10 * group[:, None] + states).flatten()
    of_step = by_group(
        anchors, lambda x: (x - x.mean()) / (x.std() + 1e-6) if len(x) > 1 else 0 * x, discounted.flatten()
    )
    theirs = of_episode[:, None] + 0.7 * of_step.view(12, 5)
    ours = group_advantages(rewards.sum(1), group)[:, None] + 0.7 * turn_advantages(
        rewards, steps, mask, group, 0.95, state_ids=states
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
