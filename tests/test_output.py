"""Metrics that merge exactly, and the small algebra of LossOutput."""

import math
from functools import reduce
from operator import add

import pytest
import torch
from torch.utils import _pytree as pytree

from rlloss import (
    ExplainedVariance,
    LossOutput,
    Max,
    Mean,
    Min,
    Moments,
    combine,
    merge_metrics,
    scalars,
    waist_gradient,
)

KINDS = [Mean, Moments, Max, Min]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Mean, 3.0), (Moments, 3.0), (Max, 6.0), (Min, 1.0)],  # of 1, 2, 6
)
def test_a_metric_reads_what_is_not_masked(kind, expected):
    values = torch.tensor([[1.0, math.nan, 2.0], [-math.inf, 6.0, 1e30]])
    metric = kind.of(values, torch.tensor([[True, False, True], [False, True, False]]))
    assert float(metric) == float(metric.value) == expected


def test_moments_have_the_population_deviation():
    moments = Moments.of(torch.tensor([1.0, 3.0, 5.0, 99.0]), torch.tensor([True, True, True, False]))
    assert float(moments.std) == pytest.approx(math.sqrt((4 + 0 + 4) / 3))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_reads_zero_and_has_no_vote(kind):
    nothing = kind.of(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool))
    no_tokens = kind.of(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert float(nothing) == float(no_tokens) == 0
    something = kind.of(torch.tensor([-2.0, -4.0]), torch.tensor([True, True]))
    for merged in (nothing + something, something + nothing, no_tokens + something):
        assert float(merged) == float(something)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[7, 1, 0, 12], [1] * 20, [19, 1]])
def test_parts_merge_to_the_whole(kind, sizes):
    values, mask = draws(20), draws(20, seed=1) > -0.5
    parts = [kind.of(v, m) for v, m in zip(values.split(sizes), mask.split(sizes), strict=True)]
    whole = kind.of(values, mask)
    merged, backwards = reduce(add, parts), reduce(add, reversed(parts))
    for field, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(tuple(backwards), tuple(whole), rtol=1e-13, atol=1e-13)


def test_moments_merge_far_from_zero():
    values = 1e6 + draws(1000)
    everything = torch.ones(1000, dtype=torch.bool)
    merged = reduce(add, map(Moments.of, values.split(10), everything.split(10)))
    assert float(merged.std) == pytest.approx(float(values.std(correction=0)), rel=1e-9)


def test_a_constant_merges_to_itself():
    parts = [Mean.constant(0.25, torch.tensor(n)) for n in (3, 0, 5)]
    assert float(sum(parts)) == 0.25
    assert float(parts[1]) == 0
    assert int(reduce(add, parts).count) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_detached_pytrees(kind):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    metric = kind.of(x, torch.tensor([True, True]))
    leaves, spec = pytree.tree_flatten(metric)
    assert all(isinstance(leaf, torch.Tensor) and not leaf.requires_grad for leaf in leaves)
    assert type(pytree.tree_unflatten(leaves, spec)) is kind


# explained variance


def explained(predictions, targets, mask=None, dtype=torch.float64):
    predictions, targets = torch.tensor(predictions, dtype=dtype), torch.tensor(targets, dtype=dtype)
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return ExplainedVariance.of(predictions, targets, mask)


@pytest.mark.parametrize(
    ("predictions", "targets", "expected"),
    [
        ([1.0, 5.0, -2.0], [1.0, 5.0, -2.0], 1.0),
        ([11.0, 15.0, 8.0], [1.0, 5.0, -2.0], 1.0),  # a constant bias leaves no variance
        ([4.0, 4.0, 4.0], [1.0, 5.0, -2.0], 0.0),  # a constant explains nothing
        ([-1.0, 1.0], [1.0, -1.0], -3.0),  # errors 2 and -2: 1 - 4 / 1
        ([0.0, 2.0, 0.0, 2.0], [1.0, 2.0, 3.0, 6.0], 1 - 10 / 14),  # squares about 3: 14; errors 1, 0, 3, 4: 10
    ],
    ids=["perfect", "biased", "constant", "worse_than_constant", "fair"],
)
def test_explained_variance_by_hand(predictions, targets, expected):
    metric = explained(predictions, targets)
    assert float(metric) == float(metric.value) == pytest.approx(expected, rel=1e-14, abs=1e-14)
    assert scalars({"explained_variance": metric}) == {"explained_variance": float(metric)}


def test_explained_variance_ignores_what_is_masked():
    masked = explained([0.0, math.nan, 2.0, 9.0], [1.0, 7.0, 2.0, -math.inf], [True, False, True, False])
    assert float(masked) == float(explained([0.0, 2.0], [1.0, 2.0])) == 0.0  # errors 1 and 0, targets 1 and 2


@pytest.mark.parametrize("sizes", [[7, 1, 0, 12], [1] * 20, [19, 1]])
def test_explained_variance_merges_to_the_whole(sizes):
    targets, mask = 5 + draws(20), draws(20, seed=1) > -0.5
    predictions = targets + 0.5 * draws(20, seed=2) - 3
    whole = ExplainedVariance.of(predictions, targets, mask)
    split = zip(predictions.split(sizes), targets.split(sizes), mask.split(sizes), strict=True)
    parts = [ExplainedVariance.of(*part) for part in split]
    kept, error = targets[mask], (targets - predictions)[mask]
    expected = 1 - float(error.var(correction=0) / kept.var(correction=0))
    for ordered in (parts, parts[::-1], parts[1::2] + parts[::2]):
        merged = reduce(add, ordered)
        torch.testing.assert_close(tuple(merged), tuple(whole), rtol=1e-12, atol=1e-12)
        assert float(merged) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e6 / 3])
