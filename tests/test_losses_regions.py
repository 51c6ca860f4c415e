"""Losses around a region of trust, and those that choose among a step's tokens, against arithmetic done by hand."""

import itertools
import math
from typing import Any

import pytest
import torch

import rlloss
from rlloss import (
    AStarPOLoss,
    ClipCovLoss,
    CPGDLoss,
    DecoupledPPOLoss,
    DPPOLoss,
    DROLoss,
    GRPOLoss,
    KimiLoss,
    KLCovLoss,
    M2POLoss,
    OPSMLoss,
    PPOLoss,
    REINFORCELoss,
    count,
    get_loss,
    importance_correction,
    optimal_value,
    prompt_mean_weights,
    scalars,
)

RAGGED = torch.tensor([[True, True], [True, False]])


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def loss_and_slope(loss_fn, logprobs, *inputs, **extra):
    leaf = logprobs.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(rows=4, columns=6, seed=0):
    """log-probs, old ones, advantages of both signs, and a mask with a hole in every row."""
    logprobs = -drawn(rows, columns, seed=seed).abs() - 0.05
    old = (logprobs + 0.5 * drawn(rows, columns, seed=seed + 1)).clamp(max=-0.01)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[:, 2] = False
    return logprobs, old, drawn(rows, columns, seed=seed + 2), mask


# squares: two answers, the first 1 and 2 nats above its anchor, the second 0.5 below
LOGPROBS = tensor([-1.0, -2.0], [-3.0, -9.0])
ANCHOR = LOGPROBS - tensor([1.0, 2.0], [-0.5, 1.0])
ADVANTAGES = tensor(2.0, -1.0)


def test_kimi_by_hand():
    # (2 * (1 + 2) + 0.2 * 3^2 - 1 * 3 + 0.2 * 0.5^2) / 2, and slopes -A + 0.4 D
    loss, slope = loss_and_slope(KimiLoss(tau=0.4), LOGPROBS, ANCHOR, ADVANTAGES, RAGGED)
    assert loss == close((6 + 1.8 - 3 + 0.05) / 2)
    assert_close(slope, tensor([-2 + 1.2, -2 + 1.2], [1 - 0.2, 0.0]) / 2)
    assert scalars(KimiLoss()(LOGPROBS, ANCHOR, ADVANTAGES, RAGGED).metrics)["drift"] == close((3 + 3 - 0.5) / 3)
    # every token its own square: 1, 4 and 0.25
    loss, slope = loss_and_slope(KimiLoss(tau=0.4, ratio_level="token"), LOGPROBS, ANCHOR, ADVANTAGES, RAGGED)
    assert loss == close((6 + 0.2 * (1 + 4) - 3 + 0.05) / 2)
    assert_close(slope, tensor([-2 + 0.4, -2 + 0.8], [1 - 0.2, 0.0]) / 2)


def test_a_rejected_token_is_still_part_of_the_square_of_its_answer():
    weights = tensor([1.0, 0.0], [1.0, 1.0])
    loss, slope = loss_and_slope(KimiLoss(tau=0.4), LOGPROBS, ANCHOR, ADVANTAGES * 0, RAGGED, token_weights=weights)
    # of D d_t = 3 * 1 + 3 * 2 the second is gone, but D is that of both tokens
    assert loss == close((0.2 * 3 * 1 + 0.05) / 2)
    assert_close(slope, tensor([0.2 * (1 + 3), 0.2 * 1], [-0.2, 0.0]) / 2)


def test_the_square_pulls_however_far_the_policy_is():
    now, mask = tensor([-1.0]), torch.ones(1, 1, dtype=torch.bool)
    for nats in (5.0, 50.0, 500.0):
        for loss_fn, anchor in ((KimiLoss(tau=0.5), {}), (DROLoss(tau=0.5), {"ref_logprobs": now - nats})):
            _, slope = loss_and_slope(loss_fn, now, now - nats, tensor(0.0), mask, **anchor)
            assert slope.item() == close(0.5 * nats)


def test_dro_is_the_papers_square_divided_by_tau():
    tau, (logprobs, old, _, mask) = 0.7, batch()
    ref, advantages = old - 0.3, drawn(4, seed=9)

    def paper(now):
        drift = ((now - ref) * mask).sum(-1)
        return (0.5 * (advantages - tau * drift).square()).mean() / tau

    leaf = logprobs.clone().requires_grad_()
    expected = torch.autograd.grad(paper(leaf), leaf)[0]
    loss, slope = loss_and_slope(DROLoss(tau=tau), logprobs, old, advantages, mask, ref_logprobs=ref)
    assert_close(slope, expected)
    # what the loss leaves out does not change with the policy
    moved = logprobs - 0.2
    other, _ = loss_and_slope(DROLoss(tau=tau), moved, old, advantages, mask, ref_logprobs=ref)
    assert other - loss == close(float(paper(moved) - paper(logprobs)))


def test_dro_reads_the_old_policy_only_as_its_anchor():
    logprobs, old, advantages, mask = batch()
    far = DROLoss()(logprobs, old - 3, advantages, mask, ref_logprobs=old).loss
    assert far == DROLoss()(logprobs, None, advantages, mask, ref_logprobs=old).loss
    assert far != DROLoss(anchor="old")(logprobs, old - 3, advantages, mask).loss
    for level in ("sequence", "token"):
        mine = loss_and_slope(DROLoss(tau=0.3, ratio_level=level, anchor="old"), logprobs, old, advantages, mask)
        kimis = loss_and_slope(KimiLoss(tau=0.3, ratio_level=level), logprobs, old, advantages, mask)
        assert mine[0] == kimis[0]
        assert torch.equal(mine[1], kimis[1])


