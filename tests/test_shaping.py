"""Shaped rewards, whitening, KL controllers, running statistics: by hand, against the specification, at the edges."""

# pyright: reportArgumentType=false

import math
import re
import statistics
from functools import partial

import pytest
import torch

import rlloss
from rlloss import Moments, kl_k1
from rlloss.advantages.running import AdaptiveKLController, FixedKLController, RunningRewardNorm
from rlloss.advantages.shaping import kl_shaped_rewards, overlong_penalty
from rlloss.advantages.whiten import whiten

NAN, INF = math.nan, math.inf
MASK = torch.tensor([[True, False, True, True], [True, False, False, False], [False] * 4])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# kl_shaped_rewards


def test_shaped_rewards_by_hand():
    kl = torch.tensor([[1.0, NAN, 2.0, -3.0], [4.0, INF, 0.0, 9.0], [NAN] * 4])
    shaped = kl_shaped_rewards(torch.tensor([10.0, 20.0, NAN]), kl, MASK, 0.5)
    assert shaped.tolist() == [[-0.5, 0.0, -1.0, 11.5], [18.0, 0.0, 0.0, 0.0], [0.0] * 4]
    per_token = torch.tensor([[1.0, NAN, 2.0, 3.0], [5.0, NAN, 0.0, 0.0], [9.0] * 4])
    shaped = kl_shaped_rewards(per_token, kl, MASK, 0.5)
    assert shaped.tolist() == [[0.5, 0.0, 1.0, 4.5], [3.0, 0.0, 0.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_which_kl_in_the_reward_descends_which_divergence(estimator):
    # every answer of one token, weighted by its probability: the exact expectation of the gradient
    logits = normal(6).requires_grad_()
    pi, ref = logits.log_softmax(0), normal(6, seed=1).log_softmax(0)
    reverse, forward = (pi.exp() * (pi - ref)).sum(), (ref.exp() * (ref - pi)).sum()
    of_answer = {"k1": kl_k1(pi, ref), "k3": rlloss.kl_k3(pi, ref), "full": reverse.expand(6)}
    mask = torch.ones(6, 1, dtype=torch.bool)
    advantages = kl_shaped_rewards(torch.zeros(6).double(), of_answer[estimator][:, None], mask, 1.0)
    loss = rlloss.REINFORCELoss()(pi[:, None], None, advantages, mask, token_weights=pi.exp()[:, None], normalizer=1)
    slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss.loss, reverse, forward)]
    gradient, of_reverse, of_forward = slopes
    expected = {"k1": of_reverse, "k3": of_reverse - of_forward, "full": torch.zeros(6)}[estimator]
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-10, atol=1e-12)


def test_shaped_rewards_agree_with_the_specification_in_every_layout():
    kl, mask, rewards = normal(6, 9), normal(6, 9, seed=1) > -0.5, normal(6, seed=2)
    mask[2] = False
    shaped = kl_shaped_rewards(rewards, kl, mask, 0.3)
    torch.testing.assert_close(shaped.tolist(), rlloss.reference.kl_shaped_rewards(rewards, kl, mask, 0.3))
    lengths = torch.tensor([9, 3, 4, 0, 1, 9])
    kept = torch.arange(9) < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    expected = kl_shaped_rewards(rewards, kl, mask & kept, 0.3)[kept]
    packed = torch.cat([kl[kept], normal(2)])
    packed_mask = torch.cat([mask[kept], torch.ones(2).bool()])
    actual = kl_shaped_rewards(rewards, packed, packed_mask, 0.3, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(actual[:-2], expected, rtol=1e-12, atol=0)
    assert actual[-2:].tolist() == [0.0, 0.0]
    rows = rlloss.reference.kl_shaped_rewards(rewards, packed, packed_mask, 0.3, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(actual[:-2].tolist(), [x for row in rows for x in row])


def test_shaped_rewards_sum_to_the_penalised_reward_of_the_sequence():
    old, ref = -normal(6, 9).abs(), -normal(6, 9, seed=1).abs()
    mask, rewards = torch.ones(6, 9).bool(), normal(6, seed=2)
    shaped = kl_shaped_rewards(rewards, kl_k1(old, ref), mask, 0.1)
    # equation 2: R = r - beta log(pi(y|x) / rho(y|x))
    torch.testing.assert_close(shaped.sum(-1), rewards - 0.1 * (old.sum(-1) - ref.sum(-1)), rtol=1e-12, atol=1e-12)


def test_shaped_rewards_take_the_coefficient_of_a_controller():
    rewards, kl = normal(3).float(), normal(3, 4).float()
    shaped = kl_shaped_rewards(rewards, kl, MASK, AdaptiveKLController(0.25, 6.0).kl_coef)
    assert torch.equal(shaped, kl_shaped_rewards(rewards, kl, MASK, 0.25))
    assert shaped.dtype is kl_shaped_rewards(rewards.double(), kl, MASK, 0.25).dtype is torch.float32


def test_shaped_rewards_carry_no_gradient():
    leaves = [x.requires_grad_() for x in (normal(3), normal(3, 4), normal(1)[0])]
    assert not kl_shaped_rewards(leaves[0], leaves[1], MASK, leaves[2]).requires_grad


# overlong_penalty


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 10**6])
    expected = [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0]  # the paper's 16384 + 4096
    assert overlong_penalty(lengths, 20480, 4096).tolist() == expected
    assert overlong_penalty(lengths, 20480, 4096, penalty=0.5).tolist() == [x / 2 for x in expected]
    assert overlong_penalty(torch.tensor([1, 5, 10, 11]), 10, 10).tolist() == pytest.approx([-0.1, -0.5, -1, -1])


