"""The specification against arithmetic done by hand: nothing here is computed the way that the code computes it."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

import rlloss.reference as reference
from rlloss.reference import (
    gae,
    group_advantages,
    informative_groups,
    kl,
    kl_k1,
    kl_k2,
    kl_k3,
    linear_stats,
    sft,
    token_stats,
    value,
    whiten,
)

NAN, INF, LOG2 = math.nan, math.inf, math.log(2)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


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


# from an old value of 0, with a clip of 0.2: v, R, (v - R)^2 and (v' - R)^2
#    0.1    1.0   0.81   0.81   within
#    0.5    1.0   0.25   0.64   up towards the return
#    0.5    0.0   0.25   0.04   up away from it
#   -0.5   -1.0   0.25   0.64   down towards the return
#   -0.5    0.0   0.25   0.04   down away from it

VALUES, RETURNS = [[0.1, 0.5, 0.5, -0.5, -0.5]], [[1.0, 1.0, 0.0, -1.0, 0.0]]
STILL, COUNTED = [[0.0] * 5], [[True] * 5]


def test_value_takes_the_larger_of_two_errors():
    total = 0.81 + 0.64 + 0.25 + 0.64 + 0.25
    assert value(VALUES, STILL, RETURNS, COUNTED) == close(total / 2 / 5)
    assert value(VALUES, STILL, RETURNS, COUNTED, halve=False) == close(total / 5)
    # the clip is around the old value, not around 0
    far = [[x + 10 for x in row] for row in (VALUES[0], STILL[0], RETURNS[0])]
    assert value([far[0]], [far[1]], [far[2]], COUNTED) == close(total / 2 / 5)


def test_value_where_no_clip_binds():
    total = 0.81 + 4 * 0.25
    assert value(VALUES, STILL, RETURNS, COUNTED, value_clip=None) == close(total / 2 / 5)
    assert value(VALUES, STILL, RETURNS, COUNTED, value_clip=0.6) == close(total / 2 / 5)
    assert value(VALUES, None, RETURNS, COUNTED) == close(total / 2 / 5)
    # only the first may: clip((0.1 - 0), 0.05) = 0.05
    assert value([[0.1]], [[0.0]], [[1.0]], [[True]], value_clip=0.05) == close(0.95**2 / 2)


def test_value_masks_weights_and_packs():
    # errors 1, 4 and 9 of three tokens; then 2 * 1 + 0 + 0.5 * 9
    values, returns, mask = [[1.0, 2.0], [3.0, NAN]], [[0.0, 0.0], [0.0, INF]], [[True, True], [True, False]]
    assert value(values, None, returns, mask) == close(14 / 2 / 3)
    for rejected in (2.0, NAN, INF):
        values[0][1] = rejected
        loss = value(values, None, returns, mask, token_weights=[[2.0, 0.0], [0.5, NAN]])
        assert loss == close(6.5 / 2 / 3)
    assert value([1.0, 2.0, 3.0], None, [0.0] * 3, [True] * 3, cu_seqlens=[0, 2, 3]) == close(14 / 2 / 3)
    assert value(values, None, returns, [[False, False]] * 2) == 0.0


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


def test_leave_one_out_by_hand():
    # 1 - (0 + 2) / 2, 0 - (1 + 2) / 2, 2 - (1 + 0) / 2; 5 - 3 and 3 - 5
    rewards, groups = [1.0, 5.0, 0.0, 3.0, 2.0], [7, 3, 7, 3, 7]
    expected = [0.0, 2.0, -1.5, -2.0, 1.5]
    assert group_advantages(rewards, groups, "none", baseline="leave_one_out") == close(expected)


def test_informative_groups_by_hand():
    rewards, groups = [1.0, 1.0, 0.0, 1.0, NAN, 2.0], [0, 0, 1, 1, 2, 2]
    assert informative_groups(rewards, groups) == [False, False, True, True, False, False]
    assert informative_groups(rewards, groups, valid=[True, True, True, False, True, True]) == [False] * 6


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5; deltas 1 + 0.5 * 2 - 1 = 1, 0 + 0.5 * 4 - 2 = 0 and 3 + 0 - 4 = -1
    # A = 1 + 0.25 * 0 + 0.0625 * (-1), 0 + 0.25 * (-1), -1
    advantages, returns = gae([[1.0, 0.0, 3.0]], [[1.0, 2.0, 4.0]], [[True] * 3], 0.5, 0.5)
    assert advantages == [close([0.9375, -0.25, -1.0])]
    assert returns == [close([1.9375, 1.75, 3.0])]
    # a truncated answer goes on at 8: the last delta is 3 + 0.5 * 8 - 4 = 3
    advantages, _ = gae([[1.0, 0.0, 3.0]], [[1.0, 2.0, 4.0]], [[True] * 3], 0.5, 0.5, [8.0])
    assert advantages == [close([1 + 3 / 16, 0.75, 3.0])]


def test_whiten_by_hand():
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4
    values, mask = [[1.0, 3.0], [NAN, 5.0]], [[True, True], [False, True]]
    assert whiten(values, mask, eps=0.0) == [[-1.0, 0.0], [0.0, 1.0]]
    assert whiten(values, mask, center=False, eps=0.0) == [[2.0, 3.0], [0.0, 4.0]]
    assert whiten(values, mask, eps=12.0) == [[-0.5, 0.0], [0.0, 0.5]]  # sqrt(4 + 12) = 4


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


ALLOWED = {"rlloss.reference", "collections.abc", "fractions", "itertools", "math", "statistics", "typing"}
ALLOWED |= {"numpy", "numpy.typing"}


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
                assert top in ALLOWED, f"{file.name}: {name}"