def test_who_needs_a_reference():
    assert DROLoss().needs_reference
    assert AStarPOLoss().needs_reference
    assert not DROLoss(anchor="old").needs_reference
    assert not KimiLoss().needs_reference
    assert KimiLoss(kl_coef=0.1).needs_reference


@pytest.mark.unhooked
@pytest.mark.parametrize("loss_fn", [DROLoss(), AStarPOLoss()], ids=["dro", "a_star_po"])
def test_an_anchor_that_is_missing_is_named(loss_fn):
    with pytest.raises(ValueError, match=r"needs ref_logprobs, got None; its square is of the log-ratio to them"):
        loss_fn(LOGPROBS, None, ADVANTAGES, RAGGED)


def test_a_star_po_by_hand():
    # (0.5 * 3 - 2)^2 and (0.5 * -0.5 + 1)^2; slopes 2 * 0.5 times what is squared
    loss, slope = loss_and_slope(AStarPOLoss(beta=0.5), LOGPROBS, None, ADVANTAGES, RAGGED, ref_logprobs=ANCHOR)
    assert loss == close((0.25 + 0.5625) / 2)
    assert_close(slope, tensor([-0.5, -0.5], [0.75, 0.0]) / 2)
    # a target per token: the mean of (1.5 - 2)^2 and (1.5 - 4)^2
    loss, slope = loss_and_slope(
        AStarPOLoss(beta=0.5), LOGPROBS, None, tensor([2.0, 4.0], [-1.0, 7.0]), RAGGED, ref_logprobs=ANCHOR
    )
    assert loss == close((3.25 + 0.5625) / 2)
    assert_close(slope, tensor([-1.5, -1.5], [0.75, 0.0]) / 2)


def optimal_policy(tau):
    """All 9 answers of two of three tokens under a uniform reference: their rewards, and the best policy's log-probs.

    The best policy for E r - tau KL(pi||ref) is ref exp(r / tau) / Z.
    """
    first, second = torch.tensor(list(itertools.product(range(3), range(3)))).unbind(-1)
    rewards = drawn(9, seed=4)
    table = (rewards / tau).log_softmax(0).view(3, 3)
    starts = table.logsumexp(-1)
    logprobs = torch.stack([starts[first], table[first, second] - starts[first]], -1)
    return rewards, logprobs, torch.full_like(logprobs, -math.log(3))


@pytest.mark.parametrize("name", ["dro", "a_star_po"])
def test_squares_are_least_at_the_optimal_policy_for_each_answer(name):
    tau = 0.8
    rewards, logprobs, ref = optimal_policy(tau)
    loss_fn = DROLoss(tau=tau) if name == "dro" else AStarPOLoss(beta=tau)
    mask = torch.ones(9, 2, dtype=torch.bool)
    advantages = rewards - optimal_value(rewards, torch.zeros(9, dtype=torch.long), beta=tau)
    loss, slope = loss_and_slope(loss_fn, logprobs, None, advantages, mask, ref_logprobs=ref)
    assert slope.abs().max() < 1e-14
    if name == "a_star_po":
        assert loss < 1e-28
    # a baseline is no V*: with another one the best policy is not where the square is least
    _, slope = loss_and_slope(loss_fn, logprobs, None, rewards - rewards.mean(), mask, ref_logprobs=ref)
    assert slope.abs().min() > 1e-3


# what a prompt is worth


def test_optimal_value_by_hand():
    rewards, group_ids = tensor(1.0, 0.0, 5.0, 0.0), torch.tensor([7, 3, 3, 7])
    expected = [0.5 * math.log((1 + math.e**2) / 2), 0.5 * math.log((1 + math.e**10) / 2)]
    assert_close(optimal_value(rewards, group_ids, 0.5), tensor(*[expected[i] for i in (0, 1, 1, 0)]))
    assert not optimal_value(rewards.requires_grad_(), group_ids, 0.5).requires_grad


