"""The specification against arithmetic done by hand: nothing here is computed the way that the code computes it."""

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlloss.reference as reference
from rlloss.reference import (
    conservative_ppo,
    dpo,
    dr_grpo,
    group_advantages,
    grpo,
    gspo,
    kl,
    kl_k1,
    kl_k2,
    kl_k3,
    linear_stats,
    policy_metrics,
    sft,
    token_stats,
)

NAN, INF, LOG2 = math.nan, math.inf, math.log(2)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def logs(ratios):
    """Log-probs whose ratio to an old log-prob of 0 is given."""
    return [[math.log(r) for r in row] for row in ratios]


def slope(f, x, h=1e-6):
    return (f(x + h) - f(x - h)) / (2 * h)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 2.75),  # (1 + 2 + 3 + 5) / 4
        ("sequence_mean", 3.5),  # (6 / 3 + 5 / 1) / 2
        ("sequence_sum", 5.5),  # (6 + 5) / 2
        ("fixed_length", 1.375),  # (6 + 5) / (2 * 4)
        ("sum", 11.0),
    ],
)
def test_sft_reductions_by_hand(reduction, expected):
    # the third row holds no token: it is not a sequence
    logprobs = [[-1.0, -2.0, -3.0], [-5.0, NAN, 9.0], [NAN, 1.0, 1.0]]
    mask = [[True, True, True], [True, False, False], [False, False, False]]
    assert sft(logprobs, mask, reduction=reduction, max_completion_length=4) == close(expected)


def test_sft_weights_scale_the_numerator_only():
    # (2 * 1 + 0 + 1 * 3 + 0.5 * 5) / 4 = 7.5 / 4; weight 0 rejects even an infinite or NaN token
    weights = [[2.0, 0.0, 1.0], [0.5, 7.0, 7.0]]
    mask = [[True, True, True], [True, False, False]]
    for rejected in (-2.0, -INF, NAN):
        logprobs = [[-1.0, rejected, -3.0], [-5.0, 0.0, 0.0]]
        assert sft(logprobs, mask, token_weights=weights) == close(1.875)


def test_sft_rejects_what_it_cannot_reduce():
    with pytest.raises(ValueError, match="max_completion_length, got None"):
        sft([[-1.0]], [[True]], reduction="fixed_length")
    with pytest.raises(ValueError, match="must be one of token_mean"):
        sft([[-1.0]], [[True]], reduction="mean")
    with pytest.raises(ValueError, match=r"or \[N\] with cu_seqlens"):
        sft([-1.0, -2.0], [True, True])


# policy losses: two answers, of two and of one token
#   ratios    1.1  1.5   with A = +2:  -1.1 * 2 = -2.2   and, cut at 1.2, -1.2 * 2 = -2.4
#   ratio     0.5        with A = -1:   max(0.5, 0.8) = 0.8

TWO = logs([[1.1, 1.5], [0.5, 1.0]])
TWO_OLD = [[0.0, 0.0], [0.0, 0.0]]
TWO_MASK = [[True, True], [True, False]]


def test_grpo_is_a_mean_of_means():
    # ((-2.2 - 2.4) / 2 + 0.8 / 1) / 2 = (-2.3 + 0.8) / 2
    assert grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK) == close(-0.75)


def test_grpo_per_token_advantages():
    # A = (+2, -1): -2.2 and, as a bad token that grew is not cut, +1.5; row mean -0.35; then (-0.35 + 0.8) / 2
    assert grpo(TWO, TWO_OLD, [[2.0, -1.0], [-1.0, NAN]], TWO_MASK) == close(0.225)


def test_grpo_clip_bounds_are_separate():
    # [0.6, 1.05]: ((-1.05 * 2 - 1.05 * 2) / 2 + 0.6) / 2 = (-2.1 + 0.6) / 2
    assert grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_low=0.4, clip_eps_high=0.05) == close(-0.75)
    # [0.9, 1.4]: ((-2.2 - 2.8) / 2 + 0.9) / 2 = (-2.5 + 0.9) / 2
    assert grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_low=0.1, clip_eps_high=0.4) == close(-0.8)


