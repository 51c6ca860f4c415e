"""One adapter per loss family: how the loop calls any member of it, and no loss by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from rlloss.logprobs import sequence_logps, sequence_mean_logps
from rlloss.loop.batch import Batch
from rlloss.output import LossOutput
from rlloss.protocol import Loss
from rlloss.reduce import Counts, count

__all__ = ["Objective", "Waist", "check_batch", "check_language_model", "needs_kl", "objective_of", "outputs_of"]

Waist = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """What the loop needs to know of a family.

    Args:
        outputs: What its losses read of the models: per token `logprobs`, `entropy` and `values` (of the critic),
            per sequence `scores` (of a reward model). Those with a gradient are the waist.
        call: (loss_fn, waist, batch, keywords) -> LossOutput.
        counts: What one batch contributes to the step's normaliser.
        rows_per_example: Rows that must stay in one micro-batch.
        fields: What the batch must hold besides.
    """

    outputs: tuple[str, ...]
    call: Callable[[Loss, Waist, Batch, dict[str, Any]], LossOutput]
    counts: Callable[[Batch], Counts]
    rows_per_example: int = 1
    fields: tuple[str, ...] = ()


def _policy(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    fields = batch.fields
    names = ("ref_logprobs", "token_weights", *(("rollout_logprobs",) if loss_fn.needs_rollout else ()))
    optional = {name: fields[name] for name in names if name in fields}
    if loss_fn.needs_critic:
        optional |= {"values": waist["values"], "old_values": fields.get("old_values"), "returns": fields["returns"]}
    old_logprobs, advantages = fields.get("old_logprobs"), fields["advantages"]
    return loss_fn(
        waist["logprobs"], old_logprobs, advantages, batch.loss_mask, entropy=waist["entropy"], **optional, **keywords
    )


def _value(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    old_values, returns = batch.fields.get("old_values"), batch.fields["returns"]
    weights = batch.fields.get("token_weights")
    return loss_fn(waist["values"], old_values, returns, batch.loss_mask, token_weights=weights, **keywords)


def _likelihood(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    extra = {name: waist[name] for name in loss_fn.extra_outputs}
    weights = batch.fields.get("token_weights")
    return loss_fn(waist["logprobs"], batch.loss_mask, token_weights=weights, **extra, **keywords)


def _preference(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    of_sequence = sequence_mean_logps if getattr(loss_fn, "length_normalized", False) else sequence_logps

    def sides(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        return _sides(of_sequence(logprobs, batch.loss_mask))

    refs = sides(batch.fields["ref_logprobs"]) if loss_fn.needs_reference else ()
    return loss_fn(*sides(waist["logprobs"]), *refs, **_rows(_pair_mask(batch), batch), **keywords)


def _unpaired(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    logps = sequence_logps(waist["logprobs"], batch.loss_mask)
    ref_logps = sequence_logps(batch.fields["ref_logprobs"], batch.loss_mask)
    optional = _rows(batch.loss_mask.any(-1), batch)
    if needs_kl(loss_fn):
        optional["kl"] = batch.fields["kl"]
    return loss_fn(logps, ref_logps, batch.fields["desirable"], **optional, **keywords)


def _reward(loss_fn: Loss, waist: Waist, batch: Batch, keywords: dict[str, Any]) -> LossOutput:
    return loss_fn(*_sides(waist["scores"]), **_rows(_pair_mask(batch), batch, "margin"), **keywords)


def _rows(mask: Tensor, batch: Batch, *optional: str) -> dict[str, Tensor]:
    """What the losses over rows or pairs take besides; a pair's entry stands in its first row."""
    given = {name: batch.fields[name] for name in ("weights", *optional) if name in batch.fields}
    return {"mask": mask} | {name: x[:: batch.rows_per_example] for name, x in given.items()}


def _pair_mask(batch: Batch) -> Tensor:
    """Pairs with something to compare: a trained token on both sides."""
    chosen, rejected = _sides(batch.loss_mask.any(-1))
    return chosen & rejected


def _sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected of rows that alternate."""
    chosen, rejected = rearrange(rows, "(pair side) -> side pair", side=2)
    return chosen, rejected


def _count_tokens(batch: Batch) -> Counts:
    return count(batch.loss_mask)


def _count_rows(batch: Batch) -> Counts:
    return count(batch.loss_mask.any(-1))


def _count_pairs(batch: Batch) -> Counts:
    return count(_pair_mask(batch))


def outputs_of(loss_fn: Loss) -> tuple[str, ...]:
    """What a loss reads of the models: what its family does and it itself, and the critic where it has one."""
    outputs = objective_of(loss_fn).outputs
    outputs += tuple(name for name in loss_fn.extra_outputs if name not in outputs)
    return outputs + ("values",) * (loss_fn.needs_critic and "values" not in outputs)


_FAMILIES = {
    "policy": Objective(("logprobs", "entropy"), _policy, _count_tokens, fields=("advantages",)),
    "value": Objective(("values",), _value, _count_tokens, fields=("returns",)),
    "likelihood": Objective(("logprobs",), _likelihood, _count_tokens),
    "preference": Objective(("logprobs",), _preference, _count_pairs, rows_per_example=2),
    "unpaired": Objective(("logprobs",), _unpaired, _count_rows, fields=("desirable",)),
    "reward": Objective(("scores",), _reward, _count_pairs, rows_per_example=2),
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


def check_batch(loss_fn: Loss, batch: Batch, *, scalar_model: bool, critic: bool) -> None:
    """Raises ValueError unless the session's models and the batch have what the loss reads."""
    objective, who = objective_of(loss_fn), type(loss_fn).__name__
    if "scores" in objective.outputs and not scalar_model:
        raise ValueError(f"{who}: trains a reward model; pass Session(rlloss.ScalarModel(model), ...)")
    if "logprobs" in objective.outputs:
        check_language_model(who, scalar_model)
    if "values" in outputs_of(loss_fn) and not critic:
        raise ValueError(f"{who}: needs a critic, got None; pass Session(..., critic=rlloss.ScalarModel(model))")
    if loss_fn.needs_reference and "ref_logprobs" not in batch.fields:
        raise ValueError(
            f"{who}: needs the reference's log-probs; set "
            "batch.fields['ref_logprobs'] = session.logprobs(batch, reference=True)"
        )
    optional = {"returns": loss_fn.needs_critic, "kl": needs_kl(loss_fn)}
    for name in (*objective.fields, *(name for name, is_needed in optional.items() if is_needed)):
        if name not in batch.fields:
            raise ValueError(f"{who}: needs batch.fields[{name!r}], which holds {sorted(batch.fields)}")
    if batch.rows_per_example != objective.rows_per_example:
        raise ValueError(
            f"{who}: its family trains {objective.rows_per_example} rows per example, got a "
            f"batch with {batch.rows_per_example}"
        )


def needs_kl(loss_fn: Loss) -> bool:
    """Whether it takes the KL of a step's mismatched answers, as KTO does."""
    return bool(getattr(loss_fn, "needs_kl", False))


def check_language_model(who: str, scalar_model: bool) -> None:
    """Raises ValueError where the session's model is a `ScalarModel`, which has no log-probs."""
    if scalar_model:
        raise ValueError(f"{who}: needs a language model, and this session's model is a rlloss.ScalarModel")
