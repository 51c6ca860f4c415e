"""The data of a run, loaded as users name it: rows, a part that is held out, and the examples of the algorithm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlloss.loop.data import completions, pairs, prompts
from rlloss.loop.dialogues import ASSISTANT
from rlloss.loop.labelled import labelled
from rlloss.loop.rows import load_rows
from rlloss.loop.splits import eval_split
from rlloss.loop.truncation import NothingTrainedError
from rlloss.trainer.algorithms import WHO, Algorithm

__all__ = ["Data", "data_of", "eval_examples_of"]

Rows = Any  # a datasets.Dataset, which the loop alone imports


class Data(NamedTuple):
    """What a run trains on, what `evaluate()` is about, and the user's `column_mapping` as ours from theirs."""

    examples: Sequence[Any]
    eval_examples: Sequence[Any]
    columns: Mapping[str, str] | None


def data_of(algorithm: Algorithm, dataset: Any, tokenizer: Any, values: Mapping[str, Any]) -> Data:
    """The examples of a dataset, and those of `eval_dataset` or of a part that is held out.

    Rows that teach nothing are left out, which prints one line; it raises where none is left.
    """
    evaluated = values["eval_dataset"]
    if dataset is None:
        return Data(
            [], [] if evaluated is None else eval_examples_of(algorithm, evaluated, tokenizer, values, None), None
        )
    rows = load_rows(dataset, split=values["split"])
    columns = _ours_from_theirs(values["column_mapping"] or {}, rows.column_names)
    rows = _limited(_renamed(rows, columns), values)
    number, rows = len(rows), _answered(algorithm, rows)
    unanswered, held_out, eval_examples, too_long = number - len(rows), None, [], 0
    if evaluated is not None:
        eval_examples = eval_examples_of(algorithm, evaluated, tokenizer, values, columns)
    else:
        rows, held_out = _held_out(rows, values["eval_fraction"], values["seed"])
    if held_out is not None:
        try:
            eval_examples, too_long = _examples(algorithm, held_out, tokenizer, values)
        except NothingTrainedError:
            too_long = len(held_out)
        _report_one_of_kto(algorithm, eval_examples)
    examples, too_long_too = _examples(algorithm, rows, tokenizer, values)
    _report_dropped("rows", number, unanswered, too_long + too_long_too, values)
    if values["eval_steps"] is not None and not eval_examples:
        raise ValueError(
            f"{WHO}: eval_steps={values['eval_steps']} has nothing to evaluate on; pass eval_dataset, or eval_fraction "
            "and more rows, or leave it out"
        )
    return Data(examples, eval_examples, columns)


def eval_examples_of(
    algorithm: Algorithm, source: Any, tokenizer: Any, values: Mapping[str, Any], columns: Mapping[str, str] | None
) -> Sequence[Any]:
    """Examples to evaluate on, from a source of rows of its own.

    Args:
        columns: As ours from theirs; None reads `column_mapping` by the columns of these rows.
    """
    split = eval_split(source, values["split"]) if values["eval_split"] is None else values["eval_split"]
    rows = load_rows(source, split=split)
    if columns is None:
        columns = _ours_from_theirs(values["column_mapping"] or {}, rows.column_names)
    rows = _renamed(rows, columns)
    number, rows = len(rows), _answered(algorithm, rows)
    examples, too_long = _examples(algorithm, rows, tokenizer, values)
    _report_dropped("rows to evaluate on", number, number - len(rows), too_long, values)
    _report_one_of_kto(algorithm, examples)
    return examples


def _limited(rows: Rows, values: Mapping[str, Any]) -> Rows:
    if values["percent"] is not None:
        rows = rows.select(range(math.ceil(len(rows) * values["percent"] / 100)))
    if values["max_samples"] is not None:
        rows = rows.select(range(min(len(rows), values["max_samples"])))
    return rows


