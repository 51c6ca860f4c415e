"""Policy losses against arithmetic done by hand, and the identities between them."""

import math
from typing import Any

import pytest
import torch

from rlloss import (
    ConservativePPOLoss,
    DAPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    scalars,
)

EVERY = torch.ones(2, 2, dtype=torch.bool)
RAGGED = torch.tensor([[True, True], [True, False]])
ZEROS = torch.zeros(2, 2, dtype=torch.float64)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def logs(*rows):
    """Log-probs whose ratios to old log-probs of 0 are given."""
    return tensor(*rows).log()


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def loss_and_slope(loss_fn, logprobs, *inputs, **extra):
    leaf = logprobs.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


# ratios of 1.5 and 0.5 to old log-probs of 0

RATIOS = logs([1.5, 0.5], [1.5, 0.5])
ADVANTAGES = tensor(2.0, -1.0)
# the clip to [0.8, 1.3] binds at 1.5 for A > 0 and at 0.5 for A < 0
CLIP: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
TERMS = tensor([-1.3 * 2, -0.5 * 2], [1.5, 0.8])
SLOPES = tensor([0.0, -0.5 * 2], [1.5, 0.0])


@pytest.mark.parametrize(
    ("loss_fn", "mask", "divisors"),
    [
        (GRPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (GRPOLoss(**CLIP), RAGGED, [[4, 4], [2, math.inf]]),  # 2 sequences of 2 tokens and of 1
        (DrGRPOLoss(**CLIP, max_completion_length=5), EVERY, [[10, 10], [10, 10]]),  # 2 sequences, C = 5
        (DrGRPOLoss(**CLIP, max_completion_length=5), RAGGED, [[10, 10], [10, math.inf]]),
        (PPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (PPOLoss(**CLIP), RAGGED, [[3, 3], [3, math.inf]]),  # 3 tokens
        (DAPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (DAPOLoss(**CLIP), RAGGED, [[3, 3], [3, math.inf]]),
        (ConservativePPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (ConservativePPOLoss(**CLIP), RAGGED, [[3, 3], [3, math.inf]]),
    ],
)
def test_clipped_losses_by_hand(loss_fn, mask, divisors):
    extra = {"ref_logprobs": RATIOS} if loss_fn.needs_reference else {}  # at the reference the hinge is 0
    loss, slope = loss_and_slope(loss_fn, RATIOS, ZEROS, ADVANTAGES, mask, **extra)
    assert loss == close(float((TERMS / tensor(*divisors)).sum()))
    assert_close(slope, SLOPES / tensor(*divisors))


@pytest.mark.parametrize("loss", [PPOLoss, GRPOLoss, RLOOLoss])
@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "value", "slope"),
    [
        (1.1, 2.0, None, -1.1 * 2, -1.1 * 2),  # within [0.8, 1.2] it is -r A, of slope -r A
        (0.9, -2.0, None, 0.9 * 2, 0.9 * 2),
        (1.5, 2.0, None, -1.2 * 2, 0.0),  # good and grown: cut
        (1.5, -2.0, None, 1.5 * 2, 1.5 * 2),  # bad and grown: not cut
        (0.5, 2.0, None, -0.5 * 2, -0.5 * 2),  # good and shrunk: not cut
        (0.5, -2.0, None, 0.8 * 2, 0.0),  # bad and shrunk: cut
        (4.0, -2.0, 3.0, 3 * 2, 0.0),  # bad and grown beyond the dual clip: cut
        (2.0, -2.0, 3.0, 2 * 2, 2 * 2),
        (0.5, -2.0, 3.0, 0.8 * 2, 0.0),
        (4.0, 2.0, 3.0, -1.2 * 2, 0.0),
        (0.5, 2.0, 3.0, -0.5 * 2, -0.5 * 2),
    ],
)
def test_clip_on_each_side_and_sign_by_hand(loss, ratio, advantage, dual_clip, value, slope):
    loss_fn = loss(dual_clip=dual_clip)
    inputs = (logs([ratio]), ZEROS[:1, :1], tensor(advantage), EVERY[:1, :1])
    assert loss_and_slope(loss_fn, *inputs) == (close(value), close(slope))
    assert scalars(loss_fn(*inputs).metrics)["clip_frac"] == float(slope == 0)


def test_dapo_leaves_more_room_above():
    # ratios 1.25, 1.5 and 0.5: 1.25 is within 1.28 but not within PPO's 1.2; below both end at 0.8
    inputs = (logs([1.25, 1.5, 0.5]), tensor([0.0] * 3), tensor([1.0, 1.0, -1.0]), torch.ones(1, 3, dtype=torch.bool))
    loss, slope = loss_and_slope(DAPOLoss(), *inputs)
    assert loss == close((-1.25 - 1.28 + 0.8) / 3)
    assert_close(slope, tensor([-1.25 / 3, 0.0, 0.0]))
    loss, slope = loss_and_slope(PPOLoss(), *inputs)
    assert loss == close((-1.2 - 1.2 + 0.8) / 3)
    assert not slope.any()


def test_policy_metrics_by_hand():
    ref = RATIOS - tensor([1.0, 1.0], [1.0, 0.0])
    metrics = scalars(
        GRPOLoss(**CLIP)(RATIOS, ZEROS, ADVANTAGES, RAGGED, ref_logprobs=ref, entropy=ZEROS + 0.5).metrics
    )
    mean = (1.5 + 0.5 + 1.5) / 3
    assert metrics == {
        "ratio": close(mean),
        "ratio_std": close(math.sqrt((2 * (1.5 - mean) ** 2 + (0.5 - mean) ** 2) / 3)),
        "ratio_max": close(1.5),
        "ratio_min": close(0.5),
        # k3 of KL(old||pi): r - 1 - log r
        "approx_kl": close((2 * (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))) / 3),
        "bounded_frac": 0.0,
        "ref_kl": close(math.exp(-1)),  # k3 at log(pi/ref) = 1: e^-1 - 1 + 1
        "ref_kl_seq": close(3 * math.exp(-1) / 2),
        "entropy": close(0.5),
        "clip_frac": close(1 / 3),  # 1.5 with A = 2; 1.5 with A = -1 moves back to the range
    }


# whole answers


def test_reinforce_by_hand():
    logprobs = tensor([-1.0, -2.0], [-6.0, -9.0])
    for old in (None, ZEROS, logprobs + 3):  # no ratio: old log-probs do not enter
        # (2 * (1 + 2) - 0.5 * 6) / 2
        loss, slope = loss_and_slope(REINFORCELoss(), logprobs, old, tensor(2.0, -0.5), RAGGED)
        assert loss == close(1.5)
        assert_close(slope, tensor([-1.0, -1.0], [0.25, 0.0]))
    # weights: (2 * 2 * 1 + 0 - 3 * 0.5 * 6) / 2
    weights = tensor([2.0, 0.0], [3.0, 1.0])
    loss, slope = loss_and_slope(REINFORCELoss(), logprobs, None, tensor(2.0, -0.5), RAGGED, token_weights=weights)
    assert loss == close(-2.5)
    assert_close(slope, tensor([-2.0, 0.0], [0.75, 0.0]))
    # one advantage per token: (1 * 1 + 2 * 2 - 1 * 6) / 2
    loss, slope = loss_and_slope(REINFORCELoss(), logprobs, None, tensor([1.0, 2.0], [-1.0, 5.0]), RAGGED)
    assert loss == close(-0.5)
    assert_close(slope, tensor([-0.5, -1.0], [0.5, 0.0]))


def test_reinforce_reports_the_ratio_that_it_does_not_use():
    metrics = scalars(REINFORCELoss()(RATIOS, ZEROS, ADVANTAGES, RAGGED).metrics)
    assert metrics["ratio"] == close(3.5 / 3)
    assert "clip_frac" not in metrics


def test_rloo_by_hand():
    # the ratios of the answers are 1.5 * 0.5 = 0.75 and 1.5: (-4 * 0.75 + 1 * 1.5) / 2; every token has the slope of
    # its whole answer, whatever the length
    loss_fn, inputs = RLOOLoss(**CLIP), (RATIOS, ZEROS, tensor(4.0, -1.0), RAGGED)
    loss, slope = loss_and_slope(loss_fn, *inputs)
    assert loss == close(-0.75)
    assert_close(slope, tensor([-1.5, -1.5], [0.75, 0.0]))
    metrics = scalars(loss_fn(*inputs).metrics)
    assert metrics["ratio"] == close((0.75 + 0.75 + 1.5) / 3)
    assert metrics["clip_frac"] == 0


def test_rloo_clips_a_whole_answer():
    # 1.25 * 1.2 = 1.5 > 1.3, though each token is within: no token keeps a gradient
    loss_fn, inputs = RLOOLoss(**CLIP), (logs([1.25, 1.2]), ZEROS[:1], tensor(1.0), EVERY[:1])
    loss, slope = loss_and_slope(loss_fn, *inputs)
    assert loss == close(-1.3)
    assert not slope.any()
    assert scalars(loss_fn(*inputs).metrics)["clip_frac"] == 1
    # 1.5 * 0.8 = 1.2 is within, though the first token alone is not
    loss, slope = loss_and_slope(loss_fn, logs([1.5, 0.8]), *inputs[1:])
    assert loss == close(-1.2)
    assert_close(slope, tensor([-1.2, -1.2]))


def test_rloo_takes_the_mean_of_an_answers_advantages():
    # r = 1.1 with A = 1 and 3: -1.1 * 2
    inputs = (logs([1.1, 1.0]), ZEROS[:1], tensor([1.0, 3.0]), EVERY[:1])
    loss, slope = loss_and_slope(RLOOLoss(), *inputs)
    assert loss == close(-2.2)
    assert_close(slope, tensor([-2.2, -2.2]))


def test_gspo_by_hand():
    # the geometric means are sqrt(1.5 * 0.5) = 0.866, inside the range, and 1.5 for the single token
    s = math.sqrt(0.75)
    loss, slope = loss_and_slope(GSPOLoss(**CLIP), RATIOS, ZEROS, ADVANTAGES, RAGGED)
    assert loss == close((-2 * s + 1.5) / 2)
    assert_close(slope, tensor([-2 * s / 4, -2 * s / 4], [1.5 / 2, 0.0]))


def test_gspo_clips_a_whole_sequence():
    # s = sqrt(2 * 1) = 1.414 > 1.3: the token at ratio 1 has no gradient either
    loss_fn = GSPOLoss(**CLIP)
    loss, slope = loss_and_slope(loss_fn, logs([2.0, 1.0]), ZEROS[:1], tensor(1.0), EVERY[:1])
    assert loss == close(-1.3)
    assert not slope.any()
    metrics = scalars(loss_fn(logs([2.0, 1.0]), ZEROS[:1], tensor(1.0), EVERY[:1]).metrics)
    assert metrics["clip_frac"] == 1
    assert metrics["ratio"] == close(math.sqrt(2))


# the hinge of conservative PPO


def test_conservative_ppo_by_hand():
    # at A = 0 only the hinge is left; k2 = 1/2 * (1^2, 2^2, 3^2) and r = 1, so that KL = (0.5 + 2 + 4.5) / 3 = 7/3
    ref = -tensor([1.0, 2.0], [3.0, 9.0])
    inputs = (ZEROS, ZEROS, ZEROS, RAGGED)
    batch = ConservativePPOLoss(conservative_coef=0.3, max_kl=1.0, kl="k2")
    loss, slope = loss_and_slope(batch, *inputs, ref_logprobs=ref)
    assert loss == close(0.3 * (4 / 3) ** 2)
    assert_close(slope, 2 * 0.3 * (4 / 3) * tensor([1.0, 2.0], [3.0, 0.0]) / 3)
    hinge_metrics = batch(*inputs, ref_logprobs=ref).metrics
    assert hinge_metrics["kl_penalty"].count == 3  # tokens
    metrics = scalars(hinge_metrics)
    assert metrics["kl_violation"] == close(4 / 3)
    assert metrics["kl_penalty"] == close(0.3 * (4 / 3) ** 2)
    assert metrics["max_kl"] == 1

    # per sequence: KL = 1.25 and 4.5, so that the violations are 0.25 and 3.5
    sequence = ConservativePPOLoss(conservative_coef=0.3, max_kl=1.0, kl="k2", level="sequence")
    loss, slope = loss_and_slope(sequence, *inputs, ref_logprobs=ref)
    assert loss == close(0.3 * (0.25**2 + 3.5**2) / 2)
    assert_close(slope, 2 * 0.3 * tensor([0.25 * 1 / 4, 0.25 * 2 / 4], [3.5 * 3 / 2, 0.0]))
    assert scalars(sequence(*inputs, ref_logprobs=ref).metrics)["kl_violation"] == close(1.875)


def test_conservative_ppo_takes_the_steps_kl_as_a_number():
    # A = 0 and at the reference: the hinge of the kl that is given, not rounded to float32 on its way
    loss_fn = ConservativePPOLoss(conservative_coef=0.3, max_kl=0.02)
    assert loss_fn(ZEROS, ZEROS, ZEROS, RAGGED, ref_logprobs=ZEROS, kl=0.1).loss == close(0.3 * 0.08**2)


# KL and entropy terms stand under their loss's reduction: what one nat per token costs for two answers of two tokens

PER_NAT = [
    (PPOLoss, {}, 1.0),
    (DAPOLoss, {}, 1.0),
    (REINFORCELoss, {}, 2.0),  # the sum over an answer
    (RLOOLoss, {}, 1.0),
    (GRPOLoss, {}, 1.0),
    (DrGRPOLoss, {"max_completion_length": 8}, 2 / 8),
    (GSPOLoss, {}, 1.0),
]


@pytest.mark.parametrize(("loss", "options", "per_nat"), PER_NAT)
@pytest.mark.parametrize("coefficient", [0.5, 2.0])
def test_kl_term_by_hand(loss, options, per_nat, coefficient):
    # at A = 0 and r = 1: k3 = e^-2 + 1 for every token, of slope r (l - ref) = 2
    loss_fn = loss(kl_coef=coefficient, **options)
    value, slope = loss_and_slope(loss_fn, ZEROS, ZEROS, ADVANTAGES * 0, EVERY, ref_logprobs=ZEROS - 2)
    assert value == close(coefficient * per_nat * (math.exp(-2) + 1))
    assert_close(slope, ZEROS + coefficient * per_nat * 2 / 4)


@pytest.mark.parametrize(("loss", "options", "per_nat"), PER_NAT)
def test_the_entropy_bonus_by_hand(loss, options, per_nat):
    # weight 0 takes the surrogate away and leaves the bonus: entropies 1, 3, 2 and 2 have the mean 2
    entropy = tensor([1.0, 3.0], [2.0, 2.0]).requires_grad_()
    loss_fn = loss(entropy_coef=0.25, **options)
    out = loss_fn(ZEROS - 1, ZEROS, ADVANTAGES, EVERY, entropy=entropy, token_weights=ZEROS)
    assert out.loss.item() == close(-0.25 * per_nat * 2)
    assert_close(torch.autograd.grad(out.loss, entropy)[0], ZEROS - 0.25 * per_nat / 4)
    assert scalars(out.metrics)["entropy"] == 2


def test_ppo_adds_its_entropy_bonus_to_its_surrogate():
    # 3 tokens: surrogate (-2.6 - 1 + 1.5) / 3, entropy (1 + 3 + 2) / 3
    entropy = tensor([1.0, 3.0], [2.0, 9.0])
    loss = PPOLoss(**CLIP, entropy_coef=0.1)(RATIOS, ZEROS, ADVANTAGES, RAGGED, entropy=entropy).loss
    assert loss == close(-2.1 / 3 - 0.1 * 2)


# identities


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TERMS_OF_ALL: dict[str, Any] = {"kl_coef": 0.2, "entropy_coef": 0.1}
TOKENS = {"ref_logprobs": draws(4, 6, seed=3), "entropy": draws(4, 6, seed=4), "token_weights": draws(4, 6, seed=5)}
FULL = torch.ones(4, 6, dtype=torch.bool)
HOLED = draws(4, 6, seed=6) > -0.5


def assert_same(left, right, mask):
    inputs = (draws(4, 6), draws(4, 6, seed=1), draws(4, seed=2), mask)
    loss, slope = loss_and_slope(left, *inputs, **TOKENS)
    same_loss, same_slope = loss_and_slope(right, *inputs, **TOKENS)
    assert loss == close(same_loss)
    assert_close(slope, same_slope)


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_equal_lengths_make_ppo_grpo_and_dr_grpo_one(dual_clip):
    grpo = GRPOLoss(dual_clip=dual_clip, **TERMS_OF_ALL)
    assert_same(PPOLoss(dual_clip=dual_clip, **TERMS_OF_ALL), grpo, FULL)
    assert_same(DrGRPOLoss(max_completion_length=6, dual_clip=dual_clip, **TERMS_OF_ALL), grpo, FULL)


def test_dapo_is_ppo_with_more_room_above():
    assert_same(DAPOLoss(**TERMS_OF_ALL), PPOLoss(clip_eps_low=0.2, clip_eps_high=0.28, **TERMS_OF_ALL), HOLED)


def test_conservative_ppo_below_its_limit_is_ppo():
    assert_same(ConservativePPOLoss(conservative_coef=9.0, max_kl=50.0, **CLIP), PPOLoss(**CLIP), HOLED)


@pytest.mark.parametrize("sequence_level", [GSPOLoss, RLOOLoss])
def test_a_sequence_of_one_token_is_a_token(sequence_level):
    inputs = (draws(8, 1), draws(8, 1, seed=1), draws(8, seed=2), torch.ones(8, 1, dtype=torch.bool))
    loss, slope = loss_and_slope(GRPOLoss(**CLIP), *inputs)
    same_loss, same_slope = loss_and_slope(sequence_level(**CLIP), *inputs)
    assert loss == close(same_loss)
    assert_close(slope, same_slope)


def test_rloo_on_policy_has_the_slope_of_reinforce():
    logprobs, advantages = draws(4, 6), draws(4, seed=1)
    _, slope = loss_and_slope(RLOOLoss(), logprobs, None, advantages, HOLED)
    _, same = loss_and_slope(REINFORCELoss(), logprobs, None, advantages, HOLED)
    assert_close(slope, same)
    assert slope.any()
