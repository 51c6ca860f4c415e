"""Losses under weights and ratios of their own against arithmetic done by hand, and what they reduce to."""

import math
from typing import Any

import pytest
import torch

import rlloss
from rlloss import (
    A2CLoss,
    ActorCriticLoss,
    CISPOLoss,
    GMPOLoss,
    GPGLoss,
    GRPOLoss,
    GSPOLoss,
    GSPOTokenLoss,
    ImportanceSamplingLoss,
    LUSPOLoss,
    PPOLoss,
    REINFORCELoss,
    SAPOLoss,
    TISLoss,
    TOPRLoss,
    ValueLoss,
    VESPOLoss,
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


def assert_same(loss_fn, other, *inputs):
    (loss, slope), (same, same_slope) = loss_and_slope(loss_fn, *inputs), loss_and_slope(other, *inputs)
    assert loss == close(same)
    assert_close(slope, same_slope)


def assert_raises(name, options, message):
    with pytest.raises(ValueError, match=message):
        rlloss.get_loss(name, **options)


def random_batch(seed=0, rows=5, columns=6, scale=0.3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs, mask = -draw(rows, columns).abs(), draw(rows, columns) > -0.5
    mask[:, 0] = True
    return logprobs, logprobs + scale * draw(rows, columns), draw(rows), mask


# two answers: ratios 2 and 4 per token, 8 of the whole; and 0.2, of the one token that it has
LOGPROBS = tensor([-1.0, -2.0], [-3.0, -9.0])
OLD = LOGPROBS - tensor([2.0, 4.0], [0.2, 1.0]).log()
ADVANTAGES = tensor(1.0, -2.0)
INPUTS = (LOGPROBS, OLD, ADVANTAGES, RAGGED)


# A2C and GPG


def test_a2c_by_hand():
    # (1 * (1 + 2) - 2 * 3) / 3, less 0.01 * 4
    entropy = torch.full_like(LOGPROBS, 4.0).requires_grad_()
    out = A2CLoss()(*INPUTS, entropy=entropy)
    assert out.loss.item() == close(-1.0 - 0.04)
    assert_close(torch.autograd.grad(out.loss, entropy)[0], tensor([-0.01, -0.01], [-0.01, 0.0]) / 3)
    loss, slope = loss_and_slope(A2CLoss(entropy_coef=0.0), *INPUTS)
    assert loss == close(-1.0)
    assert_close(slope, tensor([-1.0, -1.0], [2.0, 0.0]) / 3)


def test_a2c_with_its_critic_is_one_objective():
    values = tensor([0.5, 1.0], [2.0, 0.0])
    extra = {"values": values, "old_values": None, "returns": values + 2, "entropy": torch.ones_like(values)}
    out = ActorCriticLoss(policy=A2CLoss(), value=ValueLoss(value_clip=None), value_coef=0.5)(*INPUTS, **extra)
    assert float(out.loss) == close(-1.0 - 0.01 + 0.5 * 2)


def test_an_entropy_bonus_takes_a_controller():
    controller = rlloss.AdaptiveEntropyController(target_entropy=1.0, init_coef=0.1875, step=0.0625)
    controller.update(entropy=0.5)
    entropy = torch.full_like(LOGPROBS, 4.0)
    assert float(A2CLoss(entropy_coef=controller)(*INPUTS, entropy=entropy).loss) == close(-1.0 - 0.25 * 4)


@pytest.mark.unhooked
def test_a2c_asks_for_its_entropy():
    with pytest.raises(ValueError, match=r"A2CLoss: entropy_coef=0.01 needs entropy, got None"):
        A2CLoss()(*INPUTS)


def test_gpg_by_hand():
    loss, slope = loss_and_slope(GPGLoss(), *INPUTS)
    assert loss == close(-1.0)
    assert_close(slope, tensor([-1.0, -1.0], [2.0, 0.0]) / 3)
    assert_same(GPGLoss(), A2CLoss(entropy_coef=0.0), *INPUTS)


def test_the_gradient_on_policy_is_that_of_ppo():
    batch = random_batch()
    for loss_fn in (GPGLoss(), CISPOLoss(ratio_max=5.0), VESPOLoss()):
        slope, of_ppo = (loss_and_slope(x, batch[0], None, *batch[2:])[1] for x in (loss_fn, PPOLoss()))
        assert_close(slope, of_ppo)


# CISPO

# regression: ratios (1, e, 1/e), A = (1, 1, -1); one system clipped the product and lost the last two
WEIGHED = (tensor([0.0, 1.0, -1.0]), torch.zeros(1, 3, dtype=torch.float64), tensor([1.0, 1.0, -1.0]))


def test_cispo_holds_the_weight_and_keeps_the_token():
    loss_fn = CISPOLoss(ratio_min=0.8, ratio_max=1.2)
    inputs = (*WEIGHED, torch.ones(1, 3, dtype=torch.bool))
    _, slope = loss_and_slope(loss_fn, *inputs, normalizer=1)
    assert_close(slope, tensor([-1.0, -1.2, 0.8]))
    assert scalars(loss_fn(*inputs).metrics)["clip_frac"] == close(2 / 3)
    # PPO lets go of both that its clip binds at
    _, slope = loss_and_slope(PPOLoss(), *inputs, normalizer=1)
    assert_close(slope, tensor([-1.0, 0.0, 0.0]))


def test_cispo_by_hand():
    # 2 is as it is and 4 is held at 3; 0.2 is held at 0.5: (2 * 1 + 3 * 2 - 0.5 * 2 * 3) / 3
    loss, slope = loss_and_slope(CISPOLoss(ratio_min=0.5, ratio_max=3.0), *INPUTS)
    assert loss == close(5 / 3)
    assert_close(slope, tensor([-2.0, -3.0], [1.0, 0.0]) / 3)
    # nothing is held below by default, and nothing above at infinity
    _, slope = loss_and_slope(CISPOLoss(ratio_max=math.inf), *INPUTS)
    assert_close(slope, tensor([-2.0, -4.0], [0.4, 0.0]) / 3)
    assert CISPOLoss(ratio_max=5.0).ratio_min == 0


def test_cispo_within_its_bounds_has_the_gradient_of_ppo():
    batch = random_batch()
    slope = loss_and_slope(CISPOLoss(ratio_max=100.0), *batch)[1]
    wide = PPOLoss(clip_eps_low=1.0, clip_eps_high=99.0)
    assert_close(slope, loss_and_slope(wide, *batch)[1])


# the weight of a ratio in each system, as it writes its own hyperparameters
READINGS = {
    "minimax_m1": lambda r: r.clamp(1 - 1e9, 1 + 0.3),  # eps_low huge; eps_high is not published, here 0.3
    "scale_rl": lambda r: r.clamp(max=5.0),
    "tinker": lambda r: r.clamp(0.0, 4.0),
    "trl": lambda r: r.clamp(max=5.0),
    "verl": lambda r: r.clamp(1 - 0.2, 1 + 0.2),
}


@pytest.mark.parametrize("name", CISPOLoss.PRESETS)
def test_each_reading_of_cispo_is_its_systems_formula(name):
    logprobs, old, advantages, mask = random_batch(scale=2.0)
    more = {"ratio_max": 1.3} if name == "minimax_m1" else {}
    loss_fn = rlloss.get_loss("cispo", **CISPOLoss.PRESETS[name], **more)
    expected = -(READINGS[name]((logprobs - old).exp()) * advantages[:, None] * mask) / mask.sum()
    assert_close(loss_and_slope(loss_fn, logprobs, old, advantages, mask)[1], expected)


@pytest.mark.unhooked
@pytest.mark.parametrize("ratio_max", [0.2, 1.0, 1, -3.0])
def test_an_offset_is_no_bound(ratio_max):
    taught = r"CISPOLoss: ratio_max must be above 1, got .*TRL's default epsilon_high=0.2 read as the bound clamps"
    assert_raises("cispo", {"ratio_max": ratio_max}, taught)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_max": math.nan}, "ratio_max must be a number"),
        ({"ratio_max": True}, "ratio_max must be a number"),
        ({"ratio_max": 5.0, "ratio_min": 1.1}, r"ratio_min must be a number in \[0, 1\]"),
        ({"ratio_max": 5.0, "ratio_min": -0.1}, r"ratio_min must be a number in \[0, 1\]"),
    ],
)
def test_bounds_of_cispo_are_numbers_around_1(options, message):
    assert_raises("cispo", options, message)