def test_optimal_value_lies_between_the_mean_and_the_largest_reward():
    rewards, group_ids = drawn(8, seed=3), torch.zeros(8, dtype=torch.long)
    values = [float(optimal_value(rewards, group_ids, beta)[0]) for beta in (1e9, 10.0, 1.0, 0.1, 1e-9)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(float(rewards.mean()), abs=1e-8)
    assert values[-1] == pytest.approx(float(rewards.max()), abs=1e-7)


def test_optimal_value_does_not_overflow():
    rewards, group_ids = torch.tensor([1e4, -1e4, 0.1, 0.1]), torch.tensor([0, 0, 1, 1])
    values = optimal_value(rewards, group_ids, 1e-3)
    assert values.isfinite().all()
    assert values[0] == pytest.approx(1e4 - 1e-3 * math.log(2))
    assert (values[2:] == rewards[2:]).all()  # identical rewards are worth exactly themselves
    assert (optimal_value(rewards, group_ids, 1e30)[2:] == rewards[2:]).all()


def test_rows_without_a_reward_have_no_say_and_a_prompt_without_rows_no_value():
    rewards, group_ids = tensor(1.0, math.nan, 0.0, 9.0, math.nan), torch.tensor([0, 0, 0, 0, 1])
    valid = torch.tensor([True, True, True, False, True])
    values = optimal_value(rewards, group_ids, 0.5, valid=valid)
    assert_close(values[:4], values[:1].expand(4))
    assert values[0] == close(0.5 * math.log((1 + math.e**2) / 2))
    assert values[4].isnan()
    specified = rlloss.reference.optimal_value(rewards.numpy(), group_ids.numpy(), 0.5, valid.numpy())
    assert_close(values[:4], tensor(*specified[:4]))


@pytest.mark.parametrize("beta", [0.01, 0.5, 30.0])
def test_optimal_value_is_the_specification(beta):
    rewards, group_ids = drawn(20, seed=5), torch.arange(20) % 6
    specified = rlloss.reference.optimal_value(rewards.numpy(), group_ids.numpy(), beta)
    torch.testing.assert_close(optimal_value(rewards, group_ids, beta), tensor(*specified), rtol=1e-12, atol=1e-12)


@pytest.mark.unhooked
def test_optimal_value_teaches():
    rewards, group_ids = tensor(1.0, 0.0), torch.tensor([0, 0])
    for beta in (0.0, -1.0, math.nan, True):
        with pytest.raises(ValueError, match=r"optimal_value: beta must be a number in \(0, inf\]"):
            optimal_value(rewards, group_ids, beta)
    with pytest.raises(ValueError, match=r"beta must be finite, got inf; without bound V. is the mean reward"):
        optimal_value(rewards, group_ids, math.inf)
    with pytest.raises(ValueError, match=r"optimal_value: rewards .* must match"):
        optimal_value(rewards, torch.tensor([0, 0, 1]), 1.0)


# CPGD


def at(ratio, advantage, loss_fn, **extra):
    """Loss and slope of one token with this ratio."""
    now = tensor([-1.0])
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, slope = loss_and_slope(loss_fn, now, now - math.log(ratio), tensor(advantage), mask, **extra)
    return loss, slope.item()


CPGD = [
    # ratio, advantage, log-ratio that counts, slope of the policy term
    (1.1, 2.0, math.log(1.1), -2.0),
    (1.5, 2.0, math.log(1.25), 0.0),  # pushed up enough
    (0.5, 2.0, math.log(0.5), -2.0),
    (0.9, -2.0, math.log(0.9), 2.0),
    (0.5, -2.0, math.log(0.8), 0.0),  # pushed down enough
    (1.5, -2.0, math.log(1.5), 2.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "log_ratio", "slope"), CPGD)
def test_cpgd_clips_the_log_ratio_on_the_side_that_the_advantage_drives_it_to(ratio, advantage, log_ratio, slope):
    loss_fn = CPGDLoss(clip_eps_low=0.2, clip_eps_high=0.25, drift_coef=0.0)
    assert at(ratio, advantage, loss_fn) == (close(-log_ratio * advantage), close(slope))
    now, mask = tensor([-1.0]), torch.ones(1, 1, dtype=torch.bool)
    metrics = scalars(loss_fn(now, now - math.log(ratio), tensor(advantage), mask).metrics)
    assert metrics["clip_frac"] == (slope == 0)


@pytest.mark.parametrize(("ratio", "price"), [(0.25, -0.75), (1.0, 0.0), (1.3, 0.3), (1.6, 0.5), (40.0, 0.5)])
def test_the_drift_pulls_back_from_both_sides_and_its_cut_never_lets_go(ratio, price):
    loss, slope = at(ratio, 0.0, CPGDLoss(drift_coef=2.0, drift_clip=0.5))
    assert (loss, slope) == (close(2 * price * -1.0), close(2 * price))
    if price < 0.5:  # below the cut it has the gradient of k3 of KL(old||pi)
        new = tensor([-1.0]).requires_grad_()
        k3 = rlloss.kl_k3(tensor([-1.0 - math.log(ratio)]), new).sum()
        assert torch.autograd.grad(k3, new)[0].item() == close(price)


def test_cpgd_on_policy_is_the_policy_gradient_at_loss_0():
    logprobs, _, advantages, mask = batch()
    loss, slope = loss_and_slope(CPGDLoss(drift_coef=0.0), logprobs, None, advantages, mask)
    assert loss == 0
    assert_close(slope, torch.where(mask, -advantages / mask.sum(), 0))


def test_the_papers_mean_over_prompts_is_a_token_weight():
    logprobs, old, advantages, mask = batch()
    mask[3, 1:] = False  # prompts of different lengths
    group_ids, loss_fn = torch.tensor([0, 0, 1, 1]), CPGDLoss()
    weights = mask.sum() * prompt_mean_weights(mask, group_ids).double()
    mine = loss_fn(logprobs, old, advantages, mask, token_weights=weights).loss
    of_prompts = [loss_fn(*(x[rows] for x in (logprobs, old, advantages, mask))).loss for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(mine, sum(of_prompts) / 2, rtol=1e-6, atol=0)  # the weights are float32


# DPPO


def move(loss_fn, before, after, advantage):
    """The slope at a token whose probability went from one to the other, and the metrics."""
    new, old, mask = tensor([math.log(after)]), tensor([math.log(before)]), torch.ones(1, 1, dtype=torch.bool)
    _, slope = loss_and_slope(loss_fn, new, old, tensor(advantage), mask)
    return slope.item(), scalars(loss_fn(new, old, tensor(advantage), mask).metrics)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_cuts_what_is_beyond_and_moves_further_away(divergence):
    loss_fn = DPPOLoss(divergence=divergence, threshold_low=0.1, threshold_high=0.1)
    far, near = 0.9, 0.52
    for before, after, advantage, is_cut in [
        (0.5, far, 1.0, True),
        (0.5, far, -1.0, False),  # comes back
        (far, 0.5, -1.0, True),
        (far, 0.5, 1.0, False),
        (0.5, near, 1.0, False),
        (near, 0.5, -1.0, False),
        (0.5, far, 0.0, False),
    ]:
        slope, metrics = move(loss_fn, before, after, advantage)
        assert slope == close(0 if is_cut else -after / before * advantage)
        assert metrics["clip_frac"] == is_cut


def test_dppo_divergences_by_hand():
    tv = move(DPPOLoss(), 0.5, 0.75, 0.0)[1]["divergence"]
    kl = move(DPPOLoss(divergence="kl"), 0.5, 0.75, 0.0)[1]["divergence"]
    assert tv == close(0.25)
    assert kl == close(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_dppo_thresholds_are_the_papers_and_each_for_its_sign():
    for loss_fn, threshold in ((DPPOLoss(), 0.15), (DPPOLoss(divergence="kl"), 0.05)):
        assert (loss_fn.threshold_low, loss_fn.threshold_high) == (threshold, threshold)
    loss_fn = DPPOLoss(threshold_low=0.3, threshold_high=0.2)
    assert move(loss_fn, 0.5, 0.75, 1.0)[0] == 0
    assert move(loss_fn, 0.75, 0.5, -1.0)[0] != 0
    # at the threshold itself a token is not beyond it
    assert move(DPPOLoss(threshold_high=0.25), 0.5, 0.75, 1.0)[0] != 0


def test_dppo_judges_the_mass_that_moves_where_ppo_judges_the_ratio():
    # section 4.2 of the paper: 1e-4 to 1e-2 is a ratio of 100 and little mass; 0.99 to 0.8 is a ratio within PPO's clip
    for divergence in ("tv", "kl"):
        assert move(DPPOLoss(divergence=divergence), 1e-4, 1e-2, 1.0)[0] == close(-100)
        assert move(DPPOLoss(divergence=divergence), 0.99, 0.80, -1.0)[0] == 0
    assert move(PPOLoss(), 1e-4, 1e-2, 1.0)[0] == 0
    assert move(PPOLoss(), 0.99, 0.80, -1.0)[0] > 0.8


def test_a_capped_ratio_still_teaches():
    slope, _ = move(DPPOLoss(ratio_max=5.0), 1e-4, 1e-2, 1.0)
    assert slope == close(-5)
    assert move(DPPOLoss(ratio_max=5.0), 0.5, 0.6, 1.0)[0] == close(-1.2)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_stays_finite_where_a_probability_is_0_or_1(divergence):
    mask = torch.ones(1, 1, dtype=torch.bool)
    for new, old in itertools.product((0.0, 1e-7, -1e-7, -100.0, -1e4), repeat=2):
        for advantage in (1.0, -1.0):
            out = DPPOLoss(divergence=divergence)(
                torch.tensor([[new]]), torch.tensor([[old]]), torch.tensor([advantage]), mask
            )
            assert out.loss.isfinite()
            assert all(math.isfinite(x) for x in scalars(out.metrics).values()), (new, old)


# OPSM


def test_opsm_by_hand():
    # the first answer fell by 0.3 per token, the second by 0.1, the third rose
    logprobs = tensor([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0])
    old = logprobs + tensor([0.0, 0.6], [0.2, 0.0], [-0.4, -0.4])
    mask = torch.ones(3, 2, dtype=torch.bool)
    bad = tensor(-1.0, -1.0, -1.0)
    loss_fn = OPSMLoss(threshold=0.2, clip_eps_low=0.9, clip_eps_high=9.0)
    _, slope = loss_and_slope(loss_fn, logprobs, old, bad, mask)
    ratio = (logprobs - old).exp()
    assert_close(slope, tensor([0.0], [1.0], [1.0]) * ratio / 6)  # a whole answer, also where it did not fall
    assert scalars(loss_fn(logprobs, old, bad, mask).metrics)["masked_frac"] == close(1 / 3)
    _, slope = loss_and_slope(loss_fn, logprobs, old, -bad, mask)
    assert_close(slope, -ratio / 6)  # good answers are never masked
    # the sign is that of the token's own advantage
    _, slope = loss_and_slope(loss_fn, logprobs, old, tensor([-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]), mask)
    assert_close(slope, tensor([0.0, -ratio[0, 1]], [0.0, 0.0], [0.0, 0.0]) / 6)


def test_opsm_at_its_threshold_keeps_and_without_one_is_grpo():
    now, mask = tensor([-1.0, -1.0]), torch.ones(1, 2, dtype=torch.bool)
    old = now + 0.25
    assert loss_and_slope(OPSMLoss(threshold=0.25), now, old, tensor(-1.0), mask)[0] != 0
    assert loss_and_slope(OPSMLoss(threshold=0.249), now, old, tensor(-1.0), mask)[0] == 0
    logprobs, old, advantages, mask = batch()
    terms: dict[str, Any] = {"kl_coef": 0.2, "dual_clip": 1.5}
    mine = loss_and_slope(
        OPSMLoss(threshold=math.inf, **terms), logprobs, old, advantages, mask, ref_logprobs=old - 0.1
    )
    grpos = loss_and_slope(GRPOLoss(**terms), logprobs, old, advantages, mask, ref_logprobs=old - 0.1)
    assert mine[0] == grpos[0]
    assert torch.equal(mine[1], grpos[1])


def test_the_kl_of_a_masked_answer_stays():
    logprobs, _, _, mask = batch()
    old, ref = logprobs + 1, logprobs - 0.4
    terms = {"ref_logprobs": ref}
    mine = loss_and_slope(OPSMLoss(threshold=0.5, kl_coef=0.3), logprobs, old, -torch.ones_like(old), mask, **terms)
    grpos = loss_and_slope(GRPOLoss(kl_coef=0.3), logprobs, old, torch.zeros_like(old), mask, **terms)
    assert mine[0] == close(grpos[0])
    assert_close(mine[1], grpos[1])


# decoupled PPO


@pytest.mark.parametrize("ratio_max", [1.2, math.inf])
@pytest.mark.parametrize("terms", [{}, {"kl_coef": 0.3}, {"kl_coef": 0.3, "kl_grad": "literal"}], ids=str)
def test_decoupled_ppo_is_ppo_under_the_ratio_to_the_sampler(ratio_max, terms):
    logprobs, old, advantages, mask = batch()
    rollout, user = old + 0.6 * drawn(4, 6, seed=7), drawn(4, 6, seed=8).clamp(min=0)
    ref = {"ref_logprobs": old - 0.2}
    weights = (old - rollout).exp().clamp(max=ratio_max)
    mine = loss_and_slope(
        DecoupledPPOLoss(ratio_max=ratio_max, dual_clip=1.5, **terms),
        *(logprobs, old, advantages, mask),
        rollout_logprobs=rollout,
        token_weights=user,
        **ref,
    )
    ppo = PPOLoss(dual_clip=1.5, **terms)
    ppos = loss_and_slope(ppo, logprobs, old, advantages, mask, token_weights=weights * user, **ref)
    assert mine[0] == close(ppos[0])
    assert_close(mine[1], ppos[1])
    if ratio_max == 1.2:
        correction = importance_correction(old, rollout, mask, "tis", ratio_max=1.2)
        corrected = ppo(logprobs, old, advantages, mask, token_weights=correction.weights, **ref).loss
        loss_fn = DecoupledPPOLoss(ratio_max=1.2, dual_clip=1.5, **terms)
        out = loss_fn(logprobs, old, advantages, mask, rollout_logprobs=rollout, **ref)
        assert out.loss.item() == close(corrected.item())
        assert scalars(out.metrics)["rollout_clip_frac"] == close(scalars(correction.metrics)["rollout_clip_frac"])
        assert scalars(out.metrics)["rollout_ratio"] == close(scalars(correction.metrics)["rollout_ratio"])


def test_where_the_sampler_is_the_proximal_policy_nothing_is_decoupled():
    logprobs, old, advantages, mask = batch()
    mine = loss_and_slope(DecoupledPPOLoss(), logprobs, old, advantages, mask, rollout_logprobs=old)
    ppos = loss_and_slope(PPOLoss(), logprobs, old, advantages, mask)
    assert mine[0] == ppos[0]
    assert torch.equal(mine[1], ppos[1])


def test_the_kl_of_decoupled_ppo_is_weighed_by_the_ratio_to_the_sampler():
    # under the sampler's answers r k3 descends KL(pi||ref) if r is the ratio to the sampler
    logprobs, old, _, mask = batch()
    rollout, ref, none = old + 0.6 * drawn(4, 6, seed=7), old - 0.2, torch.zeros_like(old)
    mine = DecoupledPPOLoss(kl_coef=1.0)(logprobs, old, none, mask, rollout_logprobs=rollout, ref_logprobs=ref).loss
    sampled = PPOLoss(kl_coef=1.0)(logprobs, rollout, none, mask, ref_logprobs=ref).loss
    assert mine.item() == close(sampled.item())


@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4, -1e4])
def test_decoupled_ppo_stays_finite_however_stale_an_answer_is(nats):
    logprobs, old, advantages, mask = (x if x.dtype is torch.bool else x.float() for x in batch())
    out = DecoupledPPOLoss()(logprobs.requires_grad_(), old, advantages, mask, rollout_logprobs=old + nats)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, logprobs)[0].isfinite().all()
    assert all(math.isfinite(x) for x in scalars(out.metrics).values())


