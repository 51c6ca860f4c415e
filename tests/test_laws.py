"""The laws of the protocol for each line of the table in loss_cases.py; laws 6, 7 and 8 have files of their own."""

import itertools
import math

import numpy as np
import pytest
import torch

import rlloss
from rlloss import LossOutput, merge_metrics, waist_gradient

EXACT = 1e-12


def assert_same(actual, expected, terms):
    """Loss, gradient and metrics agree to 1e-12 of the sum of absolute terms."""
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert abs(out.loss - expected_out.loss) <= EXACT * terms
    for name, grad in grads.items():
        limit = EXACT * float(expected_grads[name].abs().sum())
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=limit, msg=name)
    assert out.metrics.keys() == expected_out.metrics.keys()
    for name, metric in out.metrics.items():
        assert type(metric) is type(expected_out.metrics[name])
        for x, expected_x in zip(metric, expected_out.metrics[name], strict=True):
            torch.testing.assert_close(x, expected_x, rtol=EXACT, atol=EXACT, check_dtype=False, msg=name)


def assert_identical(actual, expected):
    """Loss, gradient and metrics agree to the bit, and none is NaN."""
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert_bits("loss", out.loss, expected_out.loss)
    for name, grad in grads.items():
        assert_bits(name, grad, expected_grads[name])
    assert out.metrics.keys() == expected_out.metrics.keys()
    for name, metric in out.metrics.items():
        for x, expected_x in zip(metric, expected_out.metrics[name], strict=True):
            assert_bits(name, x, expected_x)


def assert_bits(name, x, expected):
    assert not x.isnan().any(), name
    bits = torch.int32 if x.dtype is torch.float32 else x.dtype
    assert torch.equal(x.view(bits), expected.view(bits)), name


def assert_finite(out, grads):
    assert out.loss.isfinite()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    for name, value in rlloss.scalars(out.metrics).items():
        assert math.isfinite(value), name


def per_token(statistics):
    """What goes with its tokens into every part of a step."""
    return {name: x for name, x in statistics.items() if x.ndim}


def the_rest(statistics):
    return {name: x for name, x in statistics.items() if not x.ndim}


def accumulated(case, step, ranks, layout):
    """A step cut into ranks of micro-batches and put together again, as the loss's `exactness` prescribes."""
    loss_fn, leaves = case(), step.leaves()
    statistics = loss_fn.statistics(**step) if loss_fn.exactness == "statistic" else {}
    leaves, statistics = leaves.but(**per_token(statistics)), the_rest(statistics)
    parts = [[layout(leaves.rows(rows)) for rows in rank] for rank in ranks]
    if loss_fn.exactness == "waist":
        names = list(step.waist)
        out, grads = waist_gradient(
            lambda *x: loss_fn(**step.but(**dict(zip(names, x, strict=True)))), *step.waist.values()
        )
        for rows in itertools.chain(*ranks):
            torch.autograd.backward(list(leaves.rows(rows).waist.values()), [grad[rows] for grad in grads])
        return out, leaves.gradients
    normalizer = sum(sum(part.counts for part in rank) for rank in parts)
    outs = [[loss_fn(**part, normalizer=normalizer, **statistics) for part in rank] for rank in parts]
    loss = torch.stack([out.loss for rank in outs for out in rank]).sum()
    loss.backward()
    metrics = merge_metrics(merge_metrics(out.metrics for out in rank) for rank in outs)
    return LossOutput(loss, metrics), leaves.gradients


def random_ranks(seed, rows=6):
    """Two ranks of two micro-batches each; some may hold no row."""
    rng = np.random.default_rng(seed)
    parts = [part.tolist() for part in np.split(rng.permutation(rows), np.sort(rng.integers(0, rows + 1, size=3)))]
    return [parts[:2], parts[2:]]