def test_cispo_has_no_bound_of_its_own():
    with pytest.raises(TypeError, match="ratio_max"):
        rlloss.get_loss("cispo")


# TIS


def test_tis_by_hand():
    # 8 is held at 1 and 0.2 is as it is: (1 * 3 - 0.2 * 2 * 3) / 2
    loss, slope = loss_and_slope(TISLoss(), *INPUTS)
    assert loss == close(0.9)
    assert_close(slope, tensor([-1.0, -1.0], [0.4, 0.0]) / 2)
    # 4 is held at 3: (2 * 1 + 3 * 2 - 0.2 * 2 * 3) / 2
    assert loss_and_slope(TISLoss(ratio_level="token", ratio_max=3.0), *INPUTS)[0] == close(3.4)
    assert scalars(TISLoss()(*INPUTS).metrics)["clip_frac"] == close(2 / 3)


def test_tis_holds_the_ratio_of_its_kl():
    # ratios 2, 4 and 0.2 of the tokens, of which 1, 1 and 0.2 are left; the slope of k3 is w log(pi / ref)
    _, slope = loss_and_slope(TISLoss(kl_coef=1.0), LOGPROBS, OLD, 0 * ADVANTAGES, RAGGED, ref_logprobs=LOGPROBS - 3)
    assert_close(slope, 3 * tensor([1.0, 1.0], [0.2, 0.0]) / 2)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_tis_is_importance_sampling_within_its_bounds(level):
    batch = random_batch()
    wider: dict[str, Any] = {"ratio_level": level, "kl_coef": 0.3}
    extra = {"ref_logprobs": batch[1] + 0.2}
    actual = loss_and_slope(TISLoss(**wider, ratio_max=1.1), *batch, **extra)
    loss, slope = loss_and_slope(ImportanceSamplingLoss(**wider, ratio_max=1.1), *batch, **extra)
    assert actual[0] == loss
    assert torch.equal(actual[1], slope)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_level": "tokens"}, "TISLoss: ratio_level must be one of .*did you mean 'token'"),
        ({"ratio_max": 0.9}, r"TISLoss: ratio_max must be a number in \[1, inf\]"),
    ],
)
def test_a_bound_of_tis_below_1_would_change_the_policy_gradient_itself(options, message):
    assert_raises("tis", options, message)


