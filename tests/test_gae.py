"""Generalised advantage estimation by hand, against the specification, and at the edges."""

# pyright: reportArgumentType=false, reportCallIssue=false

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import rlloss
from rlloss.advantages.gae import gae
from rlloss.reduce import last_tokens

NAN = math.nan
SETTINGS = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)]


def batch(rows=6, columns=13, seed=0):
    """Rewards, values, mask and last values in float64; the third row holds no trained token."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) > 0.3
    mask[2:3] = False
    return rewards, values, mask, torch.randn(rows, generator=generator, dtype=torch.float64)


def specification(*inputs: Any, **extra: Any) -> tuple[Tensor, ...]:
    rows = rlloss.reference.gae(*inputs, **extra)
    if "cu_seqlens" in extra:
        rows = tuple([x for row in kind for x in row] for kind in rows)
    return tuple(torch.tensor(kind, dtype=torch.float64).reshape(inputs[2].shape) for kind in rows)


def assert_same(actual, expected, rtol=1e-12, atol=1e-12):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("masked", [9.0, NAN, math.inf])
def test_a_tool_call_by_hand(masked):
    mask = torch.tensor([[True, True, False, False, True, True]])
    values = torch.where(mask, 0.5, masked)
    rewards = torch.tensor([[0.0, 0.0, masked, masked, 0.0, 1.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    # delta is 0, 0, 0, 0.5: the advantages are 0.5 times 0.95^3, 0.95^2, 0.95, 1
    expected = [[0.4286875, 0.45125, 0.0, 0.0, 0.475, 0.5]]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(returns, torch.where(mask, torch.tensor(expected) + 0.5, 0), rtol=1e-6, atol=0)
    assert advantages[~mask].tolist() == returns[~mask].tolist() == [0.0, 0.0]


def test_discounting_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]).double(), torch.tensor([[3.0, 5.0, 7.0]]).double()
    advantages, returns = gae(rewards, values, torch.ones(1, 3).bool(), 0.5, 0.5, torch.tensor([8.0]).double())
    # deltas 1 + 2.5 - 3 = 0.5, 2 + 3.5 - 5 = 0.5, 4 + 4 - 7 = 1; A = 0.5 + A' / 4
    assert advantages.tolist() == [[0.6875, 0.75, 1.0]]
    assert returns.tolist() == [[3.6875, 5.75, 8.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), SETTINGS)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 13, 64])
def test_the_specification_agrees(columns, gamma, gae_lambda):
    rewards, values, mask, last_value = batch(columns=columns)
    for end in (None, last_value):
        expected = specification(rewards, values, mask, gamma, gae_lambda, end)
        assert_same(gae(rewards, values, mask, gamma, gae_lambda, end), expected)


def test_masked_tokens_anywhere_change_nothing():
    rewards, values, _, last_value = batch(rows=2, columns=9)
    everything = torch.ones(2, 9).bool()
    expected = gae(rewards, values, everything, 0.9, 0.95, last_value)
    generator = torch.Generator().manual_seed(1)
    for k in (1, 2, 5):
        slots = torch.randperm(9 + k, generator=generator)[:9].sort().values
        mask = torch.zeros(2, 9 + k).bool()
        mask[:, slots] = True
        wide = [torch.full((2, 9 + k), NAN, dtype=torch.float64).index_copy(1, slots, x) for x in (rewards, values)]
        actual = gae(*wide, mask, 0.9, 0.95, last_value)
        assert_same([x[:, slots] for x in actual], expected)
        assert not any(x[~mask].any() for x in actual)


@pytest.mark.parametrize(("gamma", "gae_lambda"), SETTINGS)
@pytest.mark.parametrize("boundaries", [torch.int32, torch.int64])
def test_every_layout_agrees(gamma, gae_lambda, boundaries):
    rewards, values, mask, last_value = batch()
    expected = gae(rewards, values, mask, gamma, gae_lambda, last_value)
    for left, right in ((3, 0), (0, 4), (2, 1)):
        padded = [torch.nn.functional.pad(x, (left, right), value=NAN) for x in (rewards, values)]
        wide = torch.nn.functional.pad(mask, (left, right), value=False)
        actual = gae(*padded, wide, gamma, gae_lambda, last_value)
        assert_same([x[:, left : left + 13] for x in actual], expected)

    # rows cut to different lengths (none of the third), and a tail behind the last boundary with its mask on
    lengths = torch.tensor([13, 5, 0, 9, 1, 12])
    kept = torch.arange(13) < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(boundaries)
    expected = gae(rewards, values, mask & kept, gamma, gae_lambda, last_value)
    tail = torch.full((3,), NAN, dtype=torch.float64)
    packed = [torch.cat([x[kept], tail]) for x in (rewards, values)]
    packed_mask = torch.cat([mask[kept], torch.ones(3).bool()])
    actual = gae(*packed, packed_mask, gamma, gae_lambda, last_value, cu_seqlens=cu_seqlens)
    assert_same([x[:-3] for x in actual], [x[kept] for x in expected])
    assert not any(x[-3:].any() for x in actual)
    direct = specification(
        *(x[:-3] for x in (*packed, packed_mask)), gamma, gae_lambda, last_value, cu_seqlens=cu_seqlens
    )
    assert_same([x[:-3] for x in actual], direct)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_nan_stays_in_its_sequence(gae_lambda, at):
    rewards, values, mask, last_value = batch()
    mask[:, :3] = True
    expected = gae(rewards, values, mask, 0.9, gae_lambda, last_value)
    rewards[3, at] = NAN
    cu_seqlens = torch.arange(7) * 13
    packed = (rewards.flatten(), values.flatten(), mask.flatten(), 0.9, gae_lambda, last_value)
    others = torch.arange(6) != 3
    for x, y in zip(gae(*packed, cu_seqlens=cu_seqlens), expected, strict=True):
        torch.testing.assert_close(x.reshape(6, 13)[others], y[others], rtol=1e-12, atol=1e-12)
        assert x.reshape(6, 13)[3, at].isnan()


def test_only_truncated_rows_bootstrap():
    rewards, values, mask = torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2).bool()
    advantages, _ = gae(rewards, values, mask, 0.5, 1.0, torch.tensor([8.0, 0.0]))
    assert advantages.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    # the last value of a row without trained tokens is not seen
    advantages, _ = gae(rewards, values, mask & torch.tensor([[True], [False]]), 0.5, 1.0, torch.tensor([8.0, NAN]))
    assert advantages.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_lambda_one_is_the_return_to_go_minus_the_value():
    rewards, values, _, last_value = batch()
    mask = torch.ones_like(rewards).bool()
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0, last_value)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1) + last_value[:, None]
    assert_same((advantages, returns), (to_go - values, to_go))


def test_lambda_zero_is_the_td_error():
    rewards, values, _, last_value = batch()
    advantages, _ = gae(rewards, values, torch.ones_like(rewards).bool(), 0.9, 0.0, last_value)
    next_values = torch.cat([values[:, 1:], last_value[:, None]], dim=1)
    assert_same([advantages], [rewards + 0.9 * next_values - values])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_sequence_agrees_with_a_loop(dtype):
    rewards, values, mask, last_value = batch(rows=1, columns=8192)
    expected, advantage, next_value = torch.zeros(8192, dtype=torch.float64), 0.0, float(last_value)
    for t in mask[0].nonzero().flatten().flip(0).tolist():
        delta = float(rewards[0, t]) + next_value - float(values[0, t])
        advantage, next_value = delta + 0.999 * advantage, float(values[0, t])
        expected[t] = advantage
    advantages, returns = gae(rewards.to(dtype), values.to(dtype), mask, 1.0, 0.999, last_value.to(dtype))
    assert advantages.dtype is returns.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6  # the rounding of the inputs
    scale = float(expected.abs().max())
    torch.testing.assert_close(advantages[0].double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches(shape):
    x, mask = torch.zeros(shape), torch.ones(shape).bool()
    assert [y.shape for y in gae(x, x, mask, 1.0, 0.95, torch.zeros(shape[0]))] == [shape, shape]
    cu_seqlens = torch.zeros(4).long()
    empty = torch.zeros(0)
    for y in gae(empty, empty, empty.bool(), 1.0, 0.95, torch.zeros(3), cu_seqlens=cu_seqlens):
        assert y.shape == (0,)
    for y in gae(torch.ones(2), torch.ones(2), torch.ones(2).bool(), 1.0, 0.95, cu_seqlens=cu_seqlens[:1]):
        assert y.tolist() == [0.0, 0.0]  # all of it tail


def test_no_gradient_flows():
    rewards, values, mask, last_value = batch()
    inputs = [x.requires_grad_() for x in (rewards, values, last_value)]
    assert not any(x.requires_grad for x in gae(inputs[0], inputs[1], mask, 1.0, 0.95, inputs[2]))


def test_last_tokens_by_hand():
    mask = torch.tensor([[True, False, True, False], [False] * 4, [False, False, False, True]])
    expected = [[False, False, True, False], [False] * 4, [False, False, False, True]]
    assert last_tokens(mask).tolist() == expected
    # the second sequence has no tokens, the third no trained one, and the tail belongs to none
    packed = torch.tensor([True, True, False, False, True, True])
    last = last_tokens(packed, torch.tensor([0, 3, 3, 4, 5]))
    assert last.tolist() == [False, True, False, False, True, False]
    assert last_tokens(packed, torch.tensor([0])).tolist() == [False] * 6
    assert last_tokens(torch.ones(2, 0).bool()).shape == (2, 0)


def test_outputs_have_the_dtype_of_the_values():
    rewards, values, mask, last_value = batch()
    outputs = gae(rewards, values.float(), mask, 1.0, 0.95, last_value)
    assert [x.dtype for x in outputs] == [torch.float32] * 2


def test_nothing_waits_for_the_device():
    # a meta tensor has no values: whoever asks for one, raises
    x, mask, last_value = torch.zeros(2, 9, device="meta"), torch.zeros(2, 9, device="meta").bool(), torch.zeros(2)
    assert gae(x, x, mask, 1.0, 0.95, last_value.to("meta"))[0].shape == (2, 9)
    cu_seqlens = torch.zeros(3, device="meta").long()
    packed = gae(x.flatten(), x.flatten(), mask.flatten(), 1.0, 0.95, last_value.to("meta"), cu_seqlens=cu_seqlens)
    assert packed[0].shape == (18,)


# VAPO: a lambda for the critic, and one for each sequence


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("value_lambda", [None, 0.0, 0.7, 1.0])
def test_a_lambda_for_each_sequence_and_one_for_the_critic_agree_with_the_specification(value_lambda, gamma, layout):
    rewards, values, mask, last_value = batch()
    lambdas = torch.tensor([0.0, 0.5, 0.9, 0.95, 1.0, 0.3]).double()
    extra: dict[str, Any] = {"cu_seqlens": torch.arange(7) * 13} if layout == "packed" else {}
    inputs = [x.flatten() for x in (rewards, values, mask)] if layout == "packed" else [rewards, values, mask]
    inputs += [gamma, lambdas, last_value]
    expected = specification(*inputs, value_lambda=value_lambda, **extra)
    assert_same(gae(*inputs, value_lambda=value_lambda, **extra), expected)


def test_a_lambda_for_each_sequence_is_the_same_number_for_all():
    rewards, values, mask, last_value = batch()
    for gae_lambda in (0.0, 0.8, 1.0):
        lambdas = torch.full((6,), gae_lambda, dtype=torch.float64)
        expected = gae(rewards, values, mask, 0.9, gae_lambda, last_value)
        assert_same(gae(rewards, values, mask, 0.9, lambdas, last_value), expected)


def test_a_critics_lambda_of_one_learns_what_was_earned_whatever_the_policys():
    rewards, values, mask, last_value = batch()
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5, last_value, value_lambda=1.0)
    assert_same([advantages], [gae(rewards, values, mask, 0.9, 0.5, last_value)[0]])
    assert_same([returns], [gae(rewards, values, mask, 0.9, 1.0, last_value)[1]])
    no_ends = gae(rewards, values, mask, 0.9, 0.5, value_lambda=1.0)[1]
    assert_same([no_ends], [rlloss.returns_to_go(rewards, mask, 0.9)])


def test_weights_of_a_length_adaptive_lambda_sum_to_a_share_of_the_length():
    mask = torch.arange(400) < torch.tensor([400, 100, 30, 20, 0])[:, None]
    lambdas = rlloss.length_adaptive_lambda(mask, alpha=0.05)
    assert lambdas.tolist() == pytest.approx([0.95, 0.8, 1 / 3, 0.0, 0.0], rel=1e-12)
    assert (1 / (1 - lambdas[:3])).tolist() == pytest.approx([20.0, 5.0, 1.5], rel=1e-12)
    assert torch.equal(rlloss.length_adaptive_lambda(mask), lambdas)
    packed = rlloss.length_adaptive_lambda(mask.flatten(), alpha=0.05, cu_seqlens=torch.arange(6) * 400)
    assert torch.equal(packed, lambdas)
    gapped = mask & (torch.arange(400) % 2 == 0)  # a tool's answers are not the policy's length
    assert rlloss.length_adaptive_lambda(gapped, alpha=0.1)[0] == pytest.approx(0.95)


def test_a_nan_does_not_pass_a_sequence_whose_lambda_is_zero():
    rewards, values, mask, last_value = batch()
    mask[:, :3] = True
    lambdas = torch.tensor([0.9, 0.9, 0.9, 0.0, 0.9, 0.0]).double()
    expected = gae(rewards, values, mask, 0.9, lambdas, last_value)
    rewards[3, 1] = NAN
    actual = gae(rewards, values, mask, 0.9, lambdas, last_value)
    others = torch.arange(6) != 3
    assert_same([x[others] for x in actual], [x[others] for x in expected])
    assert actual[0][3, 1].isnan()


@pytest.mark.parametrize("packed", [True, False])
def test_both_implementations_know_a_lambda_for_each_sequence(triton_device, monkeypatch, packed):
    pytest.importorskip("triton")
    monkeypatch.setattr("rlloss_kernels.gpu.scan.BLOCK", 4)  # several blocks and chunks per row
    monkeypatch.setattr("rlloss_kernels.gpu.scan.STEPS", 1)
    *inputs, last_value = (x.to(triton_device) for x in batch(rows=3))
    inputs = [x.flatten() for x in inputs] if packed else inputs
    layout = {"cu_seqlens": (torch.arange(4) * 13).to(triton_device)} if packed else {}
    lambdas = torch.tensor([0.9, 0.0, 1.0], dtype=torch.float64, device=triton_device)
    options = {"gamma": 0.9, "gae_lambda": lambdas, "last_value": last_value, "value_lambda": 0.5, **layout}
    tiled, triton = (gae(*inputs, impl=impl, **options) for impl in ("tiled", "triton"))
    assert_same(triton, tiled)
    to_go = [rlloss.returns_to_go(inputs[0], inputs[2], 0.9, impl=impl, **layout) for impl in ("tiled", "triton")]
    assert_same(to_go[:1], to_go[1:])


@pytest.mark.unhooked
@pytest.mark.parametrize("per_sequence", [True, False])
def test_one_graph_computes_them(per_sequence):
    compiled = torch.compile(gae, fullgraph=True, dynamic=True, backend="eager")
    for columns in (13, 8):
        rewards, values, mask, last_value = batch(columns=columns)
        gae_lambda = torch.rand(6, generator=torch.Generator().manual_seed(0)).double() if per_sequence else 0.9
        inputs = (rewards, values, mask, 0.95, gae_lambda, last_value)
        assert_same(compiled(*inputs, value_lambda=1.0), gae(*inputs, value_lambda=1.0))


X, MASK = torch.zeros(2, 4), torch.ones(2, 4).bool()
BAD = [
    ({"gamma": 1.1}, "gae: gamma must be a number in [0, 1], got 1.1"),
    ({"gae_lambda": -0.1}, "gae: gae_lambda must be a number in [0, 1], got -0.1"),
    ({"gae_lambda": NAN}, "gae: gae_lambda must be a number in [0, 1], got nan"),
    ({"gae_lambda": X[0]}, "gae: gae_lambda must have the shape of one lambda per sequence, [2], got [4]"),
    ({"value_lambda": 1.5}, "gae: value_lambda must be a number in [0, 1], got 1.5"),
    ({"rewards": X[0]}, "gae: rewards must have the shape of loss_mask, [2, 4], got [4]"),
    ({"values": X[:, :3]}, "gae: values must have the shape of loss_mask, [2, 4], got [2, 3]"),
    ({"values": X.bfloat16()}, "gae: values must be float32 or float64, got torch.bfloat16"),
    ({"loss_mask": MASK.float()}, "gae: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    ({"loss_mask": MASK[0]}, "gae: a packed loss_mask [4] needs cu_seqlens"),
    ({"last_value": X}, "gae: last_value must have the shape of one value per sequence, [2], got [2, 4]"),
    ({"last_value": 0.0}, "gae: last_value must be a tensor, got float"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_input_teaches(bad, message):
    good: dict[str, Any] = {"rewards": X, "values": X, "loss_mask": MASK, "gamma": 1.0, "gae_lambda": 0.95}
    with pytest.raises(ValueError, match=re.escape(message)):
        gae(**good | bad)
    with pytest.raises(ValueError, match=r"length_adaptive_lambda: alpha must be a number in \(0, inf\], got 0"):
        rlloss.length_adaptive_lambda(MASK, alpha=0)
