"""Off-policy corrections: weights against the specification, layouts, merging, bounds and teaching errors."""

import math
from typing import Any

import pytest
import torch

import rlloss
import rlloss.reference
from rlloss import Correction, EffectiveSampleSize, GRPOLoss, PPOLoss, importance_correction, top_entropy_correction

BOUNDS = {"ratio_min": 0.85, "ratio_max": 1.15}
LEVELS = ("token", "sequence", "geometric", "segment")
KINDS = ("tis", "mis", "icepop", "reject")


def corrected(step: dict[str, Any], **options: Any) -> Correction:
    return importance_correction(**step, **options)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def step() -> dict[str, Any]:
    mask = draws(5, 8, seed=3) > -0.6
    mask[2] = False
    old = -draws(5, 8).abs()
    return {"old_logprobs": old, "rollout_logprobs": old + draws(5, 8, seed=1), "loss_mask": mask}


def packed(step):
    """One row after the other, with what lies between a row's trained tokens, and three positions behind."""
    mask = step["loss_mask"]
    cut = mask.flip(-1).cumsum(-1).flip(-1) > 0
    cu_seqlens = torch.nn.functional.pad(cut.sum(-1).cumsum(0), (1, 0))
    tail = torch.full((3,), 7)
    return {name: torch.cat([x[cut], tail.to(x.dtype)]) for name, x in step.items()} | {"cu_seqlens": cu_seqlens}, cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("with_ids", [False, True])
