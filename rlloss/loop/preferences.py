"""Preference data as rows of prompt, chosen and rejected: made from labels, freed of ties, split from dialogues."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlloss._checks import check_range
from rlloss.loop.columns import check_column, pair_texts, placed
from rlloss.loop.rows import load_rows

if TYPE_CHECKING:
    import datasets

__all__ = ["dialogue_rows", "preference_rows", "without_ties"]

logger = logging.getLogger("rlloss")

Answers = Iterable[str] | Iterable[list[dict[str, Any]]]


def preference_rows(
    prompts: Answers, completions_a: Answers, completions_b: Answers, labels: Iterable[str]
) -> "datasets.Dataset":
    """Rows of prompt, chosen and rejected from two completions per prompt and a judgement of them.

    Args:
        prompts: Texts or messages, one per row, and so are the completions.
        completions_a: What is chosen where the label is "a".
        completions_b: What is chosen where the label is "b".
        labels: "a", "b", or "tie" for rows that are left out, whose number is logged. Numbers are refused: public data
            has 1 for the first completion here and for the second there.

    >>> preference_rows(["2+2=", "3+3="], ["4", "7"], ["5", "6"], ["a", "b"]).to_list()[1]
    {'prompt': '3+3=', 'chosen': '6', 'rejected': '7'}
    """
    columns = {"prompts": prompts, "completions_a": completions_a, "completions_b": completions_b, "labels": labels}
    lists = {name: _listed(name, values) for name, values in columns.items()}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"preference_rows: needs as many of each, got {lengths}")
    rows = []
    for index, (prompt, a, b, label) in enumerate(zip(*lists.values(), strict=True)):
        if label not in ("a", "b", "tie"):
            raise ValueError(
                f"preference_rows: labels[{index}] must be 'a', 'b' or 'tie', got {label!r}; of numbers say what they "
                "mean: [{0: 'a', 1: 'b'}[label] for label in labels]"
            )
        if label != "tie":
            chosen, rejected = (a, b) if label == "a" else (b, a)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if len(rows) < lengths["labels"]:
        ties = lengths["labels"] - len(rows)
        logger.warning("preference_rows: %d of %d labels are ties and were left out", ties, lengths["labels"])
    if not rows:
        raise ValueError("preference_rows: no row has a label 'a' or 'b', so that nothing is preferred")
    return load_rows(rows)


def without_ties(
    rows: "datasets.Dataset | Sequence[Mapping[str, Any]]",
    *,
    scores: tuple[str, str] | None = None,
    min_gap: float = 0.0,
) -> "datasets.Dataset":
    """The pairs that prefer something; how many of each kind were dropped is logged.

    Dropped are pairs with identical `chosen` and `rejected`, and where score columns are named, pairs whose scores do
    not differ by more than `min_gap`. A chosen answer that scores less than the rejected one by more is kept and
    counted.

    Args:
        rows: With the columns `chosen` and `rejected`.
        scores: The columns of their scores: `("score_chosen", "score_rejected")`.
        min_gap: In units of the scores.

    >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": rejected} for rejected in ("5", "4")]
    >>> without_ties(rows).to_list()
    [{'prompt': '2+2=', 'chosen': '4', 'rejected': '5'}]
    """
    who = "without_ties"
    check_range(who, "min_gap", min_gap, 0)
    if scores is None and min_gap:
        raise ValueError(
            f"{who}: {min_gap=} needs the columns of the scores: scores=('score_chosen', 'score_rejected')"
        )
    rows = load_rows(rows)
    for name in ("chosen", "rejected", *(scores or ())):
        check_column(who, name, rows.column_names)
    kept: list[int] = []
    same = close = reversed_ = 0
    for index, (where, row) in enumerate(placed(who, rows)):
        gap = math.inf if scores is None else _score(where, row, scores[0]) - _score(where, row, scores[1])
        if _bare(row["chosen"]) == _bare(row["rejected"]):
            same += 1
        elif abs(gap) <= min_gap:
            close += 1
        else:
            kept.append(index)
            reversed_ += gap < 0
    _report(who, len(rows), {"have identical answers": same, f"score within min_gap={min_gap:g}": close}, reversed_)
    if not kept:
        raise ValueError(f"{who}: all {len(rows)} pairs are ties; nothing is left to learn from")
    return rows if len(kept) == len(rows) else rows.select(kept)


def dialogue_rows(rows: "datasets.Dataset | Sequence[Mapping[str, Any]]") -> "datasets.Dataset":
    r"""Pairs of whole dialogues in one text, as Anthropic's hh-rlhf has them, as rows of prompt, chosen and rejected.

    The prompt is their common beginning up to the last "\n\nAssistant:" in it; prompt and answer laid together are the
    dialogue again. Other columns stay. `pairs`, `prompts` and `completions` read such rows directly.

    >>> dialogue = "\n\nHuman: Hi\n\nAssistant: "
    >>> dialogue_rows([{"chosen": dialogue + "Hello", "rejected": dialogue + "What"}]).to_list()
    [{'prompt': '\n\nHuman: Hi\n\nAssistant:', 'chosen': ' Hello', 'rejected': ' What'}]
    """
    import datasets

    who = "dialogue_rows"
    rows = load_rows(rows)
    for name in ("chosen", "rejected"):
        check_column(who, name, rows.column_names)
    if "prompt" in rows.column_names:
        raise ValueError(
            f"{who}: the rows have a column 'prompt' already; drop it with rows.remove_columns('prompt') if 'chosen' "
            "and 'rejected' hold it too"
        )
    prompts, chosen, rejected = zip(*(pair_texts(where, row) for where, row in placed(who, rows)), strict=True)
    made = datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    others = rows.remove_columns(["chosen", "rejected"])
    return datasets.concatenate_datasets([made, others], axis=1) if others.column_names else made


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"preference_rows: {name} must be a list with one entry per row, got {type(values).__name__}")
    return list(values)


def _bare(answer: Any) -> Any:
    """Messages without the None that Arrow fills in where another message of the column has a key."""
    if not isinstance(answer, list):
        return answer
    return [{key: x for key, x in message.items() if x is not None} for message in answer]


def _score(where: str, row: Mapping[str, Any], name: str) -> float:
    score = row[name]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(
            f"{where}: {name!r} must be a finite number, got {score!r}; convert the column, or drop such rows"
        )
    return float(score)


def _report(who: str, total: int, dropped: Mapping[str, int], reversed_: int) -> None:
    if sum(dropped.values()):
        kinds = ", ".join(f"{number} {kind}" for kind, number in dropped.items() if number)
        logger.warning("%s: dropped %d of %d pairs: %s", who, sum(dropped.values()), total, kinds)
    if reversed_:
        logger.warning(
            "%s: of %d pairs the chosen answer scores less than the rejected one; they are kept", who, reversed_
        )