def test_grpo_dual_clip_bounds_the_loss_of_a_bad_token():
    # A = -2: ratios 5, 2, 0.5 cost 10, 4 and 0.8 * 2 = 1.6; a dual clip of 3 lowers the first to 3 * 2 = 6
    new, old, mask = logs([[5.0, 2.0, 0.5]]), [[0.0] * 3], [[True] * 3]
    assert grpo(new, old, [-2.0], mask) == close(15.6 / 3)
    assert grpo(new, old, [-2.0], mask, dual_clip=3.0) == close(11.6 / 3)
    # A = +2 is untouched: -1.2 * 2, -1.2 * 2, -0.5 * 2
    assert grpo(new, old, [2.0], mask, dual_clip=3.0) == close(-5.8 / 3)


def test_grpo_weights_leave_the_denominator_and_the_entropy_alone():
    # surrogate: ((0 - 2.4) / 2 + 3 * 0.8) / 2 = (-1.2 + 2.4) / 2 = 0.6, whatever stands under weight 0
    # entropy bonus, unweighted: 0.1 * ((1 + 3) / 2 + 4) / 2 = 0.3
    weights, entropy = [[0.0, 1.0], [3.0, 1.0]], [[1.0, 3.0], [4.0, NAN]]
    for rejected in (0.0, INF, NAN):
        new = [[rejected, TWO[0][1]], TWO[1]]
        assert grpo(new, TWO_OLD, [2.0, -1.0], TWO_MASK, token_weights=weights) == close(0.6)
        loss = grpo(new, TWO_OLD, [2.0, -1.0], TWO_MASK, token_weights=weights, entropy=entropy, entropy_coef=0.1)
        assert loss == close(0.3)


@pytest.mark.parametrize(
    ("estimator", "kl_grad", "expected"),
    [
        # r = 1.5, log(pi / ref) = log 2, ref / pi = 1 / 2
        ("k1", "reverse", 1.5 * LOG2),
        ("k2", "reverse", 1.5 * LOG2**2 / 2),
        ("k3", "reverse", 1.5 * (0.5 - 1 + LOG2)),
        ("k3", "forward", 1.5 * (0.5 - 1 + LOG2)),
        ("k2", "literal", LOG2**2 / 2),
        ("k3", "literal", 0.5 - 1 + LOG2),
    ],
)
def test_grpo_kl_term_by_hand(estimator, kl_grad, expected):
    # surrogate of A = -1: 1.5; weight 2 scales the KL as well: 2 * (1.5 + 0.1 * kl)
    new, ref = logs([[1.5]]), logs([[0.75]])
    options = {"ref_logprobs": ref, "kl_coef": 0.1, "kl": estimator, "kl_grad": kl_grad}
    loss = grpo(new, [[0.0]], [-1.0], [[True]], token_weights=[[2.0]], **options)
    assert loss == close(2 * (1.5 + 0.1 * expected))


@pytest.mark.parametrize(
    ("estimator", "kl_grad"),
    [("k1", "literal"), ("k1", "forward"), ("k2", "forward"), ("k4", "reverse"), ("k3", "backward")],
)
def test_unsound_kl_raises(estimator, kl_grad):
    with pytest.raises(ValueError, match="is not sound"):
        grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, kl=estimator, kl_grad=kl_grad)


def test_missing_inputs_raise():
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs ref_logprobs"):
        grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef=0.1 needs entropy"):
        grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, entropy_coef=0.1)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        conservative_ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK)
    with pytest.raises(ValueError, match="level must be"):
        conservative_ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, ref_logprobs=TWO, level="token")
    with pytest.raises(ValueError, match="ratio_level must be"):
        policy_metrics(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_low=0.2, clip_eps_high=0.2, ratio_level="batch")


def test_log_ratios_are_bounded_before_exp():
    # A = -1 makes the loss the ratio itself: e^20 above, the clip's 0.8 below
    assert grpo([[100.0]], [[0.0]], [-1.0], [[True]]) == close(math.exp(20))
    assert grpo([[-100.0]], [[0.0]], [-1.0], [[True]]) == close(0.8)
    assert grpo([[100.0]], [[0.0]], [-1.0], [[True]], max_log_ratio=3.0) == close(math.exp(3))
    # A = 0 leaves the KL: k3 of log(ref / pi) = 100 is cut to 20, of -100 to -20; r = e^-20
    for ref, k3 in ((100.0, math.exp(20) - 21), (-100.0, math.exp(-20) + 19)):
        options = {"ref_logprobs": [[ref]], "kl_coef": 1.0}
        assert grpo([[0.0]], [[0.0]], [0.0], [[True]], kl_grad="literal", **options) == close(k3)
        assert grpo([[0.0]], [[70.0]], [0.0], [[True]], **options) == close(math.exp(-20) * k3)
    # gspo bounds the mean: (100 - 10) / 2 = 45 is cut to 20, (100 - 98) / 2 = 1 is not
    assert gspo([[100.0, -10.0]], [[0.0, 0.0]], [-1.0], [[True, True]]) == close(math.exp(20))
    assert gspo([[100.0, -98.0]], [[0.0, 0.0]], [-1.0], [[True, True]]) == close(math.e)


