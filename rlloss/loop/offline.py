"""Offline training: likelihood on completions, preferences and reward models on pairs, KTO on labelled answers."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from rlloss.logprobs import sequence_logps
from rlloss.loop.batch import Batch, collate
from rlloss.loop.data import Pair, Tokens
from rlloss.loop.labelled import Labelled
from rlloss.loop.objective import needs_kl, objective_of
from rlloss.loop.reference_cache import ref_logprobs_of
from rlloss.loop.run import RunOptions, example_order, run_steps
from rlloss.loop.session import Session
from rlloss.losses.kto import kto_kl
from rlloss.output import Mean, scalars
from rlloss.protocol import Loss

__all__ = ["evaluate_offline", "offline_batch", "train_offline"]


Example = Tokens | Pair | Labelled

_EXAMPLES: dict[str, type] = {"likelihood": Tokens, "preference": Pair, "reward": Pair, "unpaired": Labelled}


def train_offline(
    session: Session,
    examples: Sequence[Example],
    loss_fn: Loss,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> list[dict[str, float]]:
    """Trains a policy, or a reward model, on fixed data: one update per step of `batch_size` examples.

    Every epoch has its own order.

    Args:
        examples: From `rlloss.loop.completions` for the family `likelihood`, from `rlloss.loop.pairs` for
            `preference` and `reward`, from `rlloss.loop.labelled` for `unpaired`.
        seed: Of the order of examples.
        **options: `RunOptions`: folder, evaluation, checkpoints, resumption.
    """
    objective_of(loss_fn)
    session.track(loss=loss_fn)
    order = example_order(len(examples), batch_size, seed)

    def train_step(step: int) -> dict[str, float]:
        batch = offline_batch(session, [examples[i] for i in order(step)], loss_fn)
        loss, metrics = session.forward_backward(batch, loss_fn)
        numbers = {"loss": loss, **scalars(metrics), **session.optim_step()}
        loss_fn.after_step(metrics)
        return numbers

    return run_steps(
        session,
        train_step,
        steps,
        bar_keys=("loss", "nll", "accuracy", "margin"),
        **options,
    )


def evaluate_offline(
    session: Session, examples: Sequence[Example], loss_fn: Loss, prefix: str = "eval/"
) -> dict[str, float]:
    """The loss and its metrics on held-out examples, without gradient: what `evaluate` of a run wants."""
    loss, metrics = session.forward(offline_batch(session, examples, loss_fn), loss_fn)
    return {f"{prefix}{name}": x for name, x in {"loss": loss, **scalars(metrics)}.items()}


def offline_batch(session: Session, examples: Sequence[Example], loss_fn: Loss) -> Batch:
    """Examples as one batch, with the reference's log-probs and KTO's KL where the loss needs them.

    Log-probs that `with_ref_logprobs` has attached are taken; else the session's reference is asked.
    """
    wanted = _EXAMPLES.get(loss_fn.family)
    if wanted is None:
        raise ValueError(
            f"{type(loss_fn).__name__}: the family {loss_fn.family!r} does not train on fixed data; use train_online, "
            f"or a loss of one of the families {sorted(_EXAMPLES)}"
        )
    rows: list[Tokens] = []
    for example in examples:
        if not isinstance(example, wanted):
            raise ValueError(
                f"{type(loss_fn).__name__}: trains on rlloss.loop.{wanted.__name__} examples "
                f"(family {loss_fn.family!r}), got {type(example).__name__}"
            )
        rows += _rows(example)
    batch = collate(rows, rows_per_example=objective_of(loss_fn).rows_per_example)
    if loss_fn.needs_reference:
        batch.fields["ref_logprobs"] = _ref_logprobs(session, rows, batch)
    labelled = [example for example in examples if isinstance(example, Labelled)]
    if labelled:
        batch.fields["desirable"] = torch.tensor([example.desirable for example in labelled])
    if needs_kl(loss_fn):
        batch.fields["kl"] = _mismatch_kl(session, [example.mismatched for example in labelled])
    return batch


def _rows(example: Example) -> list[Tokens]:
    if isinstance(example, Pair):
        return [example.chosen, example.rejected]
    return [example.tokens if isinstance(example, Labelled) else example]


def _ref_logprobs(session: Session, rows: Sequence[Tokens], batch: Batch) -> Tensor:
    cached = ref_logprobs_of(rows, batch)
    if cached is not None and "reference" in session.tracked:
        raise ValueError(
            "offline_batch: the examples carry log-probs of a reference that reference_mix moves; train on examples "
            "without them"
        )
    return session.logprobs(batch, reference=True) if cached is None else cached


def _mismatch_kl(session: Session, rows: Sequence[Tokens]) -> Tensor:
    batch = collate(rows)
    policy, ref = (
        sequence_logps(logprobs, batch.loss_mask)
        for logprobs in (session.logprobs(batch), _ref_logprobs(session, rows, batch))
    )
    return kto_kl(Mean.of(policy - ref, batch.loss_mask.any(-1)))
