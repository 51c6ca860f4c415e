"""Off-policy corrections: what a token's term counts, given the policy that really sampled it."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float, Int
from rlloss.divergence import kl_k3
from rlloss.output import EffectiveSampleSize, Max, Mean, Metric, Min, Moments
from rlloss.reduce import sequence_mean, sequence_sum, to_tokens, within_sequences, zero_masked
from rlloss.surrogate import bounded

__all__ = ["Correction", "CorrectionKind", "CorrectionLevel", "importance_correction", "top_entropy_correction"]

CorrectionKind = Literal["tis", "mis", "icepop", "reject"]
CorrectionLevel = Literal["token", "sequence", "geometric", "segment"]

_BOUNDS = {"tis": (0.0, 2.0), "mis": (0.0, 2.0), "icepop": (0.5, 5.0)}


class Correction(NamedTuple):
    """What a token counts: pass `weights` as `token_weights`. `a * b` applies both; each keeps its metrics' names.

    A correction scales numerators alone: a rejected token (`keep` False, weight 0) stays in the mask and in every
    count, so that rejecting many tokens makes a small step and not a large one out of the few that are left.
    """

    weights: Float[Tensor, "*tokens"]
    keep: Bool[Tensor, "*tokens"]
    metrics: dict[str, Metric]

    def __mul__(self, other: "Correction") -> "Correction":  # pyright: ignore[reportIncompatibleMethodOverride]
        twice = self.metrics.keys() & other.metrics.keys()
        if twice:
            raise ValueError(f"Correction: both have the metrics {sorted(twice)}; give one of them another name=")
        return Correction(self.weights * other.weights, self.keep & other.keep, self.metrics | other.metrics)


def importance_correction(
    old_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    kind: CorrectionKind = "tis",
    *,
    level: CorrectionLevel = "token",
    ratio_min: float | None = None,
    ratio_max: float | None = None,
    log_kept_mass: Float[Tensor, "*tokens"] | None = None,
    segment_ids: Int[Tensor, "*tokens"] | None = None,
    cu_seqlens: Tensor | None = None,
    max_log_ratio: float = 20.0,
    name: str = "rollout",
) -> Correction:
    """Importance weights from the policy that sampled to the one that the update starts from, held within bounds.

        rho_t = exp(old_t - log_kept_mass_t - rollout_t)

    of the `token`, of its `sequence` (the sum of the exponents), of that sum's mean (`geometric`), or of the mean over
    its `segment`, a run of trained tokens such as one turn of a dialogue. The loss's own ratio stays pi / pi_old, so
    that the product is pi / pi_rollout; a loss that gets the sampler's log-probs as its `old_logprobs` has corrected
    already.

    `tis`: clip(rho, ratio_min, ratio_max), truncated importance sampling, https://doi.org/10.1198/106186008X320456;
    `mis` and `icepop`: rho within the bounds and 0 beyond them, https://arxiv.org/abs/2510.18855 with a lower bound;
    `reject`: 1 within and 0 beyond, a filter alone. TIS over tokens behind a filter over sequences is
    `importance_correction(...) * importance_correction(..., "reject", level="geometric", name="filter", ...)`.

    A token whose sampler's log-prob is not finite counts as one of ratio 1. Nothing here carries a gradient.

    Metrics, over the trained tokens and before any bound: `<name>_ratio` (with its deviation), `_ratio_max`,
    `_ratio_min`, `_kl` (k3 of KL(rollout || old) per token), `_missing_frac` (no finite log-prob); and what came of
    it: `_clip_frac`, `_kept_frac` and `_ess`, the effective sample size as a share of the tokens.

    Args:
        kind: What becomes of a ratio beyond the bounds.
        level: Whose ratio it is.
        ratio_min: Least ratio; 0 (`icepop`: 0.5) where None.
        ratio_max: Largest ratio; 2 (`icepop`: 5) where None. `reject` has no bounds of its own.
        log_kept_mass: The log of the mass that the old policy gives to what top-p, top-k or min-p left to the sampler,
            where `rollout_logprobs` are those of what was left. Without it the ratio's mean is that mass and not 1.
        segment_ids: What tells segments apart; None takes each run of trained tokens as one.
        name: What the metrics' names begin with.

    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> importance_correction(old, old - torch.tensor([[0.0, 3.0]]), mask, "tis").weights
    tensor([[1., 2.]])
    >>> importance_correction(old, old - torch.tensor([[0.0, 3.0]]), mask, "icepop").weights
    tensor([[1., 0.]])
    """
    who = "importance_correction"
    low, high = _checked_bounds(who, kind, ratio_min, ratio_max)
    check_choice(who, "level", level, get_args(CorrectionLevel))
    check_range(who, "max_log_ratio", max_log_ratio, 0, 20, open_low=True)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    given = {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs, "log_kept_mass": log_kept_mass}
    for label, x in given.items():
        if x is not None:
            check_like(who, label, x, "loss_mask", loss_mask)
    _check_segments(who, segment_ids, level, loss_mask)

    mask = within_sequences(loss_mask, cu_seqlens)
    old, rollout = old_logprobs.detach(), rollout_logprobs.detach()
    if log_kept_mass is not None:
        old = old - log_kept_mass.detach()
    is_there = rollout.isfinite() & mask
    old, rollout = zero_masked(is_there, old, rollout)
    log_ratio = _at_level(old - rollout, mask, level, segment_ids, cu_seqlens)
    ratio = torch.where(mask, bounded(log_ratio, max_log_ratio).exp(), 0)
    is_within = (ratio >= low) & (ratio <= high)
    weights = torch.where(is_within, ratio, 0) if kind in ("mis", "icepop") else ratio.clamp(low, high)
    if kind == "reject":
        weights = is_within.to(ratio.dtype)
    weights = torch.where(mask, weights, 0)
    keep = mask if kind == "tis" else mask & is_within

    def share(x: Tensor) -> Mean:
        return Mean.of(x.to(ratio.dtype), mask)

    return Correction(
        weights,
        keep,
        {
            f"{name}_ratio": Moments.of(ratio, mask),
            f"{name}_ratio_max": Max.of(ratio, mask),
            f"{name}_ratio_min": Min.of(ratio, mask),
            f"{name}_kl": Mean.of(kl_k3(rollout, old, max_log_ratio), mask),
            f"{name}_missing_frac": share(~is_there),
            f"{name}_clip_frac": share(~is_within),
            f"{name}_kept_frac": share(keep),
            f"{name}_ess": EffectiveSampleSize.of(weights, mask),
        },
    )


def top_entropy_correction(
    entropy: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    fraction: float = 0.2,
    *,
    threshold: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    name: str = "top_entropy",
) -> Correction:
    """Only the tokens of high entropy teach, equation 5 of https://arxiv.org/abs/2506.01939: weight 1 there, else 0.

        H_t >= the smallest of the ceil(fraction n) largest entropies of the step's n trained tokens

    The count that a loss divides by stays that of all tokens, as in the paper. A part of a step takes the threshold
    of the whole step, which the metric `<name>_threshold` reads: `top_entropy_correction` of all its entropies.

    Metrics: `<name>_threshold` and `<name>_kept_frac`.

    >>> H, mask = torch.tensor([[0.1, 2.0, 0.3, 0.2, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
    >>> top_entropy_correction(H, mask, 0.4).weights.tolist()
    [[0.0, 1.0, 1.0, 0.0, 0.0]]
    """
    who = "top_entropy_correction"
    check_range(who, "fraction", fraction, 0, 1, open_low=True)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "entropy", entropy, "loss_mask", loss_mask)
    if threshold is not None and (not isinstance(threshold, Tensor) or threshold.ndim != 0):
        raise ValueError(f"{who}: threshold must be a 0-dim tensor, got {threshold!r}")
    mask, entropy = within_sequences(loss_mask, cu_seqlens), entropy.detach()
    if threshold is None:
        threshold = _largest(entropy, mask, fraction)
    keep = mask & (entropy >= threshold.to(entropy))
    weights = keep.to(entropy.dtype)
    metrics: dict[str, Metric] = {
        f"{name}_threshold": Mean.constant(threshold, mask.sum()),
        f"{name}_kept_frac": Mean.of(weights, mask),
    }
    return Correction(weights, keep, metrics)


def _largest(x: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The smallest of the ceil(fraction n) largest of the n entries where `mask` is True; 0 of none."""
    ordered = torch.cat([torch.where(mask, x, -torch.inf).flatten().sort(descending=True).values, x.new_zeros(1)])
    # 0.07 * 100 is a little more than 7 in floating point
    place = (mask.sum().double() * fraction - 1e-9).ceil().long() - 1
    return torch.where(mask.any(), ordered.gather(0, place.clamp(min=0)[None])[0], 0)


def _at_level(
    log_ratio: Tensor, mask: Tensor, level: str, segment_ids: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if level == "token":
        return log_ratio
    if level == "segment":
        return _segment_mean(log_ratio, mask, segment_ids, cu_seqlens)
    per_sequence = sequence_mean if level == "geometric" else sequence_sum
    return to_tokens(per_sequence(log_ratio, mask, cu_seqlens), mask, cu_seqlens)


def _segment_mean(x: Tensor, mask: Tensor, segment_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Every token gets the mean over its run: neighbours of one sequence, one id and one mask."""
    sequences = torch.arange(mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, device=mask.device)
    owner = to_tokens(sequences, mask, cu_seqlens).flatten()
    marks = [owner, mask.flatten()] + ([] if segment_ids is None else [segment_ids.flatten()])
    begins = torch.zeros_like(owner, dtype=torch.bool)
    for mark in marks:
        begins[1:] |= mark[1:] != mark[:-1]
    run = begins.cumsum(0)
    counted = mask.flatten()
    sums = torch.zeros_like(x.flatten()).index_add(0, run, torch.where(counted, x.flatten(), 0))
    sizes = torch.zeros_like(run).index_add(0, run, counted.long())
    return (sums / sizes.clamp(min=1))[run].view(mask.shape)


def _checked_bounds(who: str, kind: str, low: float | None, high: float | None) -> tuple[float, float]:
    check_choice(who, "kind", kind, get_args(CorrectionKind))
    if kind == "reject" and (low is None or high is None):
        raise ValueError(f"{who}: kind='reject' needs ratio_min and ratio_max, got {low} and {high}")
    default_low, default_high = _BOUNDS.get(kind, (0.0, 0.0))
    low, high = default_low if low is None else low, default_high if high is None else high
    check_range(who, "ratio_min", low, 0, 1)
    check_range(who, "ratio_max", high, 1)
    return low, high


def _check_segments(who: str, segment_ids: Tensor | None, level: str, loss_mask: Tensor) -> None:
    if segment_ids is None:
        return
    if level != "segment":
        raise ValueError(f"{who}: segment_ids are for level='segment', got them with level={level!r}")
    if segment_ids.shape != loss_mask.shape or segment_ids.is_floating_point():
        raise ValueError(
            f"{who}: segment_ids must be integers of loss_mask's shape {list(loss_mask.shape)}, got "
            f"{segment_ids.dtype} {list(segment_ids.shape)}"
        )
