"""The data of a run, loaded as users name it: rows, a part that is held out, and the examples of the algorithm."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlloss._checks import check_count, check_range
from rlloss.loop.data import completions, pairs, prompts
from rlloss.loop.labelled import labelled
from rlloss.loop.rows import load_rows
from rlloss.trainer.algorithms import WHO, Algorithm

if TYPE_CHECKING:
    import datasets

__all__ = ["examples_of", "held_out", "rows_of"]

Source = "str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.DatasetDict"


def rows_of(source: Any, values: Mapping[str, Any]) -> "datasets.Dataset":
    """The rows that `split`, `column_mapping`, `percent` and `max_samples` leave."""
    rows = load_rows(source, split=values["split"])
    mapping = values["column_mapping"]
    if mapping:
        rows = load_rows(rows, columns=_ours_from_theirs(mapping, rows.column_names))
    if values["percent"] is not None:
        check_range(WHO, "percent", values["percent"], 0, 100, open_low=True)
        rows = rows.select(range(math.ceil(len(rows) * values["percent"] / 100)))
    if values["max_samples"] is not None:
        check_count(WHO, "max_samples", values["max_samples"])
        rows = rows.select(range(min(len(rows), values["max_samples"])))
    return rows


def held_out(
    rows: "datasets.Dataset", fraction: float, seed: int
) -> "tuple[datasets.Dataset, datasets.Dataset | None]":
    """What is trained on and what `evaluate()` is about: a random part, of one row at least, or None."""
    check_range(WHO, "eval_fraction", fraction, 0, 0.5)
    number = math.ceil(len(rows) * fraction)
    if number == 0 or len(rows) < 2:
        return rows, None
    shuffled = rows.shuffle(seed=seed)
    return shuffled.select(range(number, len(rows))), shuffled.select(range(number))


def examples_of(
    algorithm: Algorithm, rows: "datasets.Dataset", tokenizer: Any, values: Mapping[str, Any]
) -> Sequence[Any]:
    """Rows as the examples that the algorithm trains on."""
    if algorithm.kind in ("policy", "critic"):
        return prompts(rows, tokenizer, max_prompt_length=values["max_prompt_length"])
    make = {"likelihood": completions, "preference": pairs, "reward": pairs, "unpaired": labelled}[algorithm.kind]
    return make(
        rows,
        tokenizer,
        max_length=values["max_seq_length"],
        max_prompt_length=values["max_prompt_length"],
        truncation_mode=values["truncation_mode"],
    )


def _ours_from_theirs(mapping: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """As `load_rows` wants it; users' mappings go either way, and identities say nothing."""
    renames = {ours: theirs for ours, theirs in mapping.items() if ours != theirs}
    if not all(theirs in columns for theirs in renames.values()):
        renames = {ours: theirs for theirs, ours in renames.items()}
    if not all(theirs in columns for theirs in renames.values()):
        raise ValueError(
            f"{WHO}: column_mapping must map this library's columns to those of the data (or the reverse), got "
            f"{dict(mapping)} for {list(columns)}"
        )
    return renames
