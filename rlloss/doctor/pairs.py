"""Pairs that compare an answer with itself."""

from collections.abc import Iterator

import torch

from rlloss.doctor.finding import Finding, counted, indices
from rlloss.doctor.sheet import Sheet

__all__ = ["identical_pairs"]


def identical_pairs(sheet: Sheet) -> Iterator[Finding]:
    """Pairs whose two sides are the same tokens, or have the same log-probs to the last bit under every policy."""
    same = _same_tokens(sheet)
    source = "token for token"
    if same is None:
        compared = []
        for ref in ("", "ref_"):
            for kind in ("logps", "mean_logps"):
                sides = [sheet.pairs.get(f"{ref}{side}_{kind}") for side in ("chosen", "rejected")]
                if sides[0] is not None and sides[1] is not None:
                    compared.append(sides[0] == sides[1])
        if not compared:
            return
        same = torch.stack(compared).all(0)
        source = "by log-probs that agree to the last bit"
    if "mask" in sheet.pairs and sheet.pairs["mask"].shape == same.shape:
        same = same & sheet.pairs["mask"]
    if "ties" in sheet.pairs and sheet.pairs["ties"].shape == same.shape:
        same = same & ~sheet.pairs["ties"]
    if same.any():
        yield Finding(
            "warning",
            "identical_pairs",
            f"chosen and rejected are identical in {int(same.sum())} of {counted(len(same), 'pair')} ({source})",
            "their margin is 0 whatever the policy does: no gradient, but they count in the mean and hold the "
            "accuracy down"
            + ("; the same tensor was passed for both sides" if bool(same.all()) and len(same) > 1 else ""),
            "drop such pairs; if the answers differ as texts, a cut to the maximal length may have made them one",
            indices(same),
        )


def _same_tokens(sheet: Sheet) -> torch.Tensor | None:
    chosen, rejected = (_tokens(sheet, side) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or len(chosen) != len(rejected):
        return None
    return torch.tensor([a == b for a, b in zip(chosen, rejected, strict=True)])


def _tokens(sheet: Sheet, side: str) -> list[list[int]] | None:
    """The ids of each answer: of padded ones those under the mask, or all columns where there is none."""
    ids = next((sheet.sides[f"{side}_{k}"] for k in ("ids", "input_ids") if f"{side}_{k}" in sheet.sides), None)
    mask = next((sheet.sides[f"{side}_{k}"] for k in ("loss_mask", "mask") if f"{side}_{k}" in sheet.sides), None)
    if ids is None or mask is None:
        return None if ids is None else [row.tolist() for row in ids]
    if [row.shape for row in ids] != [row.shape for row in mask]:
        return None
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