@pytest.mark.unhooked
def test_who_takes_the_samplers_log_probs():
    with pytest.raises(ValueError, match="DecoupledPPOLoss: needs rollout_logprobs, the sampler's, got None"):
        DecoupledPPOLoss()(LOGPROBS, ANCHOR, ADVANTAGES, RAGGED)
    with pytest.raises(ValueError, match="DPPOLoss: takes no rollout_logprobs"):
        DPPOLoss()(LOGPROBS, ANCHOR, ADVANTAGES, RAGGED, rollout_logprobs=ANCHOR)


# Clip-Cov and KL-Cov


def chosen(loss_fn, *inputs, **extra):
    return loss_fn.statistics(*inputs, **extra)["selected"]


def covariances(logprobs, advantages, mask):
    new, a = logprobs[mask], advantages[mask]
    cov = torch.zeros_like(logprobs)
    cov[mask] = (new - new.mean()) * (a - a.mean())
    return cov


def test_clip_cov_draws_so_many_of_those_within_the_bounds():
    logprobs, old, advantages, mask = batch(8, 12)
    cov = covariances(logprobs, advantages, mask)
    candidates = mask & (cov >= 0.1) & (cov <= 1.0)
    assert 5 < candidates.sum() < 40
    for fraction, number in ((0.05, 4), (0.0113, 0), (0.012, 1), (0.9, int(candidates.sum()))):
        assert int(mask.sum() * fraction) == number or fraction == 0.9
        selected = chosen(ClipCovLoss(fraction=fraction, cov_min=0.1, cov_max=1.0), logprobs, old, advantages, mask)
        assert selected.sum() == number
        assert not (selected & ~candidates).any()


