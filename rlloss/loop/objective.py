"""One adapter per loss family: how the loop calls any member of it, and no loss by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from rlloss.logprobs import TokenStats, sequence_logps
from rlloss.loop.batch import Batch
from rlloss.output import LossOutput
from rlloss.protocol import Loss
from rlloss.reduce import Counts, count

__all__ = ["Objective", "objective_of"]


@dataclass(frozen=True)
class Objective:
    """What the loop needs to know of a family.

    Args:
        outputs: Per-token statistics that its losses can use; those with a gradient are the waist.
        call: (loss_fn, statistics, batch, keywords) -> LossOutput.
        counts: What one batch contributes to the step's normaliser.
        rows_per_example: Rows that must stay in one micro-batch.
    """

    outputs: tuple[str, ...]
    call: Callable[[Loss, TokenStats, Batch, dict[str, Any]], LossOutput]
    counts: Callable[[Batch], Counts]
    rows_per_example: int = 1


def _policy(loss_fn: Loss, stats: TokenStats, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    optional = {k: v for k, v in batch.fields.items() if k in ("ref_logprobs", "token_weights")}
    old_logprobs, advantages = batch.fields.get("old_logprobs"), batch.fields["advantages"]
    return loss_fn(
        stats.logprobs, old_logprobs, advantages, batch.loss_mask, entropy=stats.entropy, **optional, **keywords
    )


def _likelihood(loss_fn: Loss, stats: TokenStats, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    return loss_fn(stats.logprobs, batch.loss_mask, token_weights=batch.fields.get("token_weights"), **keywords)


def _preference(loss_fn: Loss, stats: TokenStats, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    def sides(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = rearrange(sequence_logps(logprobs, batch.loss_mask), "(pair side) -> side pair", side=2)
        return chosen, rejected

    refs = sides(batch.fields["ref_logprobs"]) if loss_fn.needs_reference else (None, None)
    return loss_fn(*sides(stats.logprobs), *refs, **keywords)


def _count_tokens(batch: Batch) -> Counts:
    return count(batch.loss_mask)


def _count_pairs(batch: Batch) -> Counts:
    return count(batch.loss_mask[::2].any(-1))


_FAMILIES = {
    "policy": Objective(("logprobs", "entropy"), _policy, _count_tokens),
    "likelihood": Objective(("logprobs",), _likelihood, _count_tokens),
    "preference": Objective(("logprobs",), _preference, _count_pairs, rows_per_example=2),
}


def objective_of(loss_fn: Any) -> Objective:
    """The adapter of a loss's family; a loss of your own joins by naming its `family`."""
    family = getattr(loss_fn, "family", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"{type(loss_fn).__name__}: the loop calls a loss by its family, got family={family!r}; set the class "
            f"attribute to one of {sorted(_FAMILIES)} (see rlloss.Loss)"
        )
    return _FAMILIES[family]