def test_dr_grpo_divides_by_a_constant():
    # (-2.2 - 2.4 + 0.8) / (2 * 4)
    assert dr_grpo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, max_completion_length=4) == close(-0.475)
    # an answer without tokens is no sequence: (-2.2 - 2.4) / (1 * 10)
    one = [[True, True], [False, False]]
    assert dr_grpo(TWO, TWO_OLD, [2.0, -1.0], one, max_completion_length=10) == close(-0.46)


def test_dr_grpo_is_grpo_when_every_answer_has_full_length():
    rng = np.random.default_rng(0)
    new, old, mask = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), np.ones((3, 5), bool)
    advantages = [1.0, -2.0, 0.5]
    expected = grpo(new, old, advantages, mask)
    assert dr_grpo(new, old, advantages, mask, max_completion_length=5) == close(expected)
    mask[1, 3:] = False
    assert dr_grpo(new, old, advantages, mask, max_completion_length=5) != close(expected)


def test_gspo_ratio_is_a_geometric_mean():
    # ratios 2 and 8: sqrt(16) = 4 for both tokens; A = -1 costs 4
    new, old, mask = logs([[2.0, 8.0]]), [[0.0, 0.0]], [[True, True]]
    assert gspo(new, old, [-1.0], mask) == close(4.0)
    # per-token advantages -1 and +1, cut above at 1.5: (4 - 1.5) / 2
    assert gspo(new, old, [[-1.0, 1.0]], mask, clip_eps_high=0.5) == close(1.25)
    # only counted tokens enter the mean: the ratio is 2
    assert gspo(new, old, [-1.0], [[True, False]]) == close(2.0)
    # lengths 2 and 1: (4 + 3) / 2
    longer = logs([[2.0, 8.0], [3.0, 1.0]])
    assert gspo(longer, TWO_OLD, [-1.0, -1.0], TWO_MASK) == close(3.5)


def test_gspo_default_clip_is_that_of_the_paper():
    # [1 - 3e-4, 1 + 4e-4]
    assert gspo(logs([[1.01]]), [[0.0]], [1.0], [[True]]) == close(-1.0004)
    assert gspo(logs([[0.99]]), [[0.0]], [-1.0], [[True]]) == close(0.9997)
    assert gspo(logs([[1.0002]]), [[0.0]], [1.0], [[True]]) == close(-1.0002)


def test_gspo_kl_keeps_the_token_ratio():
    # A = 0 leaves r_t * k1_t with token ratios 2 and 8, against a reference at the old policy: 2 log 2, 8 log 8
    new, old, mask = logs([[2.0, 8.0]]), [[0.0, 0.0]], [[True, True]]
    loss = gspo(new, old, [0.0], mask, ref_logprobs=old, kl_coef=1.0, kl="k1")
    assert loss == close((2 * LOG2 + 8 * 3 * LOG2) / 2)


def test_conservative_ppo_penalty_by_hand():
    # surrogate (-2.2 - 2.4 + 0.8) / 3; literal k2 with log(pi / ref) = 2, 0 and 0.4: 2, 0 and 0.08
    ref = [[TWO[0][0] - 2.0, TWO[0][1]], [TWO[1][0] - 0.4, NAN]]
    options = {"ref_logprobs": ref, "kl": "k2", "kl_grad": "literal", "conservative_coef": 0.5}
    surrogate = -3.8 / 3
    # batch: mean 2.08 / 3, threshold 0.1; sequences: means 1 and 0.08 with hinges 0.9 and 0
    batch = conservative_ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, max_kl=0.1, **options)
    assert batch == close(surrogate + 0.5 * (2.08 / 3 - 0.1) ** 2)
    sequence = conservative_ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, max_kl=0.1, level="sequence", **options)
    assert sequence == close(surrogate + 0.5 * (0.9**2 + 0.0) / 2)
    # below the threshold there is no penalty
    assert conservative_ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, max_kl=1.0, **options) == close(surrogate)