def test_what_clip_cov_draws_teaches_nothing_and_still_counts():
    logprobs, old, advantages, mask = batch(8, 12)
    loss_fn = ClipCovLoss(fraction=0.1, cov_min=0.1, cov_max=1.0)
    selected = chosen(loss_fn, logprobs, old, advantages, mask)
    assert selected.sum() == 8
    _, slope = loss_and_slope(loss_fn, logprobs, old, advantages, mask)
    ppo = PPOLoss(clip_eps_low=1.0, clip_eps_high=1.0)
    _, whole = loss_and_slope(ppo, logprobs, old, advantages, mask)
    assert whole[selected].abs().min() > 0
    assert_close(slope, torch.where(selected, 0, whole))
    metrics = scalars(loss_fn(logprobs, old, advantages, mask).metrics)
    assert metrics["selected_frac"] == close(8 / 88)


def test_the_draw_is_that_of_its_seed_for_any_layout():
    logprobs, old, advantages, mask = batch(8, 12)

    def draw(seed, *inputs, **extra):
        return chosen(ClipCovLoss(fraction=0.1, cov_min=0.1, cov_max=1.0, seed=seed), *inputs, **extra)

    first = draw(5, logprobs, old, advantages, mask)
    assert torch.equal(first, draw(5, logprobs, old, advantages, mask))
    assert not torch.equal(first, draw(6, logprobs, old, advantages, mask))
    padded = [torch.nn.functional.pad(x, (2, 3)) for x in (logprobs, old, advantages, mask)]
    assert torch.equal(draw(5, *padded), torch.nn.functional.pad(first, (2, 3)))
    cu_seqlens = torch.arange(0, 97, 12)
    packed = [x.flatten() for x in (logprobs, old, advantages, mask)]
    assert torch.equal(draw(5, *packed, cu_seqlens=cu_seqlens), first.flatten())


