"""Offline training: likelihood losses on completions, preference losses on pairs."""

from collections.abc import Sequence
from typing import Unpack

from rlloss.loop.batch import Batch, collate
from rlloss.loop.data import Pair, Tokens
from rlloss.loop.objective import objective_of
from rlloss.loop.run import RunOptions, example_order, run_steps
from rlloss.loop.session import Session
from rlloss.output import scalars
from rlloss.protocol import Loss

__all__ = ["evaluate_offline", "offline_batch", "train_offline"]


def train_offline(
    session: Session,
    examples: Sequence[Tokens | Pair],
    loss_fn: Loss,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> list[dict[str, float]]:
    """Trains a policy on fixed data, one update per step of `batch_size` examples, in a new order every epoch.

    Args:
        examples: From `rlloss.loop.completions` for the family `likelihood`, from `rlloss.loop.pairs` for
            `preference`.
        seed: Of the order of examples.
        **options: `RunOptions`: folder, evaluation, checkpoints, resumption.
    """
    objective_of(loss_fn)
    order = example_order(len(examples), batch_size, seed)

    def train_step(step: int) -> dict[str, float]:
        batch = offline_batch(session, [examples[i] for i in order(step)], loss_fn)
        loss, metrics = session.forward_backward(batch, loss_fn)
        return {"loss": loss, **scalars(metrics), **session.optim_step()}

    return run_steps(
        session,
        train_step,
        steps,
        bar_keys=("loss", "nll", "accuracy", "margin"),
        **options,
    )


def evaluate_offline(
    session: Session, examples: Sequence[Tokens | Pair], loss_fn: Loss, prefix: str = "eval/"
) -> dict[str, float]:
    """The loss and its metrics on held-out examples, without gradient: what `evaluate` of a run wants."""
    loss, metrics = session.forward(offline_batch(session, examples, loss_fn), loss_fn)
    return {f"{prefix}{name}": x for name, x in {"loss": loss, **scalars(metrics)}.items()}


def offline_batch(session: Session, examples: Sequence[Tokens | Pair], loss_fn: Loss) -> Batch:
    """Examples as one batch, with the reference's log-probs where the loss needs them."""
    rows: list[Tokens] = []
    for example in examples:
        wanted = Pair if loss_fn.family == "preference" else Tokens
        if not isinstance(example, wanted):
            raise ValueError(
                f"{type(loss_fn).__name__}: trains on rlloss.loop.{wanted.__name__} examples "
                f"(family {loss_fn.family!r}), got {type(example).__name__}"
            )
        rows += [example.chosen, example.rejected] if isinstance(example, Pair) else [example]
    batch = collate(rows, rows_per_example=objective_of(loss_fn).rows_per_example)
    if loss_fn.needs_reference:
        batch.fields["ref_logprobs"] = session.logprobs(batch, reference=True)
    return batch