def test_conservative_ppo_defaults_and_weights():
    # r = 1, k3 with ref / pi = 2: KL = 2 - 1 - log 2; weight 0 takes the surrogate, not the penalty
    penalty = 0.1 * (1 - LOG2 - 0.01) ** 2
    one = {"old_logprobs": [[0.0]], "advantages": [1.0], "loss_mask": [[True]], "ref_logprobs": [[LOG2]]}
    assert conservative_ppo([[0.0]], **one) == close(-1 + penalty)
    assert conservative_ppo([[0.0]], token_weights=[[0.0]], **one) == close(penalty)
    # off-policy the KL carries the ratio: r = 2, ref / pi = 1
    assert conservative_ppo([[LOG2]], **one) == close(-1.2)
    # r = 2, ref / pi = 2: KL = 2 (1 - log 2)
    one["ref_logprobs"] = [[2 * LOG2]]
    assert conservative_ppo([[LOG2]], **one) == close(-1.2 + 0.1 * (2 - 2 * LOG2 - 0.01) ** 2)


def test_policy_metrics_by_hand():
    # tokens: r = 1.5 (A > 0, cut), 0.5 (A > 0, not cut), 0.5 (A < 0, cut), 1.5 (A < 0, not cut)
    new = logs([[1.5, 0.5], [0.5, 1.5]])
    metrics = policy_metrics(
        new,
        [[0.0, 0.0], [0.0, 0.0]],
        [1.0, -1.0],
        [[True, True], [True, True]],
        ref_logprobs=[[math.log(3), new[0][1]], new[1]],
        entropy=[[1.0, 2.0], [3.0, 6.0]],
        clip_eps_low=0.2,
        clip_eps_high=0.2,
    )
    assert metrics == {
        "clip_frac": close(0.5),
        "ratio": close(1.0),  # (1.5 + 0.5 + 0.5 + 1.5) / 4
        "approx_kl": close((0 - math.log(1.5) - math.log(0.5)) / 2),  # r - 1 - log r, twice each; the r - 1 cancel
        "bounded_frac": 0.0,
        "ref_kl": close((1 - LOG2) / 4),  # ref / pi = 2 at the first token, 1 elsewhere
        "entropy": close(3.0),
    }


def test_policy_metrics_dual_clip_bound_and_sequence_ratio():
    clip: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}
    # A < 0 with ratios 4 and 2: a dual clip of 3 binds on the first only
    new, old, mask = logs([[4.0, 2.0]]), [[0.0, 0.0]], [[True, True]]
    assert policy_metrics(new, old, [-1.0], mask, **clip)["clip_frac"] == 0.0
    assert policy_metrics(new, old, [-1.0], mask, dual_clip=3.0, **clip)["clip_frac"] == 0.5
    # as a sequence both tokens have sqrt(4 * 2); approx_kl stays per token: (4 - 1 - log 4 + 2 - 1 - log 2) / 2
    metrics = policy_metrics(new, old, [1.0], mask, ratio_level="sequence", **clip)
    assert metrics["ratio"] == close(math.sqrt(8))
    assert metrics["clip_frac"] == 1.0
    assert metrics["approx_kl"] == close((4 - 3 * LOG2) / 2)
    # 21 nats are beyond the bound of 20: the ratio is e^20
    metrics = policy_metrics([[21.0, -20.0, 0.0, -21.0]], [[0.0] * 4], [1.0], [[True] * 4], **clip)
    assert metrics["bounded_frac"] == 0.5
    assert metrics["ratio"] == close((math.exp(20) + 2 * math.exp(-20) + 1) / 4)
    assert "ref_kl" not in metrics
    assert "entropy" not in metrics


POLICY = {
    "grpo": (grpo, {"dual_clip": 1.5}),
    "grpo_k1": (grpo, {"kl": "k1"}),
    "grpo_k2": (grpo, {"kl": "k2"}),
    "grpo_forward": (grpo, {"kl_grad": "forward"}),
    "dr_grpo": (dr_grpo, {"max_completion_length": 7}),
    "gspo": (gspo, {"clip_eps_low": 0.1, "clip_eps_high": 0.3}),
    "conservative_batch": (conservative_ppo, {}),
    "conservative_sequence": (conservative_ppo, {"level": "sequence", "conservative_coef": 2.0}),
}
policy_losses = pytest.mark.parametrize("name", POLICY)
LENGTHS = (3, 5, 1)


def batch(seed=0) -> dict[str, Any]:
    """Three answers of 3, 5 and 1 tokens, padded to 5."""
    rng = np.random.default_rng(seed)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "token_weights")
    data: dict[str, Any] = {name: rng.normal(size=(3, 5)) for name in names}
    data["loss_mask"] = np.arange(5) < np.array(LENGTHS)[:, None]
    data["advantages"] = np.array([1.0, -0.5, 2.0])
    return data


