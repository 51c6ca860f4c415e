"""What the policy would learn from: groups that compare nothing, and advantages that are off."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlloss.doctor.finding import Finding, counted, indices
from rlloss.doctor.sheet import Sheet

__all__ = ["advantages", "groups"]

# Tasks that are hard or easy leave most groups silent and train well on the rest; of nine tenths little is left.
SILENT_SHARE = 0.9
# A reward of 1 among n zeros has the normalised advantage sqrt(n): 50 would take a group of 2500.
HUGE = 50.0
# Centred advantages have a mean within noise. Half a deviation, and five standard errors, are neither noise nor the
# weighting by lengths.
OFF_CENTRE = 0.5
STANDARD_ERRORS = 5.0
# Without a baseline no advantage is negative; of 8 centred ones that happens once in 256 draws, of 16 in 65536.
ONE_SIGN_LEAST = 16


def groups(sheet: Sheet) -> Iterator[Finding]:
    """Groups of one, and groups whose answers all earned the same."""
    ids = sheet.per_row.get("group_ids")
    if ids is None or not len(ids):
        return
    _, group, sizes = ids.unique(return_inverse=True, return_counts=True)
    alone = sizes[group] == 1
    if alone.any():
        everyone = bool(alone.all())
        yield Finding(
            "warning",
            "groups_of_one",
            f"{int(alone.sum())} of {counted(len(sizes), 'group')} hold a single row",
            ("group_ids number the rows, not the prompts; " if everyone else "")
            + "an answer without others has nothing to be compared with: its group-relative advantage is 0, in other "
            "libraries NaN",
            "give all answers to one prompt the same group id, and keep whole groups in one batch; or use a loss "
            "with a critic or a batch baseline",
            indices(alone),
        )
    source = next((name for name in ("rewards", "advantages") if _per_row(sheet, name) is not None), None)
    if source is None:
        return
    x = _per_row(sheet, source)
    assert x is not None
    if source == "advantages":
        x = x.abs()  # groups that compare nothing have zeros
    low = torch.full((len(sizes),), torch.inf, dtype=x.dtype).scatter_reduce(0, group, x.nan_to_num(torch.inf), "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, group, x.nan_to_num(-torch.inf), "amax")
    silent = (high == low if source == "rewards" else high == 0) & (sizes > 1)
    several = int((sizes > 1).sum())
    if silent.any():
        share = int(silent.sum()) / several
        yield Finding(
            "warning" if share >= SILENT_SHARE else "note",
            "groups_without_signal",
            f"{int(silent.sum())} of {several} groups ({share:.0%}) have "
            + ("one and the same reward for all their answers" if source == "rewards" else "advantages of 0 alone"),
            "their advantages are 0: they cost their samples and teach nothing"
            + ("; next to nothing is left to learn from" if share >= SILENT_SHARE else ""),
            "choose prompts that are sometimes solved, sample more answers each, grade in finer steps, or resample "
            "such groups (DAPO's dynamic sampling, rlloss.informative_groups)",
            indices(silent[group]),
        )


def _per_row(sheet: Sheet, name: str) -> Tensor | None:
    x = sheet.per_row.get(name)
    if x is None and name in sheet.tokens and sheet.mask is not None:
        x = torch.where(sheet.mask, sheet.tokens[name], 0).sum(-1)
    return None if x is None else x.double()


def advantages(sheet: Sheet) -> Iterator[Finding]:
    """Advantages that are all zero, huge, off centre, or there for tokens that are not trained."""
    x = sheet.per_row.get("advantages", sheet.tokens.get("advantages"))
    if x is None or not x.numel():
        return
    x = x.double()
    trained = sheet.mask if x.ndim == 2 and sheet.mask is not None else torch.ones_like(x, dtype=torch.bool)
    counted_ones = trained & x.isfinite()
    used = x[counted_ones]
    if len(used) and not used.any() and "group_ids" not in sheet.per_row:
        yield Finding(
            "warning",
            "zero_advantages",
            f"all {len(used)} advantages are 0",
            "the policy term has no gradient; what the optimiser then does is the KL term, if there is one",
            "look at the rewards: all alike, or never written into this tensor",
        )
    huge = counted_ones & (x.abs() > HUGE)
    if huge.any():
        yield Finding(
            "warning",
            "huge_advantages",
            f"{counted(int(huge.sum()), 'advantage')} beyond {HUGE:g} in size, up to {float(used.abs().max()):.3g}",
            "normalised advantages stay below the root of the group's size; these are raw rewards or returns, or were "
            "divided by a deviation near 0, and one of them outweighs the batch",
            "scale the rewards; normalise (rlloss.group_advantages, rlloss.whiten); a deviation gets a floor by floor=",
            indices(huge),
        )
    if not huge.any():
        yield from _off_centre(sheet, x, used)
    yield from _behind_the_mask(sheet, x)


def _off_centre(sheet: Sheet, x: Tensor, used: Tensor) -> Iterator[Finding]:
    views = [used]
    if x.ndim == 2 and sheet.mask is not None:
        rows = sheet.on_rows(torch.where(x.isfinite(), x, 0))
        views.append(rows[sheet.mask.any(-1)])
    if not all(map(_leans, views)):
        return
    by_row = views[-1]
    mean, deviation = float(by_row.mean()), float(by_row.std())
    signs = f"{int((by_row > 0).sum())} positive and {int((by_row < 0).sum())} negative rows"
    yield Finding(
        "warning",
        "advantages_not_centred",
        f"mean {mean:.3g} with a deviation of {deviation:.3g}: {signs}",
        f"without a baseline every answer is pushed {'up' if mean > 0 else 'down'}, bad and good alike, only some "
        "more: the gradient is right on average and far noisier",
        "subtract a baseline over the WHOLE step, before it is cut into micro-batches: rlloss.group_advantages or "
        "rlloss.whiten",
    )


def _leans(x: Tensor) -> bool:
    some = x[x != 0]
    if len(some) >= ONE_SIGN_LEAST and bool((some > 0).all() or (some < 0).all()):
        return True
    if len(x) < 2:
        return False
    mean, deviation = abs(float(x.mean())), float(x.std())
    return mean >= OFF_CENTRE * deviation and mean * len(x) ** 0.5 > STANDARD_ERRORS * deviation


def _behind_the_mask(sheet: Sheet, x: Tensor) -> Iterator[Finding]:
    if x.ndim != 2 or sheet.given_mask is None:
        return
    behind = ~sheet.given_mask & (x != 0)
    # one number per row, spread over all columns, is how many write [B] advantages
    spread = bool((x == x[:, :1]).all())
    if behind.any() and not spread:
        yield Finding(
            "note",
            "advantages_at_masked_positions",
            f"{counted(int(behind.sum()), 'advantage')} other than 0 (or NaN) where loss_mask is False",
            "rlloss never reads them; code that averages over all positions, or normalises before masking, does",
            "if they were computed there by mistake, the rewards or the mask may be one token off; else nothing",
            indices(behind),
        )
