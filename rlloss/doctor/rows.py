"""What is wrong with rows of a data file, from their texts alone."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlloss.doctor.finding import Diagnosis, Finding, counted, diagnosis, likely
from rlloss.doctor.messages import answer, content_key, unusual_order, written

__all__ = ["doctor_rows"]

_ANSWERS = ("chosen", "rejected", "completion", "response", "messages", "text")
_COLUMNS = ("prompt", *_ANSWERS, "label")
# Lengths of texts are spread over decades: what stands out is far above the typical one and the long ones.
FAR_BEYOND_MEDIAN = 20
FAR_BEYOND_LONG = 4
ROWS_FOR_QUANTILES = 20
# A fair coin shows 90% of one side in 50 tosses once in a hundred million.
LONGER_SHARE = 0.9
PAIRS_FOR_LENGTHS = 50

_Rows = list[tuple[int, Mapping[str, Any]]]


def doctor_rows(rows: Iterable[Mapping[str, Any]]) -> Diagnosis:
    """What is wrong with rows of prompts, answers, pairs, labels or messages, before a tokenizer sees them.

    `rows` are dicts or what `rlloss.loop.load_rows` returns, with the columns that the loop reads: `prompt`, `chosen`,
    `rejected`, `completion` (or `response`), `label`, `messages`, `text`. Other columns are not looked at. Rows are
    numbered from 0.

    >>> seen = doctor_rows([{"prompt": "2+2=", "chosen": "4", "rejected": "4"}])
    >>> seen.names, seen.findings[0].rows
    (['identical_pairs'], (0,))
    """
    given = list(enumerate(rows))
    odd = [i for i, row in given if not isinstance(row, Mapping)]
    kept: _Rows = [(i, row) for i, row in given if isinstance(row, Mapping)]
    findings: list[Finding] = []
    if odd:
        findings.append(_not_dicts(odd, type(given[odd[0]][1]).__name__))
    checks: list[Callable[[_Rows], Iterator[Finding]]] = [
        _columns, _empty, _identical, _roles, _duplicated, _labels, _contradictions, _lengths, _longer,
    ]  # fmt: skip
    for check in checks:
        findings += check(kept)
    return diagnosis(f"{counted(len(given), 'row')} of data", findings)


def _not_dicts(odd: Sequence[int], kind: str) -> Finding:
    return Finding(
        "error",
        "not_a_row",
        f"{counted(len(odd), 'row')} are no dicts (the first is a {kind})",
        "a row is a dict of columns",
        "rlloss.loop.load_rows reads .jsonl, .json, .csv and .parquet files and lists of dicts",
        tuple(odd),
    )


def _columns(rows: _Rows) -> Iterator[Finding]:
    names = {str(name): None for _, row in rows for name in row}
    for name in names:
        word = likely(name, [column for column in _COLUMNS if column not in names])
        if name not in _COLUMNS and word and not set(names) & set(_ANSWERS) - {"text"}:
            yield Finding(
                "warning",
                "unknown_name",
                f"column {name!r}; did you mean {word!r}?",
                "the loop reads columns by their names; this one was not looked at",
                "load_rows(..., columns={'ours': 'theirs'}) renames",
            )
    if names and not set(names) & {*_ANSWERS, "prompt"}:
        yield Finding(
            "error",
            "no_known_column",
            f"none of the columns {list(names)[:8]} holds prompts or answers",
            f"known are {', '.join(_COLUMNS)}",
            "load_rows(..., columns={'prompt': 'your column', ...}) renames",
        )


def _empty(rows: _Rows) -> Iterator[Finding]:
    empty, unasked = [], []
    with_answers = any(row.get(name) is not None for _, row in rows for name in _ANSWERS)
    sides = [name for name in ("chosen", "rejected") if any(name in row for _, row in rows)]
    for i, row in rows:
        there = [name for name in _ANSWERS if row.get(name) is not None]
        half = len(set(there) & set(sides)) == 1
        if half or any(not answer(row[name]) for name in there) or (with_answers and not there):
            empty.append(i)
        if "prompt" in row and not written(row["prompt"]).strip():
            unasked.append(i)
    if empty:
        yield Finding(
            "error",
            "empty_answers",
            f"{counted(len(empty), 'row')} without an answer: missing, empty or blank",
            "such a row trains the end of sequence alone, right after the prompt: the model learns to say nothing",
            "drop these rows, or look where their answers were lost",
            tuple(empty),
        )
    if unasked:
        yield Finding(
            "warning",
            "empty_prompts",
            f"{counted(len(unasked), 'row')} with an empty prompt",
            "the answer would be learnt as an answer to nothing",
            "drop these rows; text to imitate from its beginning goes into a column `text`",
            tuple(unasked),
        )


def _identical(rows: _Rows) -> Iterator[Finding]:
    pairs = [(i, row) for i, row in rows if row.get("chosen") is not None and row.get("rejected") is not None]
    same = [i for i, row in pairs if content_key(row["chosen"]) == content_key(row["rejected"])]
    if same:
        yield Finding(
            "warning",
            "identical_pairs",
            f"chosen and rejected are the same in {len(same)} of {counted(len(pairs), 'pair')}, blanks aside",
            "their margin is 0 whatever the model does: no gradient, but they count in every mean",
            "drop these rows",
            tuple(same),
        )


def _roles(rows: _Rows) -> Iterator[Finding]:
    wrong, first = [], ""
    for i, row in rows:
        faults = [f"{name}: {fault}" for name in ("prompt", *_ANSWERS) for fault in unusual_order(name, row)]
        if faults:
            wrong.append(i)
            first = first or faults[0]
    if wrong:
        yield Finding(
            "warning",
            "roles_out_of_order",
            f"{counted(len(wrong), 'dialogue')} with messages in an unusual order; row {wrong[0]}: {first}",
            "chat templates refuse such a dialogue or write one that the model has never seen; turns may have been "
            "lost or swapped",
            "a dialogue is an optional system message, then user and assistant in turn (tools answer the assistant), "
            "and ends with the assistant's answer",
            tuple(wrong),
        )


def _duplicated(rows: _Rows) -> Iterator[Finding]:
    first: dict[str, int] = {}
    copies = []
    for i, row in rows:
        key = content_key({name: row.get(name) for name in _COLUMNS if row.get(name) is not None})
        if key in first and key != "{}":
            copies.append((i, first[key]))
        first.setdefault(key, i)
    if copies:
        yield Finding(
            "warning",
            "duplicated_rows",
            f"{len(copies)} of {len(rows)} rows repeat an earlier one (row {copies[0][0]} is row {copies[0][1]})",
            "they count twice, and between a training and a test split they leak",
            "drop the copies before the data are split",
            tuple(i for i, _ in copies),
        )


def _labels(rows: _Rows) -> Iterator[Finding]:
    labels = [(i, row["label"]) for i, row in rows if "label" in row]
    odd = [(i, label) for i, label in labels if not isinstance(label, bool) and label not in (0, 1)]
    if odd:
        yield Finding(
            "error",
            "odd_labels",
            f"{counted(len(odd), 'label')} are neither True nor False; the first is {odd[0][1]!r}",
            "a label says whether the answer is desirable; a text or a grade is neither",
            "make them True and False, and say yourself from which grade on an answer is good",
            tuple(i for i, _ in odd),
        )
    elif len(labels) > 1 and len({bool(label) for _, label in labels}) == 1:
        yield Finding(
            "warning",
            "one_label",
            f"all {len(labels)} labels are {bool(labels[0][1])}",
            "a loss on single answers learns from the difference between good and bad ones; with one kind alone it "
            "pushes everything one way",
            "add answers of the other kind; to imitate good ones alone, use the sft loss",
        )


def _contradictions(rows: _Rows) -> Iterator[Finding]:
    """The same answer to the same prompt, judged both ways: by labels, or by pairs that stand the other way round."""
    verdicts: dict[tuple[str, ...], dict[bool, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in rows:
        prompt, given = content_key(row.get("prompt")), row.get("completion", row.get("response"))
        if row.get("label") in (0, 1) and (given is not None or row.get("messages") is not None):
            verdicts[prompt, content_key(given if given is not None else row["messages"])][bool(row["label"])].append(i)
        elif row.get("chosen") is not None and row.get("rejected") is not None:
            sides = [content_key(row["chosen"]), content_key(row["rejected"])]
            if sides[0] != sides[1]:
                low, high = sorted(sides)
                verdicts[prompt, low, high][sides[0] == low].append(i)
    clashes = [seen for seen in verdicts.values() if len(seen) == 2]
    if clashes:
        wrong = sorted(i for seen in clashes for row_numbers in seen.values() for i in row_numbers)
        yield Finding(
            "warning",
            "contradicting_labels",
            f"{counted(len(clashes), 'answer or pair', 'answers or pairs')} judged both ways, in {len(wrong)} rows"
            f" (rows {clashes[0][True][0]} and {clashes[0][False][0]} for one)",
            "the same answer to the same prompt is good here and bad there: the two gradients cancel, and the best "
            "accuracy is below 1",
            "keep the verdict of the majority, or drop both; a swapped pair of columns is the usual cause of many",
            tuple(wrong),
        )


def _lengths(rows: _Rows) -> Iterator[Finding]:
    for name in ("prompt", *_ANSWERS):
        sizes = [(i, len(written(row[name]))) for i, row in rows if row.get(name) is not None]
        if len(sizes) < ROWS_FOR_QUANTILES:
            continue
        ordered = sorted(size for _, size in sizes)
        median, upper, long = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.75, 0.95))
        # the longest ones are themselves a part of the 95% quantile of a small file: the three-quarter one is not moved
        limit = max(FAR_BEYOND_MEDIAN * max(median, 1), FAR_BEYOND_LONG * (long if len(sizes) >= 200 else upper))
        far = [(size, i) for i, size in sizes if size > limit]
        if far:
            yield Finding(
                "note",
                "odd_lengths",
                f"{counted(len(far), f'{name}', f'{name}s' if name != 'messages' else name)} of up to {max(far)[0]:,} "
                f"characters, where the median is {median:,.0f} and 95% are below {long:,.0f}",
                "one such row sets the memory of its step, and a limit on tokens cuts it in the middle; often two "
                "records glued together, or a dump",
                "look at these rows; drop them, or set max_length knowing what it cuts",
                tuple(sorted(i for _, i in far)),
            )


def _longer(rows: _Rows) -> Iterator[Finding]:
    pairs = [row for _, row in rows if row.get("chosen") is not None and row.get("rejected") is not None]
    sizes = [(len(written(row["chosen"])), len(written(row["rejected"]))) for row in pairs]
    longer, shorter = sum(a > b for a, b in sizes), sum(a < b for a, b in sizes)
    if len(pairs) >= PAIRS_FOR_LENGTHS and max(longer, shorter) >= LONGER_SHARE * len(pairs):
        which = "longer" if longer > shorter else "shorter"
        yield Finding(
            "note",
            "length_tells",
            f"the chosen answer is the {which} one in {max(longer, shorter)} of {len(pairs)} pairs",
            f"a model that only learns to write {'more' if longer > shorter else 'less'} is right nearly always",
            "balance the pairs by length, or use a loss that normalises by it (simpo, or mean log-probs)",
        )