def value(name, data, **options):
    loss, choices = POLICY[name]
    return loss(**data, kl_coef=0.3, entropy_coef=0.2, **choices, **options)


@policy_losses
def test_policy_packed_equals_padded(name):
    padded = batch()
    mask = padded["loss_mask"]
    packed = {key: x[mask] for key, x in padded.items() if key != "advantages"}
    expected, cu_seqlens = value(name, padded), [0, 3, 8, 9]
    packed["advantages"] = np.repeat(padded["advantages"], LENGTHS)
    assert value(name, packed, cu_seqlens=cu_seqlens) == close(expected)
    packed["advantages"] = padded["advantages"]
    assert value(name, packed, cu_seqlens=cu_seqlens) == close(expected)
    assert value(name, packed, cu_seqlens=[0, 4, 8, 9]) != close(expected)


@policy_losses
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_policy_masked_positions_change_nothing(name, garbage):
    data = batch()
    expected = value(name, data)
    for key, x in data.items():
        if key not in ("loss_mask", "advantages"):
            x[~data["loss_mask"]] = garbage
    assert value(name, data) == expected
    data["advantages"] = np.where(data["loss_mask"], data["advantages"][:, None], garbage)
    assert value(name, data) == expected


@policy_losses
def test_policy_padding_and_order_of_rows_change_nothing(name):
    data = batch()
    expected = value(name, data)
    for left, right, rows in ((0, 4, 0), (2, 0, 0), (1, 1, 2)):
        wide = {k: np.pad(x, ((0, rows), (left, right))) for k, x in data.items() if k != "advantages"}
        wide["advantages"] = np.pad(data["advantages"], (0, rows))
        assert value(name, wide) == close(expected)
    assert value(name, {key: x[[2, 0, 1]] for key, x in data.items()}) == close(expected)


@policy_losses
def test_policy_without_tokens_is_zero(name):
    data = batch()
    data["loss_mask"][:] = False
    assert value(name, data) == 0.0
    # an empty answer is not a sequence either
    data = batch()
    data["loss_mask"][1] = False
    assert value(name, data) == close(value(name, {key: x[[0, 2]] for key, x in data.items()}))


def test_policy_metrics_share_the_layouts():
    data = batch()
    del data["token_weights"]
    mask = data["loss_mask"]
    clip = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "ratio_level": "sequence"}
    expected = policy_metrics(**data, **clip)
    packed = {key: x[mask] for key, x in data.items() if key != "advantages"}
    packed["advantages"] = data["advantages"]
    assert policy_metrics(**packed, cu_seqlens=[0, 3, 8, 9], **clip) == close(expected)
    data["logprobs"][~mask] = NAN
    assert policy_metrics(**data, **clip) == expected
    data["loss_mask"] = np.zeros_like(mask)
    assert set(policy_metrics(**data, **clip).values()) == {0.0}


def test_policy_old_logprobs_default_to_the_frozen_policy():
    # r = exp(l - sg l): value 1, slope 1; the loss of one of two tokens is -A r / 2, so its slope is -A / 2
    def loss(x, frozen):
        return grpo([[x, -1.0]], None, [3.0], [[True, True]], frozen_logprobs=frozen)

    assert loss(-2.0, None) == close(-3.0)
    assert slope(lambda x: loss(x, [[-2.0, -1.0]]), -2.0) == pytest.approx(-1.5, rel=1e-8)
    assert slope(lambda x: loss(x, None), -2.0) == 0.0


def softmax(theta):
    return np.exp(theta) / np.exp(theta).sum()


