"""Log-probs that stand one token off: told by another policy's log-probs of the same tokens."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from rlloss.doctor.finding import Finding
from rlloss.doctor.sheet import Sheet

__all__ = ["correlation", "shifted_logprobs"]

# Two policies that are close enough to train agree on which tokens are hard: above 0.8, and neighbouring tokens below
# 0.3 in text. A shift swaps these two; half of that distance is asked for.
SHIFTED_CORRELATION = 0.6
SHIFTED_LEAD = 0.3
# The correlation of independent numbers has a deviation of 1 / sqrt(n): with 32 of them 0.6 is three deviations off.
TOKENS_ENOUGH = 32


def shifted_logprobs(sheet: Sheet) -> Iterator[Finding]:
    """Pairs of log-probs that agree one step apart and not in place; notes them in `sheet.shifted`."""
    moved: dict[tuple[str, str], tuple[float, float, int]] = {}
    for a, b in combinations(sheet.logprobs, 2):
        for early, late in ((a, b), (b, a)):
            apart, in_place, n = _agreement(sheet, early, late)
            if n >= TOKENS_ENOUGH and apart >= SHIFTED_CORRELATION and apart - in_place >= SHIFTED_LEAD:
                moved[early, late] = apart, in_place, n
                sheet.shifted.add(frozenset((early, late)))
    if not moved:
        return
    involved = [name for pair in moved for name in pair]
    culprits = [name for name in sheet.logprobs if involved.count(name) == len(moved)] or involved
    (early, late), (apart, in_place, n) = next(iter(moved.items()))
    side = "one of the two stands one column off"
    if len(culprits) == 1:
        side = f"{culprits[0]} stands one column too {'early' if culprits[0] == early else 'late'}"
    yield Finding(
        "error",
        "shifted_logprobs",
        f"{early}[t] correlates {apart:.2f} with {late}[t + 1] but {in_place:.2f} with {late}[t], over {n} tokens",
        f"{side}: every ratio compares a token with its neighbour, and credit goes to the wrong one",
        "align both to their own tokens: ids, loss_mask = rlloss.shift(input_ids, loss_mask), score row t of the model "
        "against ids[t], and cut the sampler's log-probs at the same column",
    )


def _agreement(sheet: Sheet, early: str, late: str) -> tuple[float, float, int]:
    """Correlations of early[t] with late[t + 1] and with late[t] over the same tokens of `early`, and their number."""
    x, y = sheet.tokens[early], sheet.tokens[late]
    at, sound = sheet.sound[early][:, :-1], sheet.sound[late]
    where = at & sound[:, 1:] & sound[:, :-1]
    here = x[:, :-1][where]
    return correlation(here, y[:, 1:][where]), correlation(here, y[:, :-1][where]), len(here)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > torch.finfo(x.dtype).tiny else 0.0