def test_weights_are_the_specifications_in_every_layout(step, kind, level, with_ids):
    step["log_kept_mass"] = -0.1 * draws(5, 8, seed=2).abs()
    if with_ids:
        if level != "segment":
            pytest.skip("ids are for segments")
        step["segment_ids"] = torch.arange(8).expand(5, 8) // 3
    correction = corrected(step, kind=kind, level=level, **BOUNDS)
    arrays = {name: x.numpy() for name, x in step.items()}
    expected = rlloss.reference.importance_weights(**arrays, kind=kind, level=level, **BOUNDS)
    torch.testing.assert_close(correction.weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    flat, cut = packed(step)
    of_pack = corrected(flat, kind=kind, level=level, **BOUNDS)
    torch.testing.assert_close(of_pack.weights[:-3], correction.weights[cut], rtol=1e-12, atol=1e-14)
    assert not of_pack.weights[-3:].any()
    for name, metric in correction.metrics.items():
        assert float(of_pack.metrics[name]) == pytest.approx(float(metric), rel=1e-12, abs=1e-14), name
    assert float(correction.metrics["rollout_clip_frac"]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_keep_says_who_is_rejected(step, kind):
    correction = corrected(step, kind=kind, **BOUNDS)
    rejected = ~correction.keep & step["loss_mask"]
    assert rejected.any() == (kind != "tis")
    assert not correction.weights[rejected].any()
    assert correction.weights[correction.keep].all()


def test_the_raw_statistics_are_those_before_the_bounds(step):
    ratio = (step["old_logprobs"] - step["rollout_logprobs"]).exp()[step["loss_mask"]]
    metrics = rlloss.scalars(corrected(step, kind="icepop", ratio_min=0.9, ratio_max=1.1).metrics)
    assert metrics["rollout_ratio"] == pytest.approx(float(ratio.mean()))
    assert metrics["rollout_ratio_std"] == pytest.approx(float(ratio.std(correction=0)))
    assert metrics["rollout_ratio_max"] == pytest.approx(float(ratio.max()))
    assert metrics["rollout_ratio_min"] == pytest.approx(float(ratio.min()))
    assert metrics["rollout_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()))
    within = ((ratio >= 0.9) & (ratio <= 1.1)).double()
    assert metrics["rollout_kept_frac"] == pytest.approx(float(within.mean()))
    kept = ratio * within
    assert metrics["rollout_ess"] == pytest.approx(float(kept.sum() ** 2 / kept.square().sum() / len(kept)))


def test_metrics_merge_over_any_parts(step):
    whole = corrected(step, **BOUNDS).metrics
    rows = [{name: x[i : i + 1] for name, x in step.items()} for i in range(5)]
    merged = rlloss.merge_metrics(corrected(row, **BOUNDS).metrics for row in rows)
    for name, value in rlloss.scalars(whole).items():
        assert rlloss.scalars(merged)[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_changes_no_bit(step, level, poison):
    mask = step["loss_mask"]
    strange = {name: x if x is mask else torch.where(mask, x, poison) for name, x in step.items()}
    clean, seen = (corrected(x, level=level, **BOUNDS) for x in (step, strange))
    assert torch.equal(clean.weights, seen.weights)
    assert rlloss.scalars(clean.metrics) == rlloss.scalars(seen.metrics)


@pytest.mark.parametrize("missing", [math.nan, -math.inf, math.inf])
def test_a_missing_logprob_counts_as_ratio_one_and_is_told(step, missing):
    step["loss_mask"][0] = True
    step["rollout_logprobs"][0, 3] = missing
    correction = corrected(step, kind="mis", ratio_max=1.2)
    assert correction.weights[0, 3] == 1
    assert float(correction.metrics["rollout_missing_frac"]) == pytest.approx(1 / float(step["loss_mask"].sum()))
    step["rollout_logprobs"][0, 3] = step["old_logprobs"][0, 3]
    same = corrected(step, kind="mis", ratio_max=1.2)
    assert torch.equal(correction.weights, same.weights)


def test_extremes_stay_finite_and_nothing_is_nothing():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for nats in (100.0, -100.0, 1e4):
        for level in LEVELS:
            c = importance_correction(torch.zeros(2, 3), torch.full((2, 3), nats), mask, level=level, ratio_max=1e9)
            assert c.weights.isfinite().all()
            assert all(math.isfinite(value) for value in rlloss.scalars(c.metrics).values())
    for empty in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool)):
        for level in LEVELS:
            c = importance_correction(torch.zeros(empty.shape), torch.zeros(empty.shape), empty, level=level)
            assert not c.weights.any()
            assert all(value == 0 for value in rlloss.scalars(c.metrics).values())


def test_the_bounds_that_are_not_given():
    old, mask = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    rollout = -torch.tensor([[0.4, 2.5, 5.5, 1e-3]], dtype=torch.float64).log()
    expected = {"tis": [0.4, 2.0, 2.0, 1e-3], "mis": [0.4, 0.0, 0.0, 1e-3], "icepop": [0.0, 2.5, 0.0, 0.0]}
    for kind, weights in expected.items():
        found = corrected({"old_logprobs": old, "rollout_logprobs": rollout, "loss_mask": mask}, kind=kind).weights
        torch.testing.assert_close(found, torch.tensor([weights], dtype=torch.float64))


def test_nothing_carries_a_gradient(step):
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in step.items()}
    correction = corrected(inputs, **BOUNDS)
    assert not correction.weights.requires_grad
    assert not any(x.requires_grad for metric in correction.metrics.values() for x in metric)


def test_the_kept_mass_makes_the_mean_ratio_one():
    p = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    kept = torch.tensor([True, True, False, False])
    drawn = torch.where(kept, p, 0) / p[kept].sum()  # what top-p 0.8 draws from
    old, rollout = p[kept].log()[None], drawn[kept].log()[None]
    mask, mass = torch.ones(1, 2, dtype=torch.bool), p[kept].sum().log().expand(1, 2)

    def mean_ratio(**more):
        return float((drawn[kept] * importance_correction(old, rollout, mask, **more).weights).sum())

    assert mean_ratio() == pytest.approx(0.8)
    assert mean_ratio(log_kept_mass=mass) == pytest.approx(1.0)


def test_a_product_applies_both(step):
    tokens = corrected(step, **BOUNDS)
    filtered = importance_correction(
        **step, kind="reject", level="geometric", ratio_min=0.9, ratio_max=1.1, name="filter"
    )
    both = tokens * filtered
    assert torch.equal(both.weights, torch.where(filtered.keep, tokens.weights, 0))
    assert torch.equal(both.keep, filtered.keep & tokens.keep)
    assert {"rollout_ess", "filter_kept_frac"} <= both.metrics.keys()
    with pytest.raises(ValueError, match="give one of them another name"):
        _ = tokens * tokens


def test_rejection_keeps_the_denominator(step):
    mask, logprobs = step["loss_mask"], step["old_logprobs"]
    correction = corrected(step, kind="reject", **BOUNDS)
    advantages = draws(5, seed=8)
    for loss_fn in (GRPOLoss(), PPOLoss()):
        weighted = loss_fn(logprobs, logprobs, advantages, mask, token_weights=correction.weights)
        terms = torch.where(correction.keep, -advantages[:, None].expand(mask.shape), 0)
        expected = rlloss.reduce_tokens(terms, mask, loss_fn.reduction)
        torch.testing.assert_close(weighted.loss, expected)


# which tokens of a step have a high entropy


def test_top_entropy_is_the_specifications_and_parts_share_its_threshold():
    entropy, mask = draws(5, 8, seed=4).abs(), draws(5, 8, seed=5) > -0.6
    for fraction in (0.05, 0.2, 0.5, 1.0):
        found = top_entropy_correction(entropy, mask, fraction)
        expected = rlloss.reference.top_entropy(entropy.numpy(), mask.numpy(), fraction)
        assert found.keep.tolist() == expected
        assert found.keep.sum() == math.ceil(fraction * int(mask.sum()) - 1e-9)
        threshold = found.metrics["top_entropy_threshold"].value
        parts = [
            top_entropy_correction(entropy[i : i + 1], mask[i : i + 1], fraction, threshold=threshold) for i in range(5)
        ]
        assert torch.equal(torch.cat([part.keep for part in parts]), found.keep)
    flat, cut = packed({"entropy": entropy, "loss_mask": mask})
    of_pack = top_entropy_correction(flat["entropy"], flat["loss_mask"], 0.2, cu_seqlens=flat["cu_seqlens"])
    assert torch.equal(of_pack.keep[:-3], top_entropy_correction(entropy, mask, 0.2).keep[cut])


def test_top_entropy_sees_no_masked_entry_and_may_find_none():
    entropy, mask = torch.tensor([[math.nan, 1.0, math.inf, 0.5]]), torch.tensor([[False, True, False, True]])
    assert top_entropy_correction(entropy, mask, 0.5).weights.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    for none in (torch.zeros(1, 4, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.bool)):
        found = top_entropy_correction(torch.zeros(none.shape), none, 0.2)
        assert not found.weights.any()
        assert all(value == 0 for value in rlloss.scalars(found.metrics).values())


def test_seven_hundredths_of_a_hundred_tokens_are_seven():
    entropy = torch.arange(100.0)[None]
    assert 0.07 * 100 > 7  # in floating point
    assert top_entropy_correction(entropy, entropy >= 0, 0.07).keep.sum() == 7


def test_effective_sample_size_merges():
    weights, mask = draws(40, seed=6).abs(), draws(40, seed=7) > -0.5
    whole = EffectiveSampleSize.of(weights, mask)
    parts = sum(EffectiveSampleSize.of(w, m) for w, m in zip(weights.chunk(7), mask.chunk(7), strict=True))
    w = weights[mask]
    assert float(whole) == pytest.approx(float(w.sum() ** 2 / (len(w) * w.square().sum())), rel=1e-12)
    assert float(parts) == pytest.approx(float(whole), rel=1e-12)
    assert float(EffectiveSampleSize.of(torch.ones(4), torch.ones(4).bool())) == 1


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tiss"}, "kind must be one of"),
        ({"level": "turn"}, "level must be one of"),
        ({"kind": "reject"}, "kind='reject' needs ratio_min and ratio_max"),
        ({"ratio_max": 0.5}, "ratio_max must be a number in [1"),
        ({"ratio_min": 1.5}, "ratio_min must be a number in [0"),
        ({"segment_ids": torch.zeros(5, 8, dtype=torch.long)}, "segment_ids are for level='segment'"),
        ({"segment_ids": torch.zeros(5, 8), "level": "segment"}, "segment_ids must be integers"),
        ({"log_kept_mass": torch.zeros(5)}, "log_kept_mass must have the shape of loss_mask"),
        ({"max_log_ratio": 30.0}, "max_log_ratio must be a number in (0, 20]"),
    ],
)
def test_bad_corrections_teach(step, options, message):
    with pytest.raises(ValueError, match="importance_correction: ") as raised:
        corrected(step, **options)
    assert message in str(raised.value)


@pytest.mark.unhooked
def test_bad_selections_teach():
    entropy, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\]"):
        top_entropy_correction(entropy, mask, 0.0)
    with pytest.raises(ValueError, match="threshold must be a 0-dim tensor"):
        top_entropy_correction(entropy, mask, threshold=0.1)  # type: ignore[arg-type]


@pytest.mark.unhooked
def test_corrections_compile_into_one_graph(step):
    compiled: Any = torch.compile(importance_correction, fullgraph=True, backend="aot_eager", dynamic=True)
    entropies = torch.compile(top_entropy_correction, fullgraph=True, backend="aot_eager", dynamic=True)
    for level in LEVELS:
        found = compiled(**step, kind="icepop", level=level, **BOUNDS)
        torch.testing.assert_close(found.weights, corrected(step, kind="icepop", level=level, **BOUNDS).weights)
    entropy, mask = draws(5, 8).abs(), step["loss_mask"]
    assert torch.equal(entropies(entropy, mask).keep, top_entropy_correction(entropy, mask).keep)