# TOPR


def test_topr_by_hand():
    # the good answer weighs 1 and not 8, the bad one 0.2: (1 * 3 - 0.2 * 2 * 3) / 2
    loss, slope = loss_and_slope(TOPRLoss(), *INPUTS)
    assert loss == close(0.9)
    assert_close(slope, tensor([-1.0, -1.0], [0.4, 0.0]) / 2)
    # the other way round: the good answer weighs 1 and not 0.2, the bad one 8 held at 1
    loss, slope = loss_and_slope(TOPRLoss(), LOGPROBS, OLD, -ADVANTAGES, RAGGED)
    assert loss == close((-3 + 2 * 3) / 2)
    assert_close(slope, tensor([1.0, 1.0], [-2.0, 0.0]) / 2)


def test_topr_reports_what_it_holds_among_the_bad():
    metrics = scalars(TOPRLoss()(*INPUTS).metrics)
    assert metrics["weight"] == close((1 + 1 + 0.2) / 3)
    assert metrics["clip_frac"] == 0
    assert metrics["ratio"] == close((8 + 8 + 0.2) / 3)
    assert scalars(TOPRLoss()(LOGPROBS, OLD, -ADVANTAGES, RAGGED).metrics)["clip_frac"] == 1


def test_topr_tapers_each_sign_within_its_own_bounds():
    # 8 is held at 5, and 0.2 at 0.5
    loss_fn = TOPRLoss(positive_max=5.0, negative_min=0.5)
    assert_close(loss_and_slope(loss_fn, *INPUTS)[1], tensor([-5.0, -5.0], [1.0, 0.0]) / 2)
    # -8 is held at 3, and 0.2 at 0.4
    loss_fn = TOPRLoss(positive_min=0.4, negative_max=3.0)
    inputs = (LOGPROBS, OLD, -ADVANTAGES, RAGGED)
    assert_close(loss_and_slope(loss_fn, *inputs)[1], tensor([3.0, 3.0], [-0.8, 0.0]) / 2)