@pytest.mark.parametrize(
    ("estimator", "kl_grad", "divergence"),
    [
        ("k1", "reverse", "reverse"),
        ("k2", "reverse", "reverse"),
        ("k3", "reverse", "reverse"),
        ("k3", "forward", "forward"),
        ("k3", "literal", "forward"),  # on-policy the printed k3 descends KL(ref || pi), not the KL that it estimates
        ("k2", "literal", "reverse"),
    ],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_term_descends_the_divergence_it_names(estimator, kl_grad, divergence, on_policy):
    # one answer of one token for each word of a vocabulary of four; weights V * pi_old(word) make the mean over
    # answers the expectation under the old policy, so its slope in theta is the gradient that an update follows
    theta, ref = np.array([0.3, -0.5, 1.0, 0.1]), softmax(np.array([-0.2, 0.4, 0.3, 0.9]))
    old = softmax(theta if on_policy else np.array([0.6, 0.2, -0.3, 0.0]))
    frozen = np.log(softmax(theta))[:, None]

    def expected_term(theta):
        logprobs = np.log(softmax(theta))[:, None]
        options = {"ref_logprobs": np.log(ref)[:, None], "kl": estimator, "kl_grad": kl_grad, "kl_coef": 1.0}
        mask, weights = np.ones((4, 1), bool), 4 * old[:, None]
        old_logprobs = np.log(old)[:, None]
        return grpo(logprobs, old_logprobs, [0.0] * 4, mask, token_weights=weights, frozen_logprobs=frozen, **options)

    def exact(theta):
        pi = softmax(theta)
        return kl(pi, ref) if divergence == "reverse" else kl(ref, pi)

    axes = np.eye(4)
    estimated = [slope(lambda h, v=v: expected_term(theta + h * axes[v]), 0.0) for v in range(4)]
    true = [slope(lambda h, v=v: exact(theta + h * axes[v]), 0.0) for v in range(4)]
    if kl_grad == "literal" and not on_policy:  # off-policy the printed estimators descend nothing of the kind
        assert estimated != pytest.approx(true, rel=1e-2)
    else:
        assert estimated == pytest.approx(true, rel=1e-6, abs=1e-9)


P, Q = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]