def test_targets_that_do_not_vary_leave_nothing_to_explain(constant, dtype):
    targets = torch.full((1001,), constant, dtype=dtype)
    predictions, mask = draws(1001).to(dtype), draws(1001, seed=1) > -1
    assert float(ExplainedVariance.of(predictions, targets, mask)) == 0
    split = zip(predictions.split(7), targets.split(7), mask.split(7), strict=True)
    assert float(sum(ExplainedVariance.of(*part) for part in split)) == 0
    assert float(explained([2.0], [5.0])) == 0


def test_explained_variance_of_nothing_reads_zero_and_has_no_vote():
    nothing = explained([math.nan, 1.0], [math.inf, 1.0], [False, False])
    no_tokens = explained([], [])
    something = explained([0.0, 2.0, 0.0, 2.0], [1.0, 2.0, 3.0, 6.0])
    assert float(nothing) == float(no_tokens) == 0
    for merged in (nothing + something, something + nothing, no_tokens + something):
        assert float(merged) == float(something)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_explained_variance_far_from_zero_in_float32(offset):
    # targets 0, 1, 2, 3 and errors 0, 0, 0, 2 above an offset: 1 - 3 / 5; a difference of squares would keep no digit
    targets = [offset + x for x in (0.0, 1.0, 2.0, 3.0)]
    predictions = [*targets[:3], targets[3] - 2]
    whole = explained(predictions, targets, dtype=torch.float32)
    assert float(whole) == pytest.approx(0.4, rel=1e-6)
    halves = [explained(predictions[i : i + 2], targets[i : i + 2], dtype=torch.float32) for i in (0, 2)]
    assert float(halves[0] + halves[1]) == pytest.approx(0.4, rel=1e-6)


def test_explained_variance_is_a_detached_pytree():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    metric = ExplainedVariance.of(x, x + x.detach(), x > 0)
    leaves, spec = pytree.tree_flatten(metric)
    assert len(leaves) == 5
    assert not any(leaf.requires_grad for leaf in leaves)
    assert type(pytree.tree_unflatten(leaves, spec)) is ExplainedVariance


def test_a_metric_does_not_add_a_number():
    with pytest.raises(TypeError):
        _ = 1 + Max(torch.tensor(1.0))


def test_merge_metrics_takes_parts_with_different_keys():
    a, b = Mean(torch.tensor(1.0), torch.tensor(1)), Mean(torch.tensor(5.0), torch.tensor(2))
    merged = merge_metrics([{"x": a}, {}, {"x": b, "y": b}])
    assert scalars(merged) == {"x": 2.0, "y": 2.5}
    assert merge_metrics([]) == {}


def test_scalars_keep_the_widest_precision_and_add_deviations():
    everything = torch.tensor([True, True])
    metrics = {
        "wide": Max.of(torch.tensor([0.1, 0.2], dtype=torch.float64), everything),
        "narrow": Min.of(torch.tensor([0.5, 0.75]), everything),
        "spread": Moments.of(torch.tensor([1.0, 3.0]), everything),
    }
    assert scalars(metrics) == {"wide": 0.2, "narrow": 0.5, "spread": 2.0, "spread_std": 1.0}
    assert scalars({}) == {}


def test_a_factor_scales_the_loss_alone():
    out = LossOutput(torch.tensor(3.0), {"x": Max(torch.tensor(2.0))})
    for scaled in (0.5 * out, out * 0.5, out * torch.tensor(0.5)):
        assert float(scaled.loss) == 1.5
        assert scaled.metrics is out.metrics


def test_combine_adds_losses_and_names_their_metrics():
    x = torch.tensor(2.0, requires_grad=True)
    policy = LossOutput(x * 3, {"ratio": Max(torch.tensor(1.0))})
    nll = LossOutput(x * x, {"nll": Max(torch.tensor(4.0))})
    out = combine(policy=policy, nll=0.5 * nll)
    assert out.loss.item() == 8.0  # 6 + 0.5 * 4
    assert torch.autograd.grad(out.loss, x)[0].item() == 5.0  # 3 + 0.5 * 2 * 2
    assert scalars(out.metrics) == {"policy/ratio": 1.0, "nll/nll": 4.0}


def test_waist_gradient_is_autograds_and_leaves_the_callers_graph_alone():
    x, y, unused = draws(4).requires_grad_(), draws(4, seed=1), draws(2)

    def loss(x, y, unused):
        return LossOutput((x * y.sort().values).sum(), {"largest": Max.of(x, x > -9)})

    with torch.no_grad():
        out, (x_grad, y_grad, unused_grad) = waist_gradient(loss, x, y, unused)
    expected = loss(x, y, unused)
    assert torch.equal(out.loss, expected.loss)
    assert not out.loss.requires_grad
    assert out.metrics == expected.metrics
    assert torch.equal(x_grad, y.sort().values)
    assert torch.equal(y_grad, x.detach()[y.argsort().argsort()])
    assert not unused_grad.any()
    assert x.grad is None