def bounds(*limits):
    return dict(zip(("positive_min", "positive_max", "negative_min", "negative_max"), limits, strict=True))


@pytest.mark.parametrize(
    ("limits", "other"),
    [
        ((1.0, 1.0, 1.0, 1.0), REINFORCELoss()),
        ((0.0, math.inf, 0.0, math.inf), ImportanceSamplingLoss(ratio_max=math.inf)),
        ((0.0, 1.0, 0.0, 1.0), TISLoss()),
    ],
    ids=["reinforce", "importance_sampling", "tis"],
)
def test_topr_holds_its_rivals_as_bounds(limits, other):
    assert_same(TOPRLoss(**bounds(*limits)), other, *random_batch())


def test_topr_holds_the_imitation_of_good_answers_as_bounds():
    logprobs, old, advantages, mask = random_batch()
    loss_fn = TOPRLoss(**bounds(1.0, 1.0, 0.0, 0.0))
    loss, slope = loss_and_slope(loss_fn, logprobs, old, advantages, mask)
    good = advantages.clamp(min=0)
    same, same_slope = loss_and_slope(REINFORCELoss(), logprobs, None, good, mask)
    assert loss == close(same)
    assert_close(slope, same_slope)


def test_topr_lets_go_of_a_bad_answer_that_the_policy_has_left():
    slopes = [
        loss_and_slope(loss_fn, LOGPROBS - nats, LOGPROBS, -ADVANTAGES.abs(), RAGGED)[1].abs().max()
        for loss_fn in (TOPRLoss(), REINFORCELoss())
        for nats in (0.0, 8.0)
    ]
    assert slopes[1] < 1e-3 * slopes[0]
    assert slopes[3] == slopes[2]


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_min": -0.1}, r"TOPRLoss: negative_min must be a number in \[0, inf\]"),
        ({"negative_min": 2.0}, r"TOPRLoss: negative_max must be a number in \[2, inf\]"),
        ({"positive_max": 0.5}, r"TOPRLoss: positive_max must be a number in \[1, inf\]"),
        ({"positive_min": math.nan}, "TOPRLoss: positive_min must be a number"),
    ],
)
def test_bounds_of_topr_are_ordered(options, message):
    assert_raises("topr", options, message)


# VESPO


def phi(w, k, decay):
    return w**k * math.exp(decay * (1 - w))


def test_vespo_by_hand():
    loss, slope = loss_and_slope(VESPOLoss(), *INPUTS)
    good, bad = phi(8.0, 2, 3), phi(0.2, 3, 2)
    assert loss == close((good * 3 - bad * 2 * 3) / 3)
    assert_close(slope, tensor([-good, -good], [2 * bad, 0.0]) / 3)
    metrics = scalars(VESPOLoss()(*INPUTS).metrics)
    assert metrics["weight"] == close((2 * good + bad) / 3)
    assert metrics["ratio"] == close((8 + 8 + 0.2) / 3)
    other = VESPOLoss(k_pos=0.5, lambda_pos=0.1, k_neg=0.25, lambda_neg=4.0)
    good, bad = phi(8.0, 0.5, 0.1), phi(0.2, 0.25, 4.0)
    assert_close(loss_and_slope(other, *INPUTS)[1], tensor([-good, -good], [2 * bad, 0.0]) / 3)