@pytest.mark.parametrize(("max_length", "buffer_length", "penalty"), [(20, 5, 1.0), (7, 7, 2.0), (9, 1, 0.5)])
def test_overlong_penalty_agrees_with_the_specification(max_length, buffer_length, penalty):
    lengths = torch.arange(30)
    expected = [rlloss.reference.overlong_penalty(n, max_length, buffer_length, penalty) for n in range(30)]
    assert overlong_penalty(lengths, max_length, buffer_length, penalty).tolist() == pytest.approx(expected, rel=1e-6)


# whiten


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_whiten_agrees_with_the_specification(center, dtype, tolerance):
    x = (3 + 2 * normal(6, 9)).to(dtype)
    mask = normal(6, 9, seed=1) > 0
    expected = torch.tensor(rlloss.reference.whiten(x, mask, center=center), dtype=dtype)
    poisoned = torch.where(mask, x, NAN)
    whitened = whiten(poisoned, mask, center=center)
    torch.testing.assert_close(whitened, expected, rtol=tolerance, atol=tolerance)
    assert not whitened[~mask].any()


def test_whiten_by_hand():
    x, mask = torch.tensor([[2.0, NAN], [6.0, 4.0]]).double(), torch.tensor([[True, False], [True, True]])
    assert whiten(x, mask, eps=0.0).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert whiten(x, mask, eps=0.0, center=False).tolist() == [[3.0, 0.0], [5.0, 4.0]]
    assert whiten(x, mask, eps=12.0).tolist() == [[-0.5, 0.0], [0.5, 0.0]]  # sqrt(4 + 12)
    rows = torch.tensor([2.0, NAN, 6.0, 4.0])
    assert whiten(rows, ~rows.isnan(), eps=0.0).tolist() == [-1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("center", [True, False])
def test_whitened_parts_are_the_whole(center):
    x, mask = 100 + normal(12, 9), normal(12, 9, seed=1) > 0
    mask[4:6] = False
    parts = list(zip(x.split([1, 3, 2, 6]), mask.split([1, 3, 2, 6]), strict=True))
    moments = sum(Moments.of(*part) for part in parts)
    whitened = torch.cat([whiten(*part, moments=moments, center=center) for part in parts])
    torch.testing.assert_close(whitened, whiten(x, mask, center=center), rtol=1e-11, atol=1e-11)
    # a part's own statistics are others
    assert not torch.allclose(whiten(*parts[1], center=center), whitened[1:4], atol=1e-3)


def test_whiten_leaves_out_the_tail_of_a_pack():
    x, cu_seqlens = normal(9), torch.tensor([0, 3, 3, 7])
    whitened = whiten(x, torch.ones(9).bool(), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(whitened[:7], whiten(x[:7], torch.ones(7).bool()), rtol=1e-12, atol=1e-12)
    assert whitened[7:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -123.456, 1e-30, 1e6])
@pytest.mark.parametrize("n", [2, 3, 7, 1000, 70001])
def test_identical_values_whiten_to_exact_zeros(dtype, value, n):
    x, mask = torch.full((n,), value, dtype=dtype), torch.ones(n).bool()
    assert not whiten(x, mask).any()
    assert not whiten(x, mask, eps=0.0).any()
    parts = zip(x.split(n // 7 + 1), mask.split(n // 7 + 1), strict=True)
    assert not whiten(x, mask, moments=sum(Moments.of(*part) for part in parts)).any()


def test_whiten_of_one_value_and_of_none():
    x = torch.tensor([5.0, NAN])
    assert whiten(x, torch.tensor([True, False])).tolist() == [0.0, 0.0]
    assert whiten(x, torch.tensor([True, False]), center=False).tolist() == [5.0, 0.0]
    for center in (True, False):
        assert whiten(x, torch.tensor([False, False]), center=center).tolist() == [0.0, 0.0]
        assert whiten(torch.zeros(0, 3), torch.zeros(0, 3).bool(), center=center).shape == (0, 3)


def test_whiten_carries_no_gradient():
    x = normal(3, 4).requires_grad_()
    assert not whiten(x, MASK).requires_grad


# the KL controllers


def test_adaptive_controller_by_hand():
    controller = AdaptiveKLController(0.2, target_kl=6.0, horizon=1000)
    steps = [
        (60.0, 100, 0.2 * 1.02),  # far above: +0.2 of 100 / 1000
        (0.0, 500, 0.2 * 1.02 * 0.9),  # far below: -0.2 of 500 / 1000
        (6.6, 1000, 0.2 * 1.02 * 0.9 * 1.1),  # 10% above, within the clip
        (6.0, 1000, 0.2 * 1.02 * 0.9 * 1.1),  # on target
    ]
    for kl, n, expected in steps:
        controller.update(torch.tensor(kl), n)
        assert float(controller.kl_coef) == pytest.approx(expected, rel=1e-6)


def test_adaptive_controller_agrees_with_the_specification():
    controller, expected = AdaptiveKLController(0.1, target_kl=3.0, horizon=2560), 0.1
    for kl in (3 + 2 * normal(200)).tolist():
        controller.update(kl, 256)
        expected = rlloss.reference.adaptive_kl_coef(expected, kl, 3.0, 0.1)  # the paper's K
    assert float(controller.kl_coef) == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_does_not_lose_small_factors():
    controller = AdaptiveKLController(0.1, target_kl=1.0, horizon=10**9)
    for _ in range(1000):
        controller.update(10.0, 1)
    assert float(controller.kl_coef) / 0.1 - 1 == pytest.approx(2e-7, rel=1e-3)


def test_adaptive_controller_resumes_exactly():
    kls = (3 + normal(20)).tolist()
    whole, before, after = (AdaptiveKLController(0.1, 3.0) for _ in range(3))
    for kl in kls:
        whole.update(kl, 512)
    for kl in kls[:10]:
        before.update(kl, 512)
    after.load_state_dict({k: v.clone() for k, v in before.state_dict().items()})
    for kl in kls[10:]:
        after.update(kl, 512)
    assert torch.equal(after.kl_coef, whole.kl_coef)
    assert float(after.kl_coef) != 0.1


def test_fixed_controller_stays():
    controller = FixedKLController(0.1)
    controller.update(100.0, 10**9)
    assert float(controller.kl_coef) == 0.1
    assert not controller.state_dict()
    assert controller.kl_coef.dtype is AdaptiveKLController(0.1, 1.0).kl_coef.dtype is torch.float64


def test_controllers_carry_no_gradient():
    controller = AdaptiveKLController(0.1, 1.0)
    controller.update(torch.tensor(3.0, requires_grad=True), 256)
    assert not controller.kl_coef.requires_grad


# RunningRewardNorm


def seen(rewards):
    return Moments.of(rewards.double(), ~rewards.isnan())


def test_running_norm_by_hand():
    norm, scaled = RunningRewardNorm(eps=0.0), RunningRewardNorm(center=False, eps=0.0)
    x = torch.tensor([2.0, NAN, 6.0, 4.0])
    for parts in ([1.0], [2.0, NAN, 4.0], [5.0, 3.0]):
        norm.update(seen(torch.tensor(parts)))
        scaled.update(seen(torch.tensor(parts)))
    # of 1, 2, 3, 4, 5: mean 3, variance 10 / 4
    root = math.sqrt(2.5)
    assert norm(x).tolist() == pytest.approx([-1 / root, NAN, 3 / root, 1 / root], nan_ok=True)
    assert scaled(x).tolist() == pytest.approx([2 / root, NAN, 6 / root, 4 / root], nan_ok=True)
    assert float(norm.count) == 5.0


@pytest.mark.parametrize("center", [True, False])
def test_running_norm_is_that_of_all_rewards_seen(center):
    rewards = 1000 + normal(300)
    norm = RunningRewardNorm(center=center)
    for step in rewards.split([1, 0, 99, 200]):
        ranks = step.tensor_split(3)
        norm.update(sum(seen(rank) for rank in ranks))
    history = rewards.tolist()
    mean, variance = statistics.mean(history), statistics.variance(history)
    x = torch.tensor([[999.0, 1000.5]]).double()
    expected = (x - mean * center) / math.sqrt(variance + 1e-8)
    torch.testing.assert_close(norm(x), expected, rtol=1e-10, atol=1e-10)


def test_running_norm_without_a_scale_divides_by_one():
    x = torch.tensor([0.1, 2.0])
    norm = RunningRewardNorm()
    assert norm(x).tolist() == x.tolist()
    norm.update(seen(x[:0]))
    assert norm(x).tolist() == x.tolist()
    for _ in range(3):  # one reward, then the same again
        norm.update(seen(x[:1]))
        assert norm(x).tolist() == pytest.approx([0.0, 1.9], abs=0, rel=1e-6)
    scaled = RunningRewardNorm(center=False)
    for _ in range(3):
        scaled.update(seen(x[:1]))
    assert scaled(x).tolist() == x.tolist()


@pytest.mark.parametrize("value", [0.1, 1 / 3, -123.456])
def test_running_norm_takes_the_rounding_of_a_mean_for_no_spread(value):
    norm, scaled = RunningRewardNorm(), RunningRewardNorm(center=False)
    for n in (1, 3, 7, 1000, 31):
        rewards = torch.full((n,), value, dtype=torch.float64)
        norm.update(seen(rewards))
        scaled.update(seen(rewards))
        assert not norm(rewards).any()
        assert scaled(rewards).tolist() == rewards.tolist()
    assert norm(rewards + 0.5).tolist() == pytest.approx([0.5] * 31, rel=1e-9)


def test_running_norm_reads_without_learning():
    norm = RunningRewardNorm()
    norm.update(seen(normal(9)))
    before = [x.clone() for x in norm.moments]
    y = norm(normal(9, seed=1).float().requires_grad_())
    assert y.dtype is torch.float32
    assert not y.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(before, norm.moments, strict=True))


def test_running_norm_resumes_exactly():
    rewards = normal(40)
    whole, before, after = RunningRewardNorm(), RunningRewardNorm(), RunningRewardNorm()
    for step in rewards.split(10):
        whole.update(seen(step))
    for step in rewards[:20].split(10):
        before.update(seen(step))
    state = {k: v.clone() for k, v in before.state_dict().items()}
    assert {k: v.dtype for k, v in state.items()} == dict.fromkeys(("count", "mean", "m2"), torch.float64)
    after.load_state_dict(state)
    assert torch.equal(after(rewards), before(rewards))
    for step in rewards[20:].split(10):
        after.update(seen(step))
    assert torch.equal(after(rewards), whole(rewards))
    assert not torch.equal(after(rewards), before(rewards))


def test_nothing_waits_for_the_device():
    # a meta tensor has no values: whoever asks for one, raises
    rewards, kl, mask = torch.zeros(3, device="meta"), torch.zeros(3, 4, device="meta"), MASK.to("meta")
    controller, norm = AdaptiveKLController(0.1, 6.0).to("meta"), RunningRewardNorm().to("meta")
    controller.update(kl.mean(), 3)
    norm.update(Moments.of(rewards, ~rewards.isnan()))
    assert norm(rewards).shape == (3,)
    shaped = kl_shaped_rewards(rewards, kl, mask, controller.kl_coef)
    assert whiten(shaped, mask).shape == (3, 4)
    lengths = rlloss.sequence_lengths(mask)
    assert overlong_penalty(lengths, 4, 2).shape == (3,)
    cu_seqlens = torch.zeros(4, device="meta").long()
    shaped = kl_shaped_rewards(rewards, kl.flatten(), mask.flatten(), 0.1, cu_seqlens=cu_seqlens)
    assert shaped.shape == (12,)


# bad input

X, A, L = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).long()
CONTROLLER = AdaptiveKLController(0.1, 6.0, horizon=1000)
BAD = [
    (
        partial(kl_shaped_rewards, A[:2], X, MASK, 0.1),
        "kl_shaped_rewards: rewards must have one value per sequence [3] or per token [3, 4], got [2]",
    ),
    (
        partial(kl_shaped_rewards, X[:, :1], X, MASK, 0.1),
        "kl_shaped_rewards: rewards must have one value per sequence [3] or per token [3, 4], got [3, 1]",
    ),
    (partial(kl_shaped_rewards, A, A, MASK, 0.1), "kl_shaped_rewards: kl must have the shape of loss_mask"),
    (partial(kl_shaped_rewards, A, X, MASK, -0.1), "kl_shaped_rewards: kl_coef must be a number in [0, inf], got -0.1"),
    (partial(kl_shaped_rewards, A, X, MASK, A), "kl_shaped_rewards: kl_coef must be one number, got a tensor of shape"),
    (partial(kl_shaped_rewards, A, X, MASK.int(), 0.1), "kl_shaped_rewards: loss_mask must be a bool tensor"),
    (partial(kl_shaped_rewards, A, A, MASK[:, 0], 0.1), "kl_shaped_rewards: a packed loss_mask [3] needs cu_seqlens"),
    (partial(overlong_penalty, L, 10, 0), "overlong_penalty: buffer_length must be an integer of at least 1, got 0"),
    (partial(overlong_penalty, L, 2.5, 1), "overlong_penalty: max_length must be an integer of at least 1, got 2.5"),
    (partial(overlong_penalty, L, 10, 11), "overlong_penalty: buffer_length is a part of max_length"),
    (partial(overlong_penalty, L, 10, 1, -1.0), "overlong_penalty: penalty must be a number in [0, inf], got -1.0"),
    (partial(overlong_penalty, A, 10, 1), "overlong_penalty: lengths must be integers [B], got torch.float32 [3]"),
    (partial(overlong_penalty, [3], 10, 1), "overlong_penalty: lengths must be integers [B], got list"),
    (partial(whiten, X, MASK[:2]), "whiten: x must have the shape of loss_mask, [2, 4], got [3, 4]"),
    (partial(whiten, X.half(), MASK), "whiten: x must be float32 or float64, got torch.float16"),
    (partial(whiten, X, MASK.float()), "whiten: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    (partial(whiten, X, MASK, eps=-1.0), "whiten: eps must be a number in [0, inf], got -1.0"),
    (partial(whiten, X, MASK, moments=(1, 2, 3)), "whiten: moments must be rlloss.Moments, got tuple"),
    (partial(whiten, X, MASK, cu_seqlens=L), "whiten: cu_seqlens goes with packed [N] tensors"),
    (partial(FixedKLController, -0.1), "FixedKLController: kl_coef must be a number in [0, inf], got -0.1"),
    (
        partial(AdaptiveKLController, 0.0, 6.0),
        "AdaptiveKLController: init_kl_coef must be a number in (0, inf], got 0.0",
    ),
    (partial(AdaptiveKLController, 0.1, 0), "AdaptiveKLController: target_kl must be a number in (0, inf], got 0"),
    (partial(AdaptiveKLController, 0.1, 6.0, 0), "AdaptiveKLController: horizon must be a number in (0, inf], got 0"),
    (
        partial(CONTROLLER.update, 1.0, 5000),
        "AdaptiveKLController.update: n=5000 is 5 times horizon=1000 or more, and a low KL would turn the coefficient",
    ),
    (partial(CONTROLLER.update, 1.0, -1), "AdaptiveKLController.update: n must be a number in [0, inf], got -1"),
    (partial(CONTROLLER.update, NAN, 1), "AdaptiveKLController.update: kl must be a number in [-inf, inf], got nan"),
    (partial(CONTROLLER.update, A, 1), "AdaptiveKLController.update: kl must be one number, got a tensor of shape [3]"),
    (partial(RunningRewardNorm, eps=-1.0), "RunningRewardNorm: eps must be a number in [0, inf], got -1.0"),
    (partial(RunningRewardNorm().update, A), "RunningRewardNorm.update: moments must be rlloss.Moments, got Tensor"),
    (partial(RunningRewardNorm().update, None), "RunningRewardNorm.update: moments must be rlloss.Moments, got None"),
    (partial(RunningRewardNorm(), L), "RunningRewardNorm: rewards must be float32 or float64, got torch.int64"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_bad_input_teaches(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