UNEVEN = [[[4, 0], [2], [1, 3, 5]]]  # the micro-batch in the middle holds no trained token
RANKS = [UNEVEN, [[[0], [1], [2]], [[3], [4], [5]]], random_ranks(0), random_ranks(1), random_ranks(2)]


@pytest.mark.parametrize("layout", [lambda part: part, lambda part: part.packed(tail=2)], ids=["padded", "packed"])
def test_law_1_any_partition_is_exact(case, layout):
    step = case.step()
    whole, terms = case.run(step), case.absolute_terms(step)
    for ranks in RANKS:
        assert_same(accumulated(case, step, ranks, layout), whole, terms)


def test_law_1_a_partition_without_the_normalizer_is_not(case):
    if case.options.get("reduction") == "sum":
        pytest.skip("`sum` divides by nothing")
    step = case.step()
    whole = case()(**step).loss
    parts = torch.stack([case()(**step.rows(rows)).loss for rows in UNEVEN[0]])
    for joined in (parts.sum(), parts.mean()):
        assert abs(joined - whole) > 1e-3 * parts.abs().sum()


@pytest.mark.parametrize("case", ["aot_unpaired"], indirect=True)
def test_law_1_a_loss_whose_rows_meet_needs_the_waist(case):
    step = case.step()
    parts = [case()(**step.rows(rows), normalizer=step.counts).loss for rows in UNEVEN[0]]
    assert abs(torch.stack(parts).sum() - case()(**step).loss) > 1e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("packed", [False, True])
def test_law_2_what_is_masked_changes_no_bit(case, poison, packed):
    def step(value):
        filled = case.step().to(torch.float32).poisoned(value)
        return filled.packed(tail=3, fill=value) if packed else filled

    out, grads = case.run(step(poison))
    assert_identical((out, grads), case.run(step(0.5)))
    for name, grad in grads.items():
        assert not grad[~step(poison).mask].any(), name


def test_law_2_weight_zero_rejects_whatever_stands_there(case):
    step = case.step().to(torch.float32)
    weights = step.keys() & {"weights", "token_weights"}
    if not weights:
        pytest.skip("takes no weights")
    rejected = torch.zeros_like(step.mask)
    rejected[1] = True  # a whole row, because a ratio of the sequence sees all of its row
    of_rank = {rejected.ndim: rejected, 1: rejected if rejected.ndim == 1 else rejected.any(-1)}
    step = step.but(**{name: step[name].masked_fill(of_rank[step[name].ndim], 0) for name in weights})
    out, grads = case.run(step)
    unweighted = {"entropy", *weights, *(name for name, x in step.items() if x.ndim == 0)}
    if case.name.startswith("conservative_ppo"):
        unweighted |= {"logprobs", "old_logprobs", "ref_logprobs"}  # the hinge sees every token
    for name in {**step.waist, **step.constants}.keys() - unweighted:
        for value in (math.inf, -math.inf, 1e30, -1e30):
            strange_out, strange_grads = case.run(step.but(**{name: step[name].masked_fill(rejected, value)}))
            assert torch.equal(strange_out.loss, out.loss), (name, value)
            for k, grad in strange_grads.items():
                assert torch.equal(grad, grads[k]), (name, value, k)


NOTHING = {
    "all_masked": lambda case: case.step().rows([2, 2]),
    "all_masked_and_packed": lambda case: case.step().rows([2, 2]).packed(tail=3),
    "no_rows": lambda case: case.step(rows=0),
    "no_columns": lambda case: case.step(rows=3, columns=0),
    "no_sequences": lambda case: case.step(rows=0).packed(),
    "no_sequences_but_a_tail": lambda case: case.step(rows=0).packed(tail=3),
}


@pytest.mark.parametrize("nothing", NOTHING.values(), ids=NOTHING)
def test_law_3_nothing_is_exactly_zero(case, nothing):
    step = nothing(case)
    assert not step.mask.any()
    out, grads = case.run(step)
    assert out.loss == 0
    assert not any(grad.any() for grad in grads.values())
    assert_finite(out, grads)
    if case().exactness == "statistic":
        assert not any(x.any() for x in case().statistics(**step).values())