@pytest.mark.parametrize(("k", "decay"), [(2.0, 3.0), (3.0, 2.0), (1.0, 0.5)])
def test_vespos_weight_is_1_on_policy_and_bounded_everywhere(k, decay):
    loss_fn = VESPOLoss(k_pos=k, lambda_pos=decay)
    w = torch.linspace(0.01, 10, 1000, dtype=torch.float64)
    slopes = loss_and_slope(loss_fn, w.log()[:, None], 0 * w[:, None], 0 * w + 1, w[:, None] > 0, normalizer=1)[1]
    peak = (k / decay) ** k * math.exp(decay - k)
    assert -slopes.min() == pytest.approx(peak, rel=1e-3)
    assert w[slopes.argmin()] == pytest.approx(k / decay, abs=0.02)
    on_policy = loss_and_slope(loss_fn, LOGPROBS, None, ADVANTAGES.abs(), RAGGED)[1]
    assert_close(on_policy, tensor([-1.0, -1.0], [-2.0, 0.0]) / 3)


# f with f'(w) = phi(w) / w
SURROGATES = {
    1.0: lambda w, decay: -(decay * (1 - w)).exp() / decay,
    2.0: lambda w, decay: -(w / decay + 1 / decay**2) * (decay * (1 - w)).exp(),
}


@pytest.mark.parametrize("k", SURROGATES)
def test_vespo_ascends_its_own_surrogate_off_policy(k):
    generator = torch.Generator().manual_seed(0)
    logits, old, rewards = torch.randn(3, 6, generator=generator, dtype=torch.float64).unbind()
    logits.requires_grad_()
    logprobs, old = logits.log_softmax(-1), old.log_softmax(-1)
    loss_fn = VESPOLoss(k_pos=k, lambda_pos=3.0, k_neg=k, lambda_neg=2.0)
    column = (logprobs[:, None], old[:, None], rewards, torch.ones(6, 1, dtype=torch.bool))
    loss = loss_fn(*column, token_weights=old.exp()[:, None], normalizer=1).loss
    decay = torch.where(rewards >= 0, torch.full_like(rewards, 3.0), 2.0)
    expected = (old.exp() * SURROGATES[k]((logprobs - old).exp(), decay) * rewards).sum()
    (slope,), (ascent,) = (torch.autograd.grad(x, logits, retain_graph=True) for x in (loss, expected))
    assert_close(slope, -ascent)


def test_vespo_lets_go_of_what_is_far_either_way():
    for nats in (-12.0, 12.0):
        slope = loss_and_slope(VESPOLoss(), LOGPROBS + nats, LOGPROBS, ADVANTAGES, RAGGED)[1]
        assert slope.abs().max() < 1e-8
        assert scalars(VESPOLoss()(LOGPROBS + nats, LOGPROBS, ADVANTAGES, RAGGED).metrics)["weight"] < 1e-8


def test_vespos_exponential_is_bounded_whatever_its_kernel():
    steep = VESPOLoss(k_pos=9.0, lambda_pos=1e-9)
    slope = loss_and_slope(steep, LOGPROBS.float() + 15, LOGPROBS.float(), ADVANTAGES.abs().float(), RAGGED)[1]
    assert_close(slope[RAGGED].double(), -torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) * slope[0, 0].abs())
    assert float(slope[0, 0].abs() * 3) == pytest.approx(math.exp(20), rel=1e-6)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_pos": -1.0}, r"VESPOLoss: k_pos must be a number in \[0, inf\]"),
        ({"k_neg": math.nan}, "VESPOLoss: k_neg must be a number"),
        ({"lambda_pos": 0.0}, r"VESPOLoss: lambda_pos must be a number in \(0, inf\]"),
        ({"lambda_neg": -2.0}, r"VESPOLoss: lambda_neg must be a number in \(0, inf\]"),
    ],
)
def test_a_kernel_of_vespo_fades(options, message):
    assert_raises("vespo", options, message)