def _held_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows | None]:
    """What is trained on and what `evaluate()` is about: a random part, of one row at least, or None."""
    number = math.ceil(len(rows) * fraction)
    if number == 0 or len(rows) < 2:
        return rows, None
    shuffled = rows.shuffle(seed=seed)
    return shuffled.select(range(number, len(rows))), shuffled.select(range(number))


def _examples(algorithm: Algorithm, rows: Rows, tokenizer: Any, values: Mapping[str, Any]) -> tuple[Sequence[Any], int]:
    """Rows as the examples of the algorithm, and how many were left out, since the limits leave nothing to train."""
    limit, most = values["max_prompt_length"], values["max_seq_length"]
    if algorithm.kind in ("policy", "critic"):
        room = [x for x in (limit, most and most - values["max_new_tokens"]) if x is not None]
        return prompts(rows, tokenizer, max_prompt_length=min(room, default=None)), 0
    make = {"likelihood": completions, "preference": pairs, "reward": pairs, "unpaired": labelled}[algorithm.kind]
    limits = {"max_length": most, "max_prompt_length": limit, "truncation_mode": values["truncation_mode"]}
    try:
        return make(rows, tokenizer, **limits), 0
    except NothingTrainedError as error:
        lost = set(error.rows)
        if len(lost) == len(rows):
            raise
        kept = rows.select([i for i in range(len(rows)) if i not in lost])
        return make(kept, tokenizer, **limits), len(lost)


def _answered(algorithm: Algorithm, rows: Rows) -> Rows:
    """The rows that hold an answer to learn from; all of them where none does, for which their reader raises."""
    columns = _answer_columns(algorithm, rows.column_names)
    if not columns:
        return rows
    answers = zip(*(rows[name] for name in columns), strict=True)
    kept = [i for i, row in enumerate(answers) if not any(map(_is_empty, columns, row))]
    return rows if len(kept) in (0, len(rows)) else rows.select(kept)


def _answer_columns(algorithm: Algorithm, columns: Sequence[str]) -> list[str]:
    if algorithm.kind in ("policy", "critic"):
        return []
    names = ("completion", "response", "messages", "text") if algorithm.kind in ("likelihood", "unpaired") else ()
    own = [name for name in names if name in columns][:1]
    return own or [name for name in ("chosen", "rejected") if name in columns]


def _is_empty(column: str, answer: Any) -> bool:
    """No text, a dialogue that ends where its answer would begin, or messages that end with nothing said."""
    if isinstance(answer, list):
        last = answer[-1] if answer else {}
        if column == "messages" and not any(isinstance(m, Mapping) and m.get("role") == "assistant" for m in answer):
            return True
        return isinstance(last, Mapping) and not (last.get("content") or "").strip() and not last.get("tool_calls")
    return answer is None or (isinstance(answer, str) and not answer.rpartition(ASSISTANT)[2].strip())


def _report_dropped(what: str, number: int, unanswered: int, too_long: int, values: Mapping[str, Any]) -> None:
    reasons = []
    if unanswered:
        reasons.append(f"{unanswered} without an answer")
    if too_long:
        reasons.append(
            f"{too_long} of whose answer max_seq_length={values['max_seq_length']} leaves nothing (raise it, or cut "
            "their prompts: max_prompt_length, truncation_mode='keep_end')"
        )
    if reasons:
        print(f"{WHO}: dropped {unanswered + too_long} of {number} {what}: {', '.join(reasons)}")


def _report_one_of_kto(algorithm: Algorithm, examples: Sequence[Any]) -> None:
    if algorithm.name == "kto" and len(examples) == 1:
        print(f"{WHO}: there is one row to evaluate on, so that its KL is that of its own answer; take more of them")


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


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """With our names, where the rows do not have them already."""
    names = rows.column_names
    renames = {ours: theirs for ours, theirs in columns.items() if theirs in names or ours not in names}
    return load_rows(rows, columns=renames) if renames else rows