def test_every_candidate_is_as_likely_to_be_drawn():
    logprobs, old, advantages, mask = batch(8, 12)
    cov = covariances(logprobs, advantages, mask)
    candidates = mask & (cov >= 0.1) & (cov <= 1.0)
    seeds, number = 600, 4
    draws = [
        chosen(ClipCovLoss(fraction=0.05, cov_min=0.1, cov_max=1.0, seed=seed), logprobs, old, advantages, mask)
        for seed in range(seeds)
    ]
    times = torch.stack(draws).sum(0)
    share = number / candidates.sum()
    spread = (seeds * share * (1 - share)).sqrt()
    assert times.sum() == seeds * number
    assert (times[candidates] - seeds * share).abs().max() < 4 * spread


def test_the_hash_is_the_specified_one():
    counted = drawn(5, 9) > -0.5
    for seed in (0, 1, 12345, 2**32 - 1):
        mine = rlloss.selection.token_hash(counted, seed)[counted].tolist()
        assert mine == [rlloss.reference.selective.hashed(n, seed) for n in range(int(counted.sum()))]
        assert len(set(mine)) == len(mine)


def test_tokens_of_weight_0_are_not_chosen_and_have_no_say():
    logprobs, old, advantages, mask = batch(8, 12)
    weights = torch.ones_like(logprobs)
    weights[0] = 0
    strange = advantages.clone()
    strange[0] = 1e3
    for loss_fn in (
        ClipCovLoss(fraction=0.2, cov_min=0.1, cov_max=1.0),
        *(ClipCovLoss(fraction=1.0, cov_min=-99.0, cov_max=99.0, seed=seed) for seed in range(4)),
        KLCovLoss(fraction=0.2),
        M2POLoss(threshold=0.01),
    ):
        selected = chosen(loss_fn, logprobs, old, strange, mask, token_weights=weights)
        assert selected.any()
        assert not selected[0].any()
        others = [x[1:] for x in (logprobs, old, advantages, mask)]
        assert torch.equal(selected[1:], chosen(loss_fn, *others))