# SAPO


def test_sapo_by_hand():
    def gate(r, tau):
        return 1 / (1 + math.exp(-tau * (r - 1)))

    p, q, n = gate(2, 1.0), gate(4, 1.0), gate(0.2, 1.05)
    loss, slope = loss_and_slope(SAPOLoss(), *INPUTS)
    assert loss == close((-4 * (p + q) / 2 + 4 / 1.05 * n * 2) / 2)
    shares = [4 * x * (1 - x) for x in (p, q, n)]
    assert_close(slope, tensor([-shares[0] * 2 / 2, -shares[1] * 4 / 2], [shares[2] * 0.2 * 2, 0.0]) / 2)
    assert scalars(SAPOLoss()(*INPUTS).metrics)["gate"] == close(sum(shares) / 3)
    # each sign has its own gate, and 0 that of the negative
    p, n = gate(2, 3.0), gate(0.2, 0.5)
    loss, _ = loss_and_slope(SAPOLoss(tau_pos=3.0, tau_neg=0.5), LOGPROBS, OLD, tensor([1.0, 0.0], [-2.0, 0.0]), RAGGED)
    assert loss == close((-4 / 3 * p / 2 + 4 / 0.5 * n * 2) / 2)
    zero = SAPOLoss(tau_pos=3.0, tau_neg=0.5)(LOGPROBS, OLD, 0 * ADVANTAGES, RAGGED)
    shares = [4 * gate(r, 0.5) * (1 - gate(r, 0.5)) for r in (2, 4, 0.2)]
    assert scalars(zero.metrics)["gate"] == close(sum(shares) / 3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 8.0])
def test_sapo_on_policy_has_the_gradient_of_grpo_whatever_tau(tau):
    logprobs, _, advantages, mask = random_batch()
    loss, slope = loss_and_slope(SAPOLoss(tau_pos=tau, tau_neg=tau), logprobs, None, advantages, mask)
    same, same_slope = loss_and_slope(GRPOLoss(), logprobs, None, advantages, mask)
    assert loss == close(2 / tau * same)
    assert_close(slope, same_slope)


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["tau_pos", "tau_neg"])
def test_a_gate_of_sapo_closes(name):
    assert_raises("sapo", {name: 0.0}, rf"SAPOLoss: {name} must be a number in \(0, inf\]")


# GSPO-token, GMPO, LUSPO

NARROW: dict[str, Any] = {"clip_eps_low": 0.1, "clip_eps_high": 0.15}


@pytest.mark.parametrize("options", [{}, NARROW, NARROW | {"dual_clip": 1.1}])
def test_gspo_token_with_one_advantage_per_sequence_is_gspo(options):
    for scale in (0.001, 0.3, 40.0):
        assert_same(GSPOTokenLoss(**options), GSPOLoss(**options), *random_batch(scale=scale))


def test_gspo_token_moves_each_token_by_its_own_advantage():
    # one answer of ratio exp(0.1), whose second token the clip at 1.05 lets go of no more than the first
    old, mask = tensor([-1.0, -2.0]), torch.ones(1, 2, dtype=torch.bool)
    inputs = (old + tensor([0.3, -0.1]), old, tensor([-3.0, 1.0]), mask)
    s = math.exp(0.1)
    loss, slope = loss_and_slope(GSPOTokenLoss(clip_eps_low=0.05, clip_eps_high=0.05), *inputs)
    assert loss == close((3 * s - 1.05) / 2)
    assert_close(slope, tensor([3 * s, 0.0]) / 2)
    of_gspo = loss_and_slope(GSPOLoss(clip_eps_low=0.05, clip_eps_high=0.05), *inputs)
    assert of_gspo[0] == close(loss)
    assert_close(of_gspo[1], tensor([3 * s / 2, 3 * s / 2]) / 2)


