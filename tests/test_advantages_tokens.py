"""Returns to go, the Optimal Token Baseline and advantages of turns: by hand, by the specification, in every layout."""

# pyright: reportArgumentType=false, reportCallIssue=false

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlloss
from rlloss import kl_k1, kl_shaped_rewards, optimal_token_baseline, returns_to_go, turn_advantages, whiten

POISON = [math.nan, math.inf, -math.inf, 1e30]


def batch(rows=8, columns=11, seed=0):
    """Rewards, log-probs, their sums of squares and weights per token; a mask with gaps and an empty row; groups."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(rows, columns, 5, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    mask = torch.rand(rows, columns, generator=generator) > 0.3
    mask[2] = False
    weights = torch.rand(rows, columns, generator=generator, dtype=torch.float64) + 0.5
    return rewards, p[..., 0].log(), p.square().sum(-1), weights, mask, torch.randint(3, (rows,), generator=generator)


def turns_of(mask, seed=0):
    """Turns that begin at some trained tokens, and one of three states for each."""
    generator = torch.Generator().manual_seed(seed)
    begins = mask & (torch.rand(mask.shape, generator=generator) > 0.6)
    turns = 5 * begins.cumsum(1)
    return turns, torch.randint(3, (mask.shape[0], turns.max() + 1), generator=generator).gather(1, turns)


def returns(rewards, logprobs, sum_p2, weights, mask, group_ids, **layout):
    return returns_to_go(rewards, mask, 0.9, **layout)


def baseline(rewards, logprobs, sum_p2, weights, mask, group_ids, **layout):
    return optimal_token_baseline(rewards, logprobs, sum_p2, mask, group_ids, token_weights=weights, **layout)


def turns(rewards, logprobs, sum_p2, weights, mask, group_ids, **layout):
    # whole numbers made of what is at hand, so that they follow their tokens into every layout
    in_turns = (weights.nan_to_num(0, 0, 0) > 1).long()
    return turn_advantages(rewards, in_turns, mask, group_ids, 0.9, scale="none", **layout)


ALL = [returns, baseline, turns]


def on_rows(rows, like, layout):
    if "cu_seqlens" in layout:
        rows = [x for row in rows for x in row]
    return torch.tensor(rows, dtype=torch.float64).reshape(like.shape)


# returns to go


@pytest.mark.parametrize("behind_the_mask", [9.0, math.nan, math.inf])
def test_a_tool_call_neither_stops_nor_discounts_what_is_still_to_be_earned(behind_the_mask):
    # where a gap resets the sum, the tokens before it earn 0
    mask = torch.tensor([[True, True, False, False, True, True]])
    rewards = torch.where(mask, torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]), behind_the_mask)
    assert returns_to_go(rewards, mask).tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]
    assert returns_to_go(rewards, mask, 0.5).tolist() == [[0.125, 0.25, 0.0, 0.0, 0.5, 1.0]]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returns_agree_with_the_specification(gamma, dtype):
    rewards, *_, mask, _ = batch()
    rewards = rewards.to(dtype)
    expected = on_rows(rlloss.reference.returns_to_go(rewards, mask, gamma), mask, {})
    actual = returns_to_go(rewards, mask, gamma)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-6 if dtype is torch.float32 else 1e-12, atol=1e-12)


def test_three_lines_are_reinforce_plus_plus():
    generator = torch.Generator().manual_seed(0)
    old, ref = -torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 6, generator=generator) > 0.3
    rewards = torch.tensor([1.0, 0.0, 0.5]).double()

    shaped = kl_shaped_rewards(rewards, kl_k1(old, ref), mask, kl_coef=0.1)
    to_go = returns_to_go(shaped, mask)
    advantages = whiten(to_go, mask)

    tokens = []  # R - 0.1 times the log-ratios from here on, of every trained token
    for i in range(3):
        (trained,) = mask[i].nonzero(as_tuple=True)
        for t in trained.tolist():
            later = trained[trained >= t]
            tokens.append(float(rewards[i] - 0.1 * (old[i, later] - ref[i, later]).sum()))
    expected = torch.tensor(tokens, dtype=torch.float64)
    expected = (expected - expected.mean()) / (expected.var() + 1e-8).sqrt()
    torch.testing.assert_close(advantages[mask], expected, rtol=1e-12, atol=1e-12)
    assert not advantages[~mask].any()


# the Optimal Token Baseline


def test_the_optimal_token_baseline_by_hand():
    # energies (1 - p)^2 + the others' squares: 0.5, 0.02 and 1.28; W is 0.5, 0.52 against 1.28, 1.3
    p, squares = torch.tensor([[0.5, 0.9, 0.5], [0.2, 0.9, 0.5]]), torch.tensor([[0.5, 0.82, 0.5], [0.68, 0.82, 0.5]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    earned = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 7.0]])
    inputs = [x.double() for x in (earned, p.log(), squares)]
    expected = [[1.28 / 1.78, 1.3 / 1.82, 0.0], [-0.5 / 1.78, -0.52 / 1.82, 0.0]]
    advantages = optimal_token_baseline(*inputs, mask, torch.zeros(2).long())
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    # the third token has no peer: its return, by request
    raw = optimal_token_baseline(*inputs, mask, torch.zeros(2).long(), singleton="raw")
    assert raw[0, 2] == 1.0
    assert torch.equal(raw[:, :2], advantages[:, :2])
    assert raw[1, 2] == 0.0  # masked
    lone = optimal_token_baseline(*inputs, mask, torch.arange(2), singleton="raw")
    assert torch.equal(lone, torch.where(mask, earned.double(), 0))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("singleton", ["zero", "raw"])
def test_the_optimal_token_baseline_agrees_with_the_specification(weighted, singleton):
    for seed in range(4):
        rewards, logprobs, sum_p2, weights, mask, group_ids = batch(seed=seed)
        options = {"token_weights": weights if weighted else None, "singleton": singleton}
        inputs = (rewards, logprobs, sum_p2, mask, group_ids)
        expected = on_rows(rlloss.reference.optimal_token_baseline(*inputs, **options), mask, {})
        torch.testing.assert_close(optimal_token_baseline(*inputs, **options), expected, rtol=1e-9, atol=1e-12)


def test_the_weighted_advantages_of_a_step_sum_to_zero():
    # what makes the baseline optimal: the derivative of sum W (G - B)^2 with respect to B
    rewards, logprobs, sum_p2, *_ = batch()
    mask, group_ids = torch.ones(8, 11).bool(), torch.arange(8) % 3
    advantages = optimal_token_baseline(rewards, logprobs, sum_p2, mask, group_ids)
    energy = (1 - 2 * logprobs.exp() + sum_p2).cumsum(1)
    for group in range(3):
        own = group_ids == group
        assert (energy * advantages)[own].sum(0).abs().max() < 1e-12
        assert advantages[own].abs().max() > 0.1


def test_equal_returns_get_exact_zeros_and_certain_tokens_no_noise():
    _, logprobs, sum_p2, weights, mask, group_ids = batch()
    earned = torch.full(mask.shape, 0.1)
    narrow = [x.float() for x in (logprobs, sum_p2, weights)]
    assert not optimal_token_baseline(earned, *narrow[:2], mask, group_ids, token_weights=narrow[2]).any()
    # p = 1 moves nothing: no energy, no baseline
    certain = torch.zeros(2, 3)
    advantages = optimal_token_baseline(
        torch.tensor([[1.0] * 3, [0.0] * 3]), certain, certain + 1, torch.ones(2, 3).bool(), torch.zeros(2).long()
    )
    assert not advantages.any()


# turns


def test_advantages_of_turns_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 9.0, 0.0, 4.0], [0.0, 1.0, 9.0, 9.0, 0.0]]).double()
    turn_ids = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    mask = torch.tensor([[True, True, False, True, True], [True, True, False, False, True]])
    # turns earn 3 and 4, and 0 and 1: returns 3 + 2 and 4, 0.5 and 1
    expected = torch.tensor([[2.25, 2.25, 0.0, 1.5, 1.5], [-2.25, -1.5, 0.0, 0.0, -1.5]]).double()
    advantages = turn_advantages(rewards, turn_ids, mask, torch.zeros(2).long(), 0.5, scale="none")
    torch.testing.assert_close(advantages, expected)
    # without what follows: 3 against 0, 4 against 1
    undiscounted = turn_advantages(rewards, turn_ids, mask, torch.zeros(2).long(), scale="none")
    assert torch.equal(undiscounted, turn_advantages(rewards, turn_ids, mask, torch.zeros(2).long(), 1.0, scale="none"))
    own = turn_advantages(rewards, turn_ids, mask, torch.zeros(2).long(), 0.0, scale="none")
    torch.testing.assert_close(own, torch.where(mask, expected.sign() * 1.5, 0))
    # in one state: 5, 4, 0.5 and 1 of mean 2.625
    states = torch.zeros_like(turn_ids)
    step = turn_advantages(rewards, turn_ids, mask, torch.zeros(2).long(), 0.5, state_ids=states, scale="none")
    together = torch.tensor([[2.375, 2.375, 0.0, 1.375, 1.375], [-2.125, -1.625, 0.0, 0.0, -1.625]]).double()
    torch.testing.assert_close(step, together)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("by_state", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"scale": "batch", "baseline": "leave_one_out"}, {"scale": "none", "singleton": "raw"}], ids=str
)
def test_advantages_of_turns_agree_with_the_specification(gamma, by_state, options):
    for seed in range(3):
        rewards, *_, mask, group_ids = batch(seed=seed)
        turn_ids, states = turns_of(mask, seed)
        chosen = options | ({"state_ids": states} if by_state else {})
        inputs = (rewards, turn_ids, mask, group_ids, gamma)
        expected = on_rows(rlloss.reference.turn_advantages(*inputs, **chosen), mask, {})
        assert expected.any()
        torch.testing.assert_close(turn_advantages(*inputs, **chosen), expected, rtol=1e-9, atol=1e-12)


def test_one_turn_per_sequence_is_the_advantage_of_the_sequence():
    rewards, *_, mask, group_ids = batch()
    advantages = turn_advantages(rewards, torch.zeros_like(mask).long(), mask, group_ids)
    totals, has_tokens = rlloss.sequence_sum(rewards, mask), mask.any(1)
    expected = rlloss.group_advantages(totals, group_ids, valid=has_tokens)
    torch.testing.assert_close(advantages, rlloss.to_tokens(expected, mask) * mask, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_a_turn_without_a_reward_is_nobodys_peer_and_leaves_turns_alone_that_do_not_look_ahead(packed):
    rewards = torch.tensor([[1.0, 0.0, math.nan, 4.0], [0.0, 2.0, 3.0, 0.0], [5.0, 0.0, 1.0, 1.0]]).double()
    turn_ids, mask = torch.tensor([[0, 0, 1, 2]] * 3), torch.ones(3, 4).bool()
    expected = torch.tensor([[-5 / 3, -5 / 3, 0.0, 3.0], [-2 / 3, -2 / 3, 0.75, -1.0], [7 / 3, 7 / 3, -0.75, -2 / 3]])
    expected[:, 3] = torch.tensor([4.0, 0.0, 1.0]) - 5 / 3
    expected[:, 2] = torch.tensor([0.0, 1.0, -1.0])
    inputs = [x.flatten() if packed else x for x in (rewards, turn_ids, mask)]
    layout: dict[str, Any] = {"cu_seqlens": 4 * torch.arange(4)} if packed else {}
    actual = turn_advantages(*inputs, torch.zeros(3).long(), 0.0, scale="none", **layout)
    torch.testing.assert_close(actual.view(3, 4), expected.double())
    # what looks ahead to it is not known either
    ahead = turn_advantages(*inputs, torch.zeros(3).long(), 1.0, scale="none", **layout).view(3, 4)
    assert ahead[0].tolist() == [0.0, 0.0, 0.0, pytest.approx(4.0 - 5 / 3)]
    assert ahead[1:, 0].tolist() == [-1.0, 1.0]


# all of them


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("boundaries", [torch.int32, torch.int64])
def test_every_layout_agrees(estimator, boundaries):
    *inputs, mask, group_ids = batch()
    expected = estimator(*inputs, mask, group_ids)
    assert expected.any()
    assert not expected[~mask].any()
    for left, right in ((3, 0), (0, 4), (2, 1)):
        wide = [F.pad(x, (left, right), value=math.nan) for x in inputs]
        actual = estimator(*wide, F.pad(mask, (left, right), value=False), group_ids)
        torch.testing.assert_close(actual[:, left : left + 11], expected, rtol=1e-12, atol=1e-13)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    actual = estimator(*(x[order] for x in inputs), mask[order], 9 - 2 * group_ids[order])
    torch.testing.assert_close(actual, expected[order], rtol=1e-12, atol=1e-13)

    # rows cut to different lengths (none of the first and the sixth), a tail behind the last boundary
    lengths = torch.tensor([0, 11, 5, 9, 1, 0, 7, 11])
    kept = torch.arange(11) < lengths[:, None]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(boundaries)
    expected = estimator(*inputs, mask & kept, group_ids)
    packed = [torch.cat([x[kept], torch.full((3,), math.nan, dtype=x.dtype)]) for x in inputs]
    packed_mask = torch.cat([mask[kept], torch.ones(3).bool()])
    actual = estimator(*packed, packed_mask, group_ids, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(actual[:-3], expected[kept], rtol=1e-12, atol=1e-13)
    assert not actual[-3:].any()


@pytest.mark.parametrize("estimator", ALL)
def test_masked_tokens_anywhere_change_nothing(estimator):
    *inputs, mask, group_ids = batch()
    expected = estimator(*inputs, mask, group_ids)
    slots = torch.tensor([0, 1, 2, 4, 5, 6, 7, 10, 11, 12, 15])
    wide = [torch.full((8, 17), math.nan, dtype=torch.float64).index_copy(1, slots, x) for x in inputs]
    wide_mask = torch.zeros(8, 17).bool().index_copy(1, slots, mask)
    actual = estimator(*wide, wide_mask, group_ids)
    torch.testing.assert_close(actual[:, slots], expected, rtol=1e-12, atol=1e-13)
    assert not actual[~wide_mask].any()


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("poison", POISON)
def test_what_stands_at_masked_tokens_changes_no_bit(estimator, poison):
    *inputs, mask, group_ids = batch()
    dirty = [torch.where(mask, x, poison) for x in inputs]
    assert torch.equal(estimator(*dirty, mask, group_ids), estimator(*inputs, mask, group_ids))


@pytest.mark.parametrize("estimator", ALL)
def test_a_nan_stays_in_its_group(estimator):
    *inputs, mask, group_ids = batch()
    expected = estimator(*inputs, mask, group_ids)
    row = int((group_ids == group_ids[4]).nonzero()[0])
    inputs[0][row, mask[row].nonzero()[0]] = math.nan
    others = group_ids != group_ids[row]
    cu_seqlens = torch.arange(9) * 11
    packed = estimator(*(x.flatten() for x in inputs), mask.flatten(), group_ids, cu_seqlens=cu_seqlens)
    for actual in (estimator(*inputs, mask, group_ids), packed.view(8, 11)):
        torch.testing.assert_close(actual[others], expected[others], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ALL)
def test_edges(estimator):
    *inputs, mask, group_ids = batch()
    narrow = estimator(*(x.float() for x in inputs), mask, group_ids)
    assert narrow.dtype is torch.float32
    torch.testing.assert_close(narrow, estimator(*inputs, mask, group_ids).float(), rtol=1e-5, atol=1e-5)
    assert not estimator(*(x.clone().requires_grad_() for x in inputs), mask, group_ids).requires_grad
    assert not estimator(*inputs, mask & False, group_ids).any()
    meta = [x.to("meta") for x in (*inputs, mask, group_ids)]
    assert estimator(*meta).shape == mask.shape  # who asks a meta tensor for a value, raises
    cu_seqlens = torch.zeros(9, device="meta").long()
    assert estimator(*(x.flatten() for x in meta[:-1]), meta[-1], cu_seqlens=cu_seqlens).shape == (88,)
    for rows, columns in ((0, 4), (3, 0)):
        empty = [torch.zeros(rows, columns)] * 4
        ids = torch.zeros(rows).long()
        assert estimator(*empty, torch.zeros(rows, columns).bool(), ids).shape == (rows, columns)
    assert estimator(*[torch.zeros(0)] * 4, torch.zeros(0).bool(), ids[:0], cu_seqlens=ids[:0].new_zeros(1)).shape == (
        0,
    )


@pytest.mark.unhooked
@pytest.mark.parametrize(("estimator", "packed"), [(returns, True), (baseline, False), (turns, True)])
def test_one_graph_computes_them(estimator, packed):
    compiled = torch.compile(estimator, fullgraph=True, dynamic=True, backend="eager")
    for columns in (11, 6):
        inputs, layout = batch(columns=columns), {}
        if packed:
            inputs = (*(x.flatten() for x in inputs[:-1]), inputs[-1])
            layout = {"cu_seqlens": torch.arange(9) * columns}
        torch.testing.assert_close(compiled(*inputs, **layout), estimator(*inputs, **layout), rtol=1e-12, atol=1e-13)


X, MASK, IDS = torch.zeros(2, 4), torch.ones(2, 4).bool(), torch.zeros(2).long()
TURNS = torch.zeros(2, 4).long()
BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (returns_to_go, (X, MASK, 1.1), {}, "returns_to_go: gamma must be a number in [0, 1], got 1.1"),
    (returns_to_go, (X[0], MASK), {}, "returns_to_go: token_rewards must have the shape of loss_mask, [2, 4], got [4]"),
    (returns_to_go, (X[0], MASK[0]), {}, "returns_to_go: a packed loss_mask [4] needs cu_seqlens"),
    (
        optimal_token_baseline,
        (X, X, X[:1], MASK, IDS),
        {},
        "sum_p2 must have the shape of loss_mask, [2, 4], got [1, 4]",
    ),
    (
        optimal_token_baseline,
        (X, X, X, MASK, IDS[:1]),
        {},
        "group_ids must be one integer per sequence [2], got torch.int64 [1]",
    ),
    (
        optimal_token_baseline,
        (X, X, X, MASK, IDS),
        {"token_weights": X[0]},
        "token_weights must have the shape of loss_mask",
    ),
    (
        optimal_token_baseline,
        (X, X, X, MASK, IDS),
        {"singleton": "one"},
        "singleton must be one of ['zero', 'raw'], got 'one'",
    ),
    (
        turn_advantages,
        (X, X, MASK, IDS),
        {},
        "turn_ids must be integers of the shape of loss_mask, [2, 4], got torch.float32",
    ),
    (
        turn_advantages,
        (X, TURNS, MASK, IDS),
        {"state_ids": TURNS[0]},
        "state_ids must be integers of the shape of loss_mask",
    ),
    (
        turn_advantages,
        (X, TURNS, MASK, X[:, 0]),
        {},
        "group_ids must be one integer per sequence [2], got torch.float32 [2]",
    ),
    (turn_advantages, (X, TURNS, MASK, IDS, -1), {}, "gamma must be a number in [0, 1], got -1"),
    (turn_advantages, (X, TURNS, MASK, IDS), {"scale": "std"}, "scale must be one of"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("function", "inputs", "options", "message"), BAD)
def test_bad_input_teaches(function, inputs, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*inputs, **options)