def test_kl_cov_by_hand():
    logprobs, a = tensor([-1.0, -2.0, -3.0, -6.0]), tensor([3.0, 1.0, 0.0, -4.0])
    old, mask = logprobs - tensor([0.5, -0.5, 0.2, -0.3]), torch.ones(1, 4, dtype=torch.bool)
    # means -3 and 0: covariances 6, 1, 0 and 12
    assert chosen(KLCovLoss(fraction=0.5), logprobs, old, a, mask).tolist() == [[True, False, False, True]]
    ratio = (logprobs - old).exp()
    loss, slope = loss_and_slope(KLCovLoss(fraction=0.5, penalty_coef=0.4), logprobs, old, a, mask)
    assert loss == close((float((-ratio * a).sum()) + 0.4 * (0.5 + 0.3)) / 4)
    assert_close(slope, (-ratio * a + 0.4 * tensor([1.0, 0.0, 0.0, -1.0])) / 4)
    # k3 of KL(old||pi): r - 1 - log r, with the slope r - 1
    loss, slope = loss_and_slope(KLCovLoss(fraction=0.5, penalty="k3"), logprobs, old, a, mask)
    k3 = ratio - 1 - ratio.log()
    assert loss == close((float((-ratio * a).sum()) + float(k3[0, 0] + k3[0, 3])) / 4)
    assert_close(slope, (-ratio * a + (ratio - 1) * tensor([1.0, 0.0, 0.0, 1.0])) / 4)


def test_equal_covariances_do_not_add_up_to_more_than_the_fraction():
    logprobs, old, _, mask = batch(8, 12)
    same = torch.ones_like(logprobs)  # nothing varies with the advantage
    for fraction, number in ((0.1, 8), (0.005, 0), (1.0, 88)):
        assert chosen(KLCovLoss(fraction=fraction), logprobs, old, same, mask).sum() == number


def test_on_policy_neither_has_a_gradient_of_its_own_but_for_what_it_leaves_out():
    logprobs, _, advantages, mask = batch(8, 12)
    _, plain = loss_and_slope(PPOLoss(), logprobs, None, advantages, mask)
    for loss_fn in (KLCovLoss(fraction=0.3), KLCovLoss(fraction=0.3, penalty="k3"), M2POLoss()):
        _, slope = loss_and_slope(loss_fn, logprobs, None, advantages, mask)
        assert_close(slope, plain)


def test_the_choice_is_made_on_advantages_as_they_are_however_many_tokens_a_step_has():
    # with advantages divided by the number of tokens beforehand, every covariance is about 1e-5
    n = 100_000
    logprobs, advantages = -3 * drawn(1, n).abs().float(), drawn(1, n, seed=1).sign().float()
    mask = torch.ones(1, n, dtype=torch.bool)
    assert chosen(ClipCovLoss(), logprobs, logprobs, advantages, mask).sum() == 20  # 2e-4 of them
    assert not chosen(ClipCovLoss(), logprobs, logprobs, advantages / n, mask).any()
    # under a split, where the normaliser holds the scale, the policy term and the penalty share it
    old = logprobs - 0.1
    loss_fn = KLCovLoss(fraction=0.01)
    selected = chosen(loss_fn, logprobs, old, advantages, mask)
    part = [x[:, :500] for x in (logprobs, old, advantages, mask)]
    _, slope = loss_and_slope(loss_fn, *part, selected=selected[:, :500], normalizer=count(mask))
    expected = (-math.exp(0.1) * part[2] + selected[:, :500]) / n
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=0)


# M2PO


def test_m2po_by_hand():
    # d^2 of the tokens that move with their advantage: 0.01, 0.09, 0.25, 1.0, a mean of 0.3375
    d = tensor([0.1, 0.3, -0.5, 1.0, -2.0, 2.0, 3.0])
    advantages = tensor([1.0, 2.0, -1.0, 1.0, 1.0, -1.0, 0.0])
    logprobs, mask = torch.full_like(d, -3.0), torch.ones(1, 7, dtype=torch.bool)
    old = logprobs - d
    for threshold, cut in ((0.34, []), (0.3, [3]), (0.1, [2, 3]), (0.04, [1, 2, 3]), (0.005, [0, 1, 2, 3])):
        loss_fn = M2POLoss(threshold=threshold)
        assert chosen(loss_fn, logprobs, old, advantages, mask)[0].nonzero().flatten().tolist() == cut
        _, slope = loss_and_slope(loss_fn, logprobs, old, advantages, mask)
        expected = -d.exp() * advantages / 7  # of all tokens, those that are cut among them
        expected[0, cut] = 0
        assert_close(slope, expected)
        assert scalars(loss_fn(logprobs, old, advantages, mask).metrics)["selected_frac"] == close(len(cut) / 7)


def test_m2po_at_its_threshold_keeps():
    new, mask = tensor([-1.0, -1.0]), torch.ones(1, 2, dtype=torch.bool)
    old = new - tensor([0.5, 0.0])
    assert not chosen(M2POLoss(threshold=0.25), new, old, tensor(1.0), mask).any()
    assert chosen(M2POLoss(threshold=0.249), new, old, tensor(1.0), mask).tolist() == [[True, False]]


