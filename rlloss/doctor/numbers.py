"""Numbers that no log-prob, advantage or reward can be."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlloss.doctor.finding import Finding, counted, indices, listed
from rlloss.doctor.sheet import Sheet

__all__ = ["log_probs", "not_finite", "row_numbers"]

# A log-softmax in float32 over logits of size 100 is off by 1e-5 at most, which may make the log-prob of a certain
# token positive; ten times that is no rounding.
POSITIVE = 1e-4
# An honest tensor has no positive log-prob, a negated one hardly anything else.
NEGATED_SHARE = 0.9
# Filling values of padded log-probs. -1.0 is not among them, since it is an ordinary log-prob of rounded data.
FILLERS = (1.0, -100.0, -999.0, -9999.0, -1e4, -1e5, -1e6, -1e8, -1e9, -1e10)
# A sampled token of log-prob below -50 (e^-50) is never seen, so the same such number twice is a constant of somebody.
NEVER_SAMPLED = -50.0
# bfloat16 keeps 8 significant bits. By chance a float32 has its other 16 bits all zero once in 65536, so that a few
# dozen are proof; fewer may be round numbers that somebody typed.
ROUNDED_LEAST = 32
ROUNDED_SHARE = 0.99


def not_finite(sheet: Sheet) -> Iterator[Finding]:
    """NaN and infinities where the loss will read them."""
    for name, x in sheet.tokens.items():
        if x.is_floating_point() and sheet.mask is not None and name != "rewards":
            yield from _not_finite(name, ~x.isfinite() & sheet.mask, x, "at trained positions")
    for name, x in {**sheet.per_row, **sheet.pairs}.items():
        if x.is_floating_point():
            wrong = x.isinf() if name.endswith("rewards") else ~x.isfinite()
            yield from _not_finite(name, wrong, x, "")


def _not_finite(name: str, wrong: Tensor, x: Tensor, where: str) -> Iterator[Finding]:
    if not wrong.any():
        return
    kinds = [(x.isnan() & wrong, "NaN"), (x.isposinf() & wrong, "+inf"), (x.isneginf() & wrong, "-inf")]
    seen = ", ".join(f"{int(which.sum())} {kind}" for which, kind in kinds if which.any())
    sampled = name in ("logprobs", "old_logprobs", "rollout_logprobs") and bool(x[wrong].isneginf().all())
    yield Finding(
        "error",
        "not_finite",
        f"{name} has {seen} {where}".rstrip(),
        "a token of probability 0 cannot have been sampled: a vocabulary mask or a top-k cut was applied to another "
        "distribution than the sampler's"
        if sampled
        else "one such number makes the loss and every gradient NaN",
        "find the step that makes it (0/0, log 0, an overflow in half precision); rows that must not count get False "
        "in the mask, behind which any number is harmless",
        indices(wrong),
    )


def log_probs(sheet: Sheet) -> Iterator[Finding]:
    """Fills `sheet.sound`; yields log-probs above 0, filling values, placeholders and values rounded to bfloat16."""
    examined: dict[str, tuple[Tensor, Tensor]] = {}
    for name, x in sheet.logprobs.items():
        assert sheet.mask is not None
        sound = sheet.mask & x.isfinite()
        yield from _fillers(sheet, name, x, sound)
        sound &= ~_filling(x)
        examined[name] = x, sound
        sheet.sound[name] = sound & (x <= POSITIVE)
    for name, x in {**sheet.per_row, **sheet.pairs}.items():
        if name.endswith("logps"):
            examined[name] = x, x.isfinite()
    yield from _positive(examined)
    yield from _rounded({name: x[sheet.sound[name]] for name, x in sheet.logprobs.items()})


def _filling(x: Tensor) -> Tensor:
    filling = torch.isin(x, torch.tensor(FILLERS, dtype=x.dtype))
    low = x[x < NEVER_SAMPLED]
    values, counts = low.unique(return_counts=True)
    return filling | torch.isin(x, values[counts > 1])


def _fillers(sheet: Sheet, name: str, x: Tensor, sound: Tensor) -> Iterator[Finding]:
    wrong = sound & _filling(x)
    if wrong.any() and sheet.given_mask is not None:
        values = ", ".join(f"{v:g}" for v in x[wrong].unique()[:3].tolist())
        yield Finding(
            "error",
            "filler_logprobs",
            f"{name} is exactly {values} at {counted(int(wrong.sum()), 'trained position')}",
            "that is a filling value, not the log-prob of a sampled token: padding, or tokens that were never scored, "
            "are trained on",
            "make loss_mask False there, or score those tokens; look whether mask and log-probs are aligned alike",
            indices(wrong),
        )


def _positive(examined: dict[str, tuple[Tensor, Tensor]]) -> Iterator[Finding]:
    above = {name: x[sound & (x > POSITIVE)] for name, (x, sound) in examined.items()}
    shares = {name: len(above[name]) / max(int(sound.sum()), 1) for name, (_, sound) in examined.items()}
    for negated in (True, False):
        names = [name for name in above if len(above[name]) and (shares[name] > NEGATED_SHARE) == negated]
        if not names:
            continue
        rows = {row for x, sound in (examined[m] for m in names) for row in indices(sound & (x > POSITIVE))}
        n, of = sum(len(above[m]) for m in names), sum(int(examined[m][1].sum()) for m in names)
        yield Finding(
            "error",
            "positive_logprobs",
            f"{listed(names)}: {n} of {of} entries above 0, up to {max(float(above[m].max()) for m in names):.4g}",
            "nearly all are positive: this is the negative log-likelihood"
            if negated
            else "a probability is at most 1: these are logits or probabilities, or rewards were added to them",
            f"pass {listed(f'-{m}' for m in names)}"
            if negated
            else "use rlloss.token_logprobs(logits, ids), which normalises over the vocabulary",
            tuple(sorted(rows)),
        )


def _rounded(logprobs: dict[str, Tensor]) -> Iterator[Finding]:
    on_grid = {}
    for name, values in logprobs.items():
        some = values[values != 0]
        exact = int((some.float() == some.bfloat16().float()).sum())
        if len(some) >= ROUNDED_LEAST and exact >= ROUNDED_SHARE * len(some):
            on_grid[name] = (exact, some)
    if on_grid:
        exact, some = next(iter(on_grid.values()))
        yield Finding(
            "warning",
            "bf16_logprobs",
            f"{exact} of {len(some)} values of {listed(on_grid)} are bfloat16 numbers: steps of 2^-8 of their size",
            "the log-softmax was done, or its result kept, in bfloat16, which is off by up to 0.4% of each log-prob: "
            f"{float(some.abs().max()) / 256:.2g} nats on the rarest token here; the ratio is not 1 at pi = pi_old",
            "raise the logits to float32 before the log-softmax (rlloss.token_logprobs and linear_logprobs do)",
        )


def row_numbers(sheet: Sheet) -> Iterator[Finding]:
    """Rewards that are missing, and labels of one kind."""
    for name in ("rewards", "chosen_rewards", "rejected_rewards"):
        x = sheet.per_row.get(name, sheet.pairs.get(name))
        if x is None and name in sheet.tokens and sheet.mask is not None:
            x = torch.where(sheet.mask, sheet.tokens[name], 0)
        if x is None or not x.is_floating_point() or not x.isnan().any():
            continue
        rows = indices(x.isnan())
        all_missing = len(rows) == len(x)
        yield Finding(
            "error" if all_missing else "warning",
            "missing_rewards",
            f"{name} is None or NaN in {len(rows)} of {counted(len(x), 'row')}",
            "the reward function gave no number for any answer"
            if all_missing
            else "the reward function gave no number for these answers; one NaN in a mean makes every advantage NaN "
            "(rlloss.group_advantages gives such rows 0 and leaves them out of every mean)",
            "look at those answers; give them a reward, or set their loss_mask to False",
            rows,
        )
    labels = sheet.per_row.get("desirable")
    if labels is not None and len(labels) > 1 and (labels.all() or not labels.any()):
        yield Finding(
            "warning",
            "one_label",
            f"all {len(labels)} rows of desirable are {bool(labels[0])}",
            "a loss on single answers learns from the difference between good and bad ones; with one kind alone "
            "it pushes everything one way",
            "shuffle the data, so that each step has both kinds, or weigh the kinds",
        )
