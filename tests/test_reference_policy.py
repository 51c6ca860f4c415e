"""The specification of the policy losses against arithmetic done by hand."""

import math
from typing import Any

import numpy as np
import pytest

from rlloss.reference import (
    conservative_ppo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    kl,
    policy_metrics,
    ppo,
    reinforce,
    rloo,
)

NAN, INF, LOG2 = math.nan, math.inf, math.log(2)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def logs(ratios):
    """Log-probs whose ratio to an old log-prob of 0 is given."""
    return [[math.log(r) for r in row] for row in ratios]


def slope(f, x, h=1e-6):
    return (f(x + h) - f(x - h)) / (2 * h)


# two answers, of two and of one token
#   ratios    1.1  1.5   with A = +2:  -1.1 * 2 = -2.2   and, cut at 1.2, -1.2 * 2 = -2.4
#   ratio     0.5        with A = -1:   max(0.5, 0.8) = 0.8

TWO = logs([[1.1, 1.5], [0.5, 1.0]])
TWO_OLD = [[0.0, 0.0], [0.0, 0.0]]
TWO_MASK = [[True, True], [True, False]]


def test_ppo_is_a_mean_over_tokens():
    # (-2.2 - 2.4 + 0.8) / 3
    assert ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK) == close(-3.8 / 3)
    # [0.4, 1.05]: (-2.1 - 2.1 + 0.5) / 3
    assert ppo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_low=0.6, clip_eps_high=0.05) == close(-3.7 / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "expected"),
    [
        (1.5, 2.0, None, -2.4),  # good and grown: cut at 1.2
        (1.5, -2.0, None, 3.0),  # bad and grown
        (0.5, 2.0, None, -1.0),  # good and shrunk
        (0.5, -2.0, None, 1.6),  # bad and shrunk: cut at 0.8
        (4.0, -2.0, 3.0, 6.0),
        (2.0, -2.0, 3.0, 4.0),
        (4.0, 2.0, 3.0, -2.4),
    ],
)
def test_ppo_clip_on_each_side_and_sign(ratio, advantage, dual_clip, expected):
    assert ppo(logs([[ratio]]), [[0.0]], [advantage], [[True]], dual_clip=dual_clip) == close(expected)


def test_ppo_adds_kl_and_entropy():
    # r = 1, A = 2: -2; k2 = 1 / 2; entropy 3
    terms = {"ref_logprobs": [[-1.0]], "kl_coef": 0.4, "kl": "k2", "entropy": [[3.0]], "entropy_coef": 0.1}
    assert ppo([[0.0]], None, [2.0], [[True]], **terms) == close(-2 + 0.4 / 2 - 0.1 * 3)


def test_dapo_leaves_more_room_above():
    # 1.1, 1.28 and 0.8: (-2.2 - 2.56 + 0.8) / 3
    assert dapo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK) == close(-3.96 / 3)
    # (-2.2 - 2.8 + 0.9) / 3
    assert dapo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_low=0.1, clip_eps_high=0.4) == close(-4.1 / 3)


def test_reinforce_is_the_log_prob_of_the_answer_times_its_advantage():
    # (2 * (1 + 2) - 0.5 * 6) / 2, whatever the old policy
    logprobs = [[-1.0, -2.0], [-6.0, NAN]]
    for old in (None, TWO_OLD, [[9.0, -9.0], [3.0, NAN]]):
        assert reinforce(logprobs, old, [2.0, -0.5], TWO_MASK) == close(1.5)
    # one advantage per token: (1 * 1 + 2 * 2 - 1 * 6) / 2
    assert reinforce(logprobs, None, [[1.0, 2.0], [-1.0, NAN]], TWO_MASK) == close(-0.5)
    # weights: (2 * 2 * 1 + 0 - 3 * 0.5 * 6) / 2
    assert reinforce(logprobs, None, [2.0, -0.5], TWO_MASK, token_weights=[[2.0, 0.0], [3.0, NAN]]) == close(-2.5)
    # the KL term is summed over the answer too: 0.1 * (2 + 2 + 8) / 2 for k2 of 2, 2 and 4 nats
    ref = [[-3.0, -4.0], [-10.0, NAN]]
    loss = reinforce(logprobs, None, [2.0, -0.5], TWO_MASK, ref_logprobs=ref, kl_coef=0.1, kl="k2")
    assert loss == close(1.5 + 0.6)


def test_rloo_ratio_is_a_product():
    # ratios 2 and 8 make 16; A = -1 costs 16, and no more for being two tokens long
    new, old, mask = logs([[2.0, 8.0]]), [[0.0, 0.0]], [[True, True]]
    assert rloo(new, old, [-1.0], mask) == close(16.0)
    assert rloo(new, old, [1.0], mask) == close(-1.2)
    # only counted tokens enter: the ratio is 2
    assert rloo(new, old, [-1.0], [[True, False]]) == close(2.0)
    # 1.1 * 1.5 = 1.65 within [0.8, 2]: (-3.3 + 0.8) / 2; cut at 1.2: (-2.4 + 0.8) / 2
    assert rloo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK, clip_eps_high=1.0) == close(-1.25)
    assert rloo(TWO, TWO_OLD, [2.0, -1.0], TWO_MASK) == close(-0.8)
    # advantages 1 and 3 of one answer enter by their mean
    assert rloo(logs([[1.1, 1.0]]), old, [[1.0, 3.0]], mask) == close(-2.2)
    # the sum of 15 and 10 nats is cut to 20
    assert rloo([[15.0, 10.0]], old, [-1.0], mask) == close(math.exp(20))


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
        "ref_kl_seq": close((1 - LOG2) / 2),
        "entropy": close(3.0),
    }


def test_policy_metrics_dual_clip_bound_and_sequence_ratio():
    clip: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}
    # A < 0 with ratios 4 and 2: a dual clip of 3 binds on the first only
    new, old, mask = logs([[4.0, 2.0]]), [[0.0, 0.0]], [[True, True]]
    assert policy_metrics(new, old, [-1.0], mask, **clip)["clip_frac"] == 0.0
    assert policy_metrics(new, old, [-1.0], mask, dual_clip=3.0, **clip)["clip_frac"] == 0.5
    # as a sequence both tokens have sqrt(4 * 2); approx_kl stays per token: (4 - 1 - log 4 + 2 - 1 - log 2) / 2
    metrics = policy_metrics(new, old, [1.0], mask, ratio_level="geometric", **clip)
    assert metrics["ratio"] == close(math.sqrt(8))
    assert metrics["clip_frac"] == 1.0
    assert metrics["approx_kl"] == close((4 - 3 * LOG2) / 2)
    # 21 nats are beyond the bound of 20: the ratio is e^20
    metrics = policy_metrics([[21.0, -20.0, 0.0, -21.0]], [[0.0] * 4], [1.0], [[True] * 4], **clip)
    assert metrics["bounded_frac"] == 0.5
    assert metrics["ratio"] == close((math.exp(20) + 2 * math.exp(-20) + 1) / 4)
    assert "ref_kl" not in metrics
    assert "entropy" not in metrics


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
