"""What every training run does around its steps: log, evaluate, save, resume."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from rlloss._checks import check_count
from rlloss.loop.checkpoint import has_checkpoint
from rlloss.loop.reference_mix import ReferenceMix
from rlloss.loop.report import RunLog
from rlloss.loop.session import Session

__all__ = ["Evaluation", "RunOptions", "example_order", "generator_of", "run_steps"]

Evaluation = Callable[[Session], Mapping[str, float]]


class RunOptions(TypedDict, total=False):
    """What every training run takes besides its algorithm.

    folder: Gets metrics.jsonl and, every `save_every` steps and at the end, checkpoint/. A run that does not resume
        replaces what an earlier one left there.
    evaluate: A function of the session; its numbers join those of every `evaluate_every`-th step and of the last.
    resume: Continues from the folder's checkpoint, bit for bit, where there is one.
    until: Ends the run early, after the first step for whose numbers it is true.
    reference_mix: Moves the session's reference to the policy every few steps.
    progress: Shows a bar.
    """

    folder: str | Path | None
    evaluate: Evaluation | None
    evaluate_every: int | None
    save_every: int | None
    resume: bool
    until: Callable[[Mapping[str, float]], bool] | None
    reference_mix: ReferenceMix | None
    progress: bool


def run_steps(
    session: Session,
    train_step: Callable[[int], dict[str, float]],
    steps: int,
    *,
    folder: str | Path | None = None,
    evaluate: Evaluation | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    resume: bool = False,
    until: Callable[[Mapping[str, float]], bool] | None = None,
    reference_mix: ReferenceMix | None = None,
    progress: bool = True,
    bar_keys: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Runs `train_step(0)` to `train_step(steps - 1)` under `RunOptions`; returns the numbers of each step."""
    check_count("run_steps", "steps", steps)
    for name, every in {"evaluate_every": evaluate_every, "save_every": save_every}.items():
        if every is not None:
            check_count("run_steps", name, every)
    if (resume or save_every) and folder is None:
        raise ValueError("run_steps: resume and save_every need a folder, got None")
    if reference_mix is not None:
        reference_mix.begin(session)
    checkpoint = None if folder is None else Path(folder) / "checkpoint"
    first = 0
    if resume and checkpoint is not None and has_checkpoint(checkpoint):
        first = session.load_state(checkpoint)["next_step"]

    def is_due(step: int, every: int | None) -> bool:
        return step == steps - 1 or (every is not None and (step + 1) % every == 0)

    history: list[dict[str, float]] = []
    with RunLog(folder, total_steps=steps, progress=progress, bar_keys=bar_keys, resume_from=first) as log:
        for step in range(first, steps):
            numbers = train_step(step)
            if reference_mix is not None:
                reference_mix.after(step, session)
            if evaluate is not None and is_due(step, evaluate_every):
                numbers |= evaluate(session)
            log.log(step, numbers)
            history.append({"step": step, **numbers})
            is_over = until is not None and until(numbers)
            if checkpoint is not None and (is_over or is_due(step, save_every)):
                session.save_state(checkpoint, {"next_step": step + 1})
            if is_over:
                break
    return history


def example_order(num_examples: int, per_step: int, seed: int) -> Callable[[int], list[int]]:
    """Step -> which examples it takes: every epoch in a new random order, known from the seed and the step alone.

    >>> order = example_order(5, per_step=2, seed=0)
    >>> sorted(order(0) + order(1) + order(2)[:1])
    [0, 1, 2, 3, 4]
    """
    check_count("example_order", "per_step", per_step)
    if num_examples < 1:
        raise ValueError("example_order: needs at least one example, got none")

    def permutation(epoch: int) -> list[int]:
        return torch.randperm(num_examples, generator=generator_of(seed, epoch)).tolist()

    def of_step(step: int) -> list[int]:
        return list(_slice_of_epochs(permutation, num_examples, step * per_step, per_step))

    return of_step


def generator_of(seed: int, number: int) -> torch.Generator:
    """The generator of one step or epoch, known from the run's seed and its number alone.

    >>> generator_of(0, 1).initial_seed() == generator_of(0, 2).initial_seed()
    False
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _slice_of_epochs(
    permutation: Callable[[int], list[int]], num_examples: int, start: int, length: int
) -> Iterator[int]:
    epoch, offset = divmod(start, num_examples)
    while length > 0:
        part = permutation(epoch)[offset : offset + length]
        yield from part
        length, epoch, offset = length - len(part), epoch + 1, 0