@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4, -1e4])
def test_law_4_extreme_log_ratios_stay_finite(case, nats):
    step = case.step().to(torch.float32)
    for name in step.keys() & {"logprobs", "old_logprobs", "ref_logprobs", "chosen_logps", "ref_rejected_logps"}:
        extreme = step[name].clone()
        extreme[[0, 3]] += nats
        out, grads = case.run(step.but(**{name: extreme}))
        assert_finite(out, grads)
        if "bounded_frac" in out.metrics and name != "ref_logprobs":
            beyond = step.mask[[0, 3]].sum() / step.mask.sum()
            assert float(out.metrics["bounded_frac"]) == pytest.approx(float(beyond))


def test_law_4_extremes_may_meet(case):
    step = case.step().to(torch.float32)
    far = {"old_logprobs": -100.0, "ref_logprobs": 100.0, "ref_chosen_logps": -100.0, "ref_rejected_logps": 100.0}
    assert_finite(*case.run(step.but(**{name: step[name] + nats for name, nats in far.items() if name in step})))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_law_4_identical_rewards_have_no_advantage(scale):
    rewards, group_ids = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert not rlloss.group_advantages(rewards, group_ids, scale).any()


LAYOUTS = {
    "right_padding": lambda step: step.padded(0, 4, fill=math.nan),
    "left_padding": lambda step: step.padded(3, 0, fill=math.nan),
    "packed": lambda step: step.packed(),
    "packed_with_a_tail": lambda step: step.packed(tail=5, fill=math.nan),
    "reversed_rows": lambda step: step.rows([5, 4, 3, 2, 1, 0]),
    "shuffled_rows_packed": lambda step: step.rows([2, 5, 0, 3, 1, 4]).packed(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_law_5_layout_changes_nothing(case, layout):
    step = case.step()
    if case().exactness == "statistic":  # a choice among the step's tokens is made once and goes with them
        step = step.but(**per_token(case().statistics(**step)))
    leaves = step.leaves()
    out = case()(**layout(leaves))
    out.loss.backward()
    assert_same((out, leaves.gradients), case.run(step), case.absolute_terms(step))


def test_law_9_constants_get_no_gradient(case):
    step = case.step()
    out, grads = case.run(step)
    leaves = step.leaves()
    first = next(iter(leaves.waist.values()))
    # what a caller who forgot to detach passes: the same values, that depend on the parameters
    zero = first - first.detach()
    entangled = {k: x + (zero if x.ndim == zero.ndim else zero.sum(-1)) for k, x in step.constants.items()}
    for x in entangled.values():
        x.retain_grad()
    entangled_out = case()(**leaves.but(**entangled))
    entangled_out.loss.backward()
    assert_same((entangled_out, leaves.gradients), (out, grads), float(out.loss.detach().abs()))
    for name, constant in entangled.items():
        assert constant.grad is None, name
    for name, metric in entangled_out.metrics.items():
        assert not any(x.requires_grad for x in metric), name


def test_law_9_statistics_carry_no_gradient(case):
    if case().exactness != "statistic":
        pytest.skip("needs no statistics")
    leaves = case.step().leaves()
    statistics = case().statistics(**leaves)
    assert not any(x.requires_grad for x in statistics.values())
    given = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in statistics.items()}
    case()(**leaves, **given).loss.backward()
    assert all(x.grad is None for x in given.values())


def test_a_loss_changes_neither_its_inputs_nor_itself(case):
    step, loss_fn = case.step(), case()
    before, hyperparameters = step.map(torch.clone), repr(loss_fn)
    loss_fn(**step)
    assert all(torch.equal(x, before[name]) for name, x in step.items())
    assert repr(loss_fn) == hyperparameters


def test_the_table_holds_every_registered_loss(cases):
    assert set(rlloss.list_losses()) <= {case.file for case in cases}