def test_kl_by_hand():
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.5 log(2 * 2 / 3)
    assert kl([0.5, 0.5], [0.25, 0.75]) == close(0.5 * math.log(4 / 3))
    assert kl([0.25, 0.75], [0.5, 0.5]) == close(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    # 0 log 0 = 0, and mass where q has none is infinitely far
    assert kl([1.0, 0.0], [0.5, 0.5]) == close(LOG2)
    assert kl([0.5, 0.5], [1.0, 0.0]) == INF
    assert kl(P, P) == 0.0


def test_kl_estimators_by_hand():
    # log(pi / ref) = 2: k1 = 2, k2 = 2, k3 = e^-2 - 1 + 2; and -2: k1 = -2, k2 = 2, k3 = e^2 - 1 - 2
    assert (kl_k1(-1.0, -3.0), kl_k1(-3.0, -1.0)) == (2.0, -2.0)
    assert (kl_k2(-1.0, -4.0), kl_k2(-4.0, -1.0)) == (4.5, 4.5)
    assert kl_k3(-1.0, -3.0) == close(math.exp(-2) + 1)
    assert kl_k3(-3.0, -1.0) == close(math.exp(2) - 3)
    # the log ratio is bounded as a whole, so that k3 is never negative
    assert kl_k3(-100.0, 0.0, max_log_ratio=2.0) == close(math.exp(2) - 3)
    # near 0 it is d^2 / 2 + d^3 / 6, of which exp(d) - 1 - d would keep no digit
    assert kl_k3(0.0, 1e-7) == pytest.approx(0.5e-14 * (1 + 1e-7 / 3), rel=1e-6, abs=0)


def test_k1_and_k3_are_unbiased_by_enumeration_and_k2_is_not():
    def expectation(estimator):
        return sum(p * estimator(math.log(p), math.log(q)) for p, q in zip(P, Q, strict=True))

    exact = 0.5 * math.log(2.5) + 0.3 * math.log(0.6) + 0.2 * math.log(2 / 3)
    assert kl(P, Q) == close(exact)
    assert expectation(kl_k1) == close(exact)
    assert expectation(kl_k3) == close(exact)
    assert expectation(kl_k2) != pytest.approx(exact, rel=1e-2)


def test_dpo_at_the_reference_is_log_2():
    assert dpo([-5.0, -1.0], [-2.0, -9.0], [-5.0, -1.0], [-2.0, -9.0], beta=3.0) == close(LOG2)
    # and whatever the smoothing
    assert dpo([-5.0], [-2.0], [-5.0], [-2.0], label_smoothing=0.3) == close(LOG2)


def test_dpo_margin_and_smoothing_by_hand():
    # margin = 0.5 * ((-1 + 3) - (-4 + 2)) = 2: loss log(1 + e^-2), and the flipped label costs 2 more
    pair = ([-1.0], [-4.0], [-3.0], [-2.0])
    loss = math.log(1 + math.exp(-2))
    assert dpo(*pair, beta=0.5) == close(loss)
    assert dpo(*pair, beta=0.5, label_smoothing=0.1) == close(loss + 0.1 * 2)
    # without a reference: margin = 0.5 * (-1 + 4) = 1.5
    assert dpo(*pair, beta=0.5, reference_free=True) == close(math.log(1 + math.exp(-1.5)))
    assert dpo(*pair[:2], beta=0.5, reference_free=True) == close(math.log(1 + math.exp(-1.5)))
    with pytest.raises(ValueError, match="reference_free=True"):
        dpo(*pair[:2])


def test_dpo_default_beta():
    # margin = 0.1 * 10
    assert dpo([-1.0], [-11.0], [0.0], [0.0]) == close(math.log(1 + math.exp(-1)))


def test_dpo_mask_and_weights():
    # losses log 2 (margin 0), masked, log(1 + 1/3) (margin log 3): (2 log 2 + 0.5 log(4 / 3)) / 2
    chosen, rejected, zero = [0.0, NAN, math.log(3)], [0.0, INF, 0.0], [0.0, -INF, 0.0]
    mask = [True, False, True]
    options = {"mask": mask, "beta": 1.0}
    loss = dpo(chosen, rejected, zero, zero, weights=[2.0, 5.0, 0.5], **options)
    assert loss == close((2 * LOG2 + 0.5 * math.log(4 / 3)) / 2)
    # weight 0 rejects the pair and keeps the denominator
    chosen[0] = NAN
    loss = dpo(chosen, rejected, zero, zero, weights=[0.0, 5.0, 1.0], **options)
    assert loss == close(math.log(4 / 3) / 2)
    assert dpo(chosen, rejected, zero, zero, mask=[False] * 3) == 0.0


def test_dpo_survives_huge_margins():
    # -log sigmoid(-1000) = 1000, -log sigmoid(1000) = 0
    assert dpo([0.0], [1000.0], [0.0], [0.0], beta=1.0) == close(1000.0)
    assert dpo([1000.0], [0.0], [0.0], [0.0], beta=1.0) == 0.0


def test_group_advantages_by_hand():
    # means 1/2 and 3; sample deviations sqrt((1/4 + 1/4) / 1) = sqrt(1/2) and sqrt((4 + 0 + 4) / 2) = 2
    rewards, groups = [1.0, 5.0, 0.0, 3.0, 1.0], [7, 3, 7, 3, 3]
    assert group_advantages(rewards, groups, "none") == close([0.5, 2.0, -0.5, 0.0, -2.0])
    half = 0.5 / (math.sqrt(0.5) + 1e-6)
    two = 2.0 / (2.0 + 1e-6)
    assert group_advantages(rewards, groups) == close([half, two, -half, 0.0, -two])
    # all rewards: mean 2, squares 1 + 9 + 4 + 1 + 1 = 16, sample deviation sqrt(16 / 4) = 2; eps = 2 makes it 4
    assert group_advantages(rewards, groups, "batch", eps=2.0) == close([0.125, 0.5, -0.125, 0.0, -0.5])
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages(rewards, groups, "std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_of_identical_rewards_are_exactly_zero(scale):
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1, and a difference of 1e-17 over eps alone would still be an advantage
    assert group_advantages([0.1, 0.1, 0.1], [0, 0, 0], scale) == [0.0, 0.0, 0.0]
    assert group_advantages([0.7] * 6 + [0.1] * 3, [0] * 6 + [1] * 3, scale) == [0.0] * 9


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_ignore_invalid_rows(scale):
    rewards, groups = [1.0, NAN, 0.0, 100.0, 4.0], [0, 0, 0, 0, 1]
    expected = group_advantages([1.0, 0.0, 4.0], [0, 0, 1], scale)
    assert expected[0] > 0.0
    left, right, alone = expected
    advantages = group_advantages(rewards, groups, scale, valid=[True, True, True, False, True])
    assert advantages == [left, 0.0, right, 0.0, alone]


def test_group_advantages_without_a_companion_are_zero():
    assert group_advantages([3.0, 5.0], ["a", "b"]) == [0.0, 0.0]
    assert group_advantages([3.0, NAN], [0, 0]) == [0.0, 0.0]
    assert group_advantages([3.0], [0], "batch") == [0.0]
    # a lone row still counts in the deviation of the batch: 1, 0 and 5 have mean 2, squares 1 + 4 + 9 = 14
    advantages = group_advantages([1.0, 0.0, 5.0], [0, 0, 1], "batch", eps=0.0)
    assert advantages == close([0.5 / math.sqrt(7), -0.5 / math.sqrt(7), 0.0])


def test_token_stats_by_hand():
    # logits log 1 and log 3: p = 1/4, 3/4; sum p^2 = 10/16; H = log 4 - 3/4 log 3
    row = [0.0, math.log(3)]
    stats = token_stats([row, row], [0, 1])
    assert stats["logprobs"] == close([-math.log(4), math.log(0.75)])
    assert stats["entropy"] == close([math.log(4) - 0.75 * math.log(3)] * 2)
    assert stats["logsumexp"] == close([math.log(4)] * 2)
    assert stats["sum_p2"] == close([0.625] * 2)
    assert stats["mean_logprob"] == close([(math.log(3) - 2 * math.log(4)) / 2] * 2)
    # a shift moves the logsumexp only, and overflows nothing
    shifted = token_stats([[1000.0, 1000.0 + math.log(3)], [-1000.0, 0.0]], [0, 0])
    assert shifted["logsumexp"] == close([1000 + math.log(4), 0.0])
    assert shifted["logprobs"] == close([-math.log(4), -1000.0])


def test_token_stats_temperature_per_row():
    # log 9 / 2 = log 3; log 3 / 1; (2 log 3) / 0.5 = log 81
    rows = [[0.0, math.log(9)], [0.0, math.log(3)], [0.0, 2 * math.log(3)]]
    stats = token_stats(rows, [0, 0, 0], temperature=[2.0, 1.0, 0.5])
    assert stats["logprobs"] == close([-math.log(4), -math.log(4), -math.log(82)])
    assert token_stats(rows[:1], [0], temperature=2.0)["logsumexp"] == close([math.log(4)])


def test_token_stats_edges():
    # a token of probability 0 adds nothing to the entropy; its own log-prob and the vocabulary's mean are -inf
    stats = token_stats([[0.0, -INF, 0.0], [0.0, -INF, 0.0]], [0, 1])
    assert stats["logprobs"] == [close(-LOG2), -INF]
    assert stats["entropy"] == close([LOG2, LOG2])
    assert stats["mean_logprob"] == [-INF, -INF]
    # as p approaches 1, log p = -log(1 + e^-60) = -e^-60 keeps its digits
    assert token_stats([[0.0, 60.0]], [1])["logprobs"] == pytest.approx([-math.exp(-60)], rel=1e-12, abs=0)
    # rows left out are 0, whatever they hold
    masked = token_stats([[NAN, NAN], [0.0, 0.0]], [-100, 1], loss_mask=[False, True])
    assert masked["logprobs"] == close([0.0, -LOG2])
    assert masked["sum_p2"] == close([0.0, 0.5])


def test_linear_stats_by_hand():
    # hidden (1, 2), head rows (3, -1) and (0, 1), bias (0, 1): logits 1 + 0 and 2 + 1
    hidden, head = [[1.0, 2.0]], [[3.0, -1.0], [0.0, 1.0]]
    plain = linear_stats(hidden, head, [0], [0.0, 1.0])
    assert plain["logprobs"] == close([-math.log(1 + math.exp(2))])
    assert plain["logsumexp"] == close([math.log(math.exp(1) + math.exp(3))])
    # scale 0.5: 0.5 and 1.5; softcap 2: 2 tanh(0.25) and 2 tanh(0.75); temperature 4
    full = linear_stats(hidden, head, [1], [0.0, 1.0], 0.5, 2.0, 4.0)
    low, high = math.tanh(0.25) / 2, math.tanh(0.75) / 2
    assert full["logprobs"] == close([-math.log(1 + math.exp(low - high))])
    assert full["logsumexp"] == close([math.log(math.exp(low) + math.exp(high))])


def test_linear_stats_are_token_stats_of_the_product():
    rng = np.random.default_rng(1)
    hidden, head, ids = rng.normal(size=(4, 3)), rng.normal(size=(6, 3)), [0, 5, 2, 2]
    temperature, mask = [1.0, 0.7, 2.0, 1.0], [True, True, True, False]
    linear = linear_stats(hidden, head, ids, temperature=temperature, loss_mask=mask)
    logits = token_stats(hidden @ head.T, ids, temperature, mask)
    for name, values in logits.items():
        assert linear[name] == close(values)


def test_reference_imports_nothing_that_it_judges():
    for file in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = ".".join(name.split(".")[:2])
                assert top in {"rlloss.reference", "math", "statistics", "itertools", "typing", "numpy", "numpy.typing"}