@pytest.mark.parametrize("threshold", [0.02, 0.04, 0.1])
def test_m2po_cuts_the_largest_and_no_more_than_it_takes(threshold):
    logprobs, old, advantages, mask = batch(12, 20, seed=3)
    d = logprobs - old
    region = mask & (d.sign() * advantages.sign() > 0)
    selected = chosen(M2POLoss(threshold=threshold), logprobs, old, advantages, mask)
    assert selected.any()
    assert not (selected & ~region).any()
    kept, cut = d[region & ~selected].square(), d[selected].square()
    assert kept.mean() <= threshold
    assert cut.min() >= kept.max()
    assert torch.cat([kept, cut.min()[None]]).mean() > threshold


def test_a_choice_per_micro_batch_would_be_another():
    logprobs, old, advantages, mask = batch(8, 12)
    for loss_fn in (ClipCovLoss(fraction=0.1, cov_min=0.1, cov_max=1.0), KLCovLoss(fraction=0.1), M2POLoss()):
        whole = chosen(loss_fn, logprobs, old, advantages, mask)
        parts = [chosen(loss_fn, *(x[i : i + 2] for x in (logprobs, old, advantages, mask))) for i in range(0, 8, 2)]
        assert not torch.equal(whole, torch.cat(parts))


@pytest.mark.unhooked
def test_a_part_of_a_step_without_its_choice_is_sent_back():
    logprobs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match=r"M2POLoss: normalizer= says .*statistics\(\.\.\.\)\['selected'\]"):
        M2POLoss()(logprobs, old, advantages, mask, normalizer=count(mask))
    with pytest.raises(ValueError, match="M2POLoss: selected must be a bool tensor"):
        M2POLoss()(logprobs, old, advantages, mask, selected=mask.double())
    with pytest.raises(ValueError, match=r"M2POLoss: selected must have the shape .* \[4, 6\], got \[4, 5\]"):
        M2POLoss()(logprobs, old, advantages, mask, selected=mask[:, :5])


# all of them


def test_names_that_people_type():
    names = {
        "kimi": ("Kimi-k1.5", "kimi_k15", "kimi15"),
        "a_star_po": ("A*-PO", "A*PO", "a2po", "A-Star-PO"),
        "clip_cov": ("clip-cov", "ClipCov"),
        "kl_cov": ("KL-Cov", "klcov"),
        "decoupled_ppo": ("decoupled-ppo", "DecoupledPPO"),
    }
    for name, spellings in names.items():
        for spelling in spellings:
            assert type(get_loss(spelling)) is type(get_loss(name))
    assert isinstance(get_loss("opsm", threshold=0.1), OPSMLoss)


def test_on_policy_the_squares_are_reinforce():
    logprobs, _, advantages, mask = batch()
    expected = loss_and_slope(REINFORCELoss(), logprobs, None, advantages, mask)
    for loss_fn, extra in ((KimiLoss(), {}), (DROLoss(), {"ref_logprobs": logprobs})):
        loss, slope = loss_and_slope(loss_fn, logprobs, None, advantages, mask, **extra)
        assert loss == close(expected[0])
        assert_close(slope, expected[1])


WRONG = [
    ("kimi", {"tau": 0.0}, r"tau must be a number in \(0, inf\]"),
    ("kimi", {"ratio_level": "geometric"}, "ratio_level must be one of"),
    ("dro", {"tau": -1.0}, r"tau must be a number in \(0, inf\]"),
    ("dro", {"anchor": "ref"}, "anchor must be one of .*'reference'"),
    ("dro", {"ratio_level": "sequences"}, "did you mean 'sequence'"),
    ("a_star_po", {"beta": 0}, r"beta must be a number in \(0, inf\]"),
    ("cpgd", {"clip_eps_low": 1.1}, r"clip_eps_low must be a number in \[0, 1\]"),
    ("cpgd", {"clip_eps_high": -0.1}, "clip_eps_high must be"),
    ("cpgd", {"drift_coef": -1}, "drift_coef must be"),
    ("cpgd", {"drift_clip": 0}, r"drift_clip must be a number in \(0, inf\]"),
    ("dppo", {"divergence": "js"}, "divergence must be one of"),
    ("dppo", {"threshold_low": -0.1}, "threshold_low must be"),
    ("dppo", {"threshold_high": math.nan}, "threshold_high must be"),
    ("dppo", {"ratio_max": 0.5}, r"ratio_max must be a number in \[1, inf\]"),
    ("opsm", {"threshold": -0.1}, "threshold must be"),
    ("decoupled_ppo", {"ratio_max": 0.9}, r"ratio_max must be a number in \[1, inf\]"),
    ("clip_cov", {"fraction": 1.5}, r"fraction must be a number in \[0, 1\]"),
    ("clip_cov", {"cov_min": 3.0, "cov_max": 2.0}, r"cov_max must be a number in \[3, inf\]"),
    ("clip_cov", {"seed": -1}, r"seed must be an integer in \[0, 2\^32\)"),
    ("clip_cov", {"seed": 0.5}, "seed must be an integer"),
    ("kl_cov", {"fraction": -0.1}, "fraction must be"),
    ("kl_cov", {"penalty": "k1"}, "penalty must be one of"),
    ("kl_cov", {"penalty_coef": -0.1}, "penalty_coef must be"),
    ("m2po", {"threshold": -0.1}, "threshold must be"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_hyperparameters_that_make_no_sense_raise(name, options, message):
    with pytest.raises(ValueError, match=f"Loss: .*{message}|Loss: {message}"):
        get_loss(name, **options)