def test_gmpo_by_hand():
    # ratios of e^1, e^-0.2 and e^-1: for A > 0 the first is held at e^0.3, for A < 0 the last at e^-0.5
    old, mask = tensor([-1.0, -2.0, -3.0]), torch.ones(1, 3, dtype=torch.bool)
    new = old + tensor([1.0, -0.2, -1.0])
    loss_fn = GMPOLoss(clip_log_ratio_low=0.5, clip_log_ratio_high=0.3)
    g = math.exp((0.3 - 0.2 - 1.0) / 3)
    loss, slope = loss_and_slope(loss_fn, new, old, tensor(2.0), mask)
    assert loss == close(-2 * g)
    assert_close(slope, -2 * g * tensor([0.0, 1.0, 1.0]) / 3)
    g = math.exp((1.0 - 0.2 - 0.5) / 3)
    loss, slope = loss_and_slope(loss_fn, new, old, tensor(-2.0), mask)
    assert loss == close(2 * g)
    assert_close(slope, 2 * g * tensor([1.0, 1.0, 0.0]) / 3)
    for advantage in (2.0, -2.0):
        assert scalars(loss_fn(new, old, tensor(advantage), mask).metrics)["clip_frac"] == close(1 / 3)
    assert scalars(loss_fn(new, old, tensor(0.0), mask).metrics)["clip_frac"] == 0


def test_gmpo_meets_each_advantage_with_the_mean_clipped_on_its_side():
    old, mask = tensor([-1.0, -2.0]), torch.ones(1, 2, dtype=torch.bool)
    new = old + tensor([1.0, -1.0])
    above, below = math.exp((0.4 - 1) / 2), math.exp((1 - 0.4) / 2)
    loss, slope = loss_and_slope(GMPOLoss(), new, old, tensor([2.0, -3.0]), mask)
    assert loss == close((-2 * above + 3 * below) / 2)
    assert_close(slope, tensor([3 * below, -2 * above]) / 4)


def test_gmpo_never_pays_more_than_without_its_clip():
    for seed in range(5):
        logprobs, old, _, mask = random_batch(seed, scale=1.0)
        advantages = random_batch(seed + 9)[0] + 1  # of either sign within a sequence
        clipped = GMPOLoss()(logprobs, old, advantages, mask).loss
        free = GMPOLoss(clip_log_ratio_low=99.0, clip_log_ratio_high=99.0)(logprobs, old, advantages, mask).loss
        assert clipped > free
        unclipped = GSPOLoss(clip_eps_low=1.0, clip_eps_high=1e9)(logprobs, old, advantages, mask).loss
        assert float(free) == close(float(unclipped))


def test_gmpo_of_single_tokens_is_grpo_with_its_range():
    logprobs, old, advantages, mask = (x[:, :1] if x.ndim == 2 else x for x in random_batch(rows=30, scale=1.0))
    grpo = GRPOLoss(clip_eps_low=1 - math.exp(-0.4), clip_eps_high=math.exp(0.4) - 1)
    assert_same(GMPOLoss(), grpo, logprobs, old, advantages, mask)


def test_gmpo_bounds_its_mean():
    loss_fn = GMPOLoss(max_log_ratio=2.0)
    loss, slope = loss_and_slope(loss_fn, LOGPROBS + 5, LOGPROBS, -ADVANTAGES.abs(), RAGGED)
    assert loss == close((1 + 2) * math.exp(2) / 2)
    assert not slope.any()


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["clip_log_ratio_low", "clip_log_ratio_high"])
def test_a_range_of_gmpo_holds_0(name):
    assert_raises("gmpo", {name: -0.4}, rf"GMPOLoss: {name} must be a number in \[0, inf\]")


