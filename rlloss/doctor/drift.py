"""The ratio before the first step, which ought to be 1: how far it is from that, and what leaves such a trace."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss.doctor.alignment import correlation
from rlloss.doctor.finding import Finding
from rlloss.doctor.sheet import Sheet

__all__ = ["ratios"]

TOKENS_ENOUGH = 16  # fewer have no shape
ROUNDING = 1e-5  # nats: float32 sums in another order
TINY = 1e-3  # nats at the 99% quantile: kernels that choose their tiles by the batch's shape, in bfloat16 matmuls
# Nats on the median token. Samplers in bfloat16 are 0.001 to 0.02 off on it, and a few careful updates move it by less
# than 0.05; beyond that the clip of 0.2 already bites for many tokens.
LARGE = 0.05
# A sampler's cut raises every log-prob; at 0.02 nats, above the noise of bfloat16, nearly no token may then be lower.
ONE_SIDED_FROM = 0.02
ONE_SIDED_SHARE = 0.97
ONE_SIDED_TOKENS = 0.05
# Simulated softmaxes of mixed sharpness: temperatures of 0.6 to 1.5 give correlations of 0.4 to 0.8 with either side's
# log-prob, of one sign; noise gives at most 0.1, or opposite signs.
TEMPERATURE_FROM = 0.02
TEMPERATURE_CORRELATION = 0.5
TEMPERATURE_BOTH = 0.3
SYMMETRIC = 0.15  # how far from one half the share of positive differences may be, and the mean from 0 in deviations


class _Pair(NamedTuple):
    """Two log-probs of the same tokens by what should be the same weights: the one noted first, and the later one."""

    first: str
    second: str
    early: Tensor
    late: Tensor

    @property
    def difference(self) -> Tensor:
        return self.early - self.late

    def quantiles(self) -> tuple[float, float, float, float]:
        steps = torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
        half, nine, most, largest = _quantiles(self.difference.abs(), steps).tolist()
        return half, nine, most, largest

    def seen(self) -> str:
        half, nine, most, largest = self.quantiles()
        return (
            f"|{self.first} - {self.second}| over {len(self.early)} tokens: median {half:.2g}, 90% {nine:.2g}, "
            f"99% {most:.2g}, largest {largest:.2g} nats"
        )


def ratios(sheet: Sheet) -> Iterator[Finding]:
    """One finding for each two neighbours among rollout, old and current log-probs that differ by more than rounding.

    Values that `bf16_logprobs` or `shifted_logprobs` has explained are not told twice.
    """
    names = [name for name in ("rollout_logprobs", "old_logprobs", "logprobs") if name in sheet.logprobs]
    for first, second in pairwise(names):
        if frozenset((first, second)) in sheet.shifted:
            continue
        both = sheet.sound[first] & sheet.sound[second]
        pair = _Pair(first, second, sheet.tokens[first][both], sheet.tokens[second][both])
        if len(pair.early) >= TOKENS_ENOUGH and not _rounding(pair):
            yield _cut(pair) or _temperature(sheet, pair, both) or _size(pair)


def _rounding(pair: _Pair) -> bool:
    size = pair.difference.abs()
    if float(size.amax()) <= ROUNDING:
        return True
    rounded = [bool((x.bfloat16().double() == x).all()) for x in (pair.early, pair.late)]
    return any(rounded) and bool((size <= ROUNDING + pair.late.abs() / 128).all())


def _cut(pair: _Pair) -> Finding | None:
    far = pair.difference[pair.difference.abs() > ONE_SIDED_FROM]
    if len(far) < max(TOKENS_ENOUGH, ONE_SIDED_TOKENS * len(pair.early)):
        return None
    if float((far > 0).double().mean()) < ONE_SIDED_SHARE:
        return None
    kept = float(torch.exp(-_quantiles(far, torch.tensor(0.99, dtype=far.dtype))))
    return Finding(
        "warning",
        "truncated_sampling",
        f"{pair.seen()}; {pair.first} is the higher one at {int((far > 0).sum())} of the {len(far)} tokens that differ "
        f"by more than {ONE_SIDED_FROM}",
        "differences to one side only: the sampler renormalised after top-p or top-k, and tells the log-prob within "
        f"what it kept (down to {kept:.2f} of the mass; for top-p that is about p)",
        "sample without top-p and top-k, or have the sampler return log-probs from before the cut; or pass the log of "
        "the kept mass to rlloss.importance_correction(log_kept_mass=...)",
    )


def _temperature(sheet: Sheet, pair: _Pair, both: Tensor) -> Finding | None:
    if pair.quantiles()[0] < TEMPERATURE_FROM:
        return None
    with_each = sorted((correlation(pair.difference, x) for x in (pair.early, pair.late)), key=abs)
    weak, strong = with_each
    if abs(strong) < TEMPERATURE_CORRELATION or abs(weak) < TEMPERATURE_BOTH or weak * strong < 0:
        return None
    guess = ""
    if "entropy" in sheet.tokens:
        # d log p_T / d(1/T) at T = 1 is log p + H, so that the slope against it is 1/T - 1
        surprise = pair.late + sheet.tokens["entropy"][both]
        slope = float((pair.difference * surprise).sum() / surprise.square().sum())
        guess = f" (about {1 / (1 + slope):.2f})" if slope > -0.9 else ""
    sharper = strong > 0
    return Finding(
        "warning",
        "sampler_temperature",
        f"{pair.seen()}; the difference correlates {strong:.2f} with the log-prob",
        f"{pair.first} is {'sharper' if sharper else 'flatter'} than {pair.second}: rare tokens are "
        f"{'rarer' if sharper else 'more likely'} in it, as by a temperature "
        f"{'below' if sharper else 'above'} 1{guess} on one side only",
        "score with the sampler's temperature (token_logprobs(..., temperature=T)), or have it return log-probs of the "
        "distribution that it really drew from",
    )


def _size(pair: _Pair) -> Finding:
    half, _, most, _ = pair.quantiles()
    difference = pair.difference
    centre = float(difference.mean() / difference.std())
    positive = float((difference > 0).double().mean())
    sampler = pair.first == "rollout_logprobs"
    if most < TINY:
        return Finding(
            "note",
            "ratio_not_one",
            pair.seen(),
            "tiny: matmuls round differently when the shape of a micro-batch changes",
            "nothing; for exact ones keep the micro-batches of both passes alike, or use batch-invariant kernels",
        )
    if half < LARGE:
        return Finding(
            "note",
            "ratio_not_one",
            pair.seen(),
            "the size that a bfloat16 head (steps of 2^-8 of a logit) or other kernels leave"
            + (" between sampler and trainer" if sampler else "; after a step's first update, the policy's own move"),
            "watch it over the run; if it grows, rlloss.importance_correction(old_logprobs, rollout_logprobs, mask)"
            if sampler
            else "at a step's first update recompute old_logprobs with the same code, or pass old_logprobs=None",
        )
    if abs(centre) < SYMMETRIC and abs(positive - 0.5) < SYMMETRIC:
        return Finding(
            "warning",
            "noisy_logprobs",
            f"{pair.seen()}; to both sides alike ({positive:.0%} positive)",
            "symmetric noise on the median token: dropout is on in one of the two passes, or weights are quantised in "
            "one of them; ratios are clipped at random",
            "model.eval() or dropout 0 in every pass that scores (gradients flow in eval mode too); the same precision "
            "on both sides",
        )
    return Finding(
        "warning",
        "ratio_not_one",
        f"{pair.seen()}; mean {float(difference.mean()):+.2g}",
        "too far for rounding: other weights (a sampler that was not updated, an adapter on one side only), another "
        "prompt or chat template, or many updates in between",
        "score the same tokens twice with the same weights, first in one process and then across the two",
    )


def _quantiles(x: Tensor, steps: Tensor) -> Tensor:
    """`torch.quantile`, which refuses more than 16 million numbers, by sorting."""
    places = (steps * (len(x) - 1)).round().long()
    return x.sort().values[places]