def test_luspo_is_gspo_times_length():
    logprobs, old, advantages, mask = random_batch()
    options: dict[str, Any] = NARROW | {"dual_clip": 1.3}
    loss, slope = loss_and_slope(LUSPOLoss(**options), logprobs, old, advantages, mask)
    lengths = mask.sum(-1)
    same, same_slope = loss_and_slope(GSPOLoss(**options), logprobs, old, advantages * lengths, mask)
    assert loss == close(same)
    assert_close(slope, same_slope)


def test_a_token_of_luspo_moves_alike_whatever_the_length():
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    logprobs = -torch.ones(2, 4, dtype=torch.float64)
    for loss_fn, of_long in ((LUSPOLoss(), 1), (GSPOLoss(), 1 / 4)):
        slope = loss_and_slope(loss_fn, logprobs, None, tensor(1.0, 1.0), mask)[1]
        assert_close(slope, -torch.where(mask, tensor([1.0], [of_long]), 0) / 2)


# the published hyperparameters

DEFAULTS = {
    "a2c": {"entropy_coef": 0.01, "kl_coef": 0.0},
    "tis": {"ratio_level": "sequence", "ratio_min": 0.0, "ratio_max": 1.0},
    "topr": {"positive_min": 1.0, "positive_max": 1.0, "negative_min": 0.0, "negative_max": 1.0},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gspo_token": {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "dual_clip": None},
    "gmpo": {"clip_log_ratio_low": 0.4, "clip_log_ratio_high": 0.4},
    "luspo": {"clip_eps_low": 2e-3, "clip_eps_high": 2.5e-3, "dual_clip": None},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_papers(name):
    loss_fn = rlloss.get_loss(name)
    assert {k: getattr(loss_fn, k) for k in DEFAULTS[name]} == DEFAULTS[name]


# two-sided clipping

OTHER_NAMES = {"A3C": "a2c", "geo_mean": "gmpo", "GSPO-token": "gspo_token", "Truncated importance sampling": "tis"}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_find_them(name):
    assert rlloss.registry.loss_name(name) == OTHER_NAMES[name]


def two_sided(r, advantage, eps_low, eps_high, delta):
    """The two-sided clip of INTELLECT-2, as TRL has it: the objective of a token."""
    return torch.minimum(r.clamp(max=delta) * advantage, r.clamp(1 - eps_low, 1 + eps_high) * advantage)


@pytest.mark.parametrize("delta", [1.5, 4.0])
@pytest.mark.parametrize("loss_fn", [PPOLoss, GRPOLoss])
def test_the_two_sided_clip_is_the_dual_clip(loss_fn, delta):
    # a grid of ratios to both sides of every bound, for either sign
    r = torch.linspace(0.0511, 6.0, 120, dtype=torch.float64).repeat(3)[:, None]
    advantages = torch.tensor([1.7, -0.9, 0.0], dtype=torch.float64).repeat_interleave(120)
    logprobs = r.log().requires_grad_()
    expected = -two_sided(logprobs.exp(), advantages[:, None], 0.2, 0.3, delta).mean()
    dual = loss_fn(clip_eps_low=0.2, clip_eps_high=0.3, dual_clip=delta)
    loss, slope = loss_and_slope(dual, r.log(), 0 * r, advantages, r > 0)
    assert loss == close(expected.item())
    assert_close(slope, torch.autograd.grad(expected, logprobs)[0])


def test_the_two_sided_clip_is_another_below_the_range():
    r, advantages = tensor([1.25]), tensor(-1.0)
    loss = float(PPOLoss(clip_eps_high=0.3, dual_clip=1.1)(r.log(), 0 * r, advantages, r > 0).loss)
    assert loss == close(1.1)
    assert float(-two_sided(r, advantages, 0.2, 0.3, 1.1)) == close(1.25)
