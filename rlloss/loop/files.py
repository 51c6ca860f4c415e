"""Files of rows, and lists of dicts, as a `datasets.Dataset`: every bad line is an error that names it."""

import bisect
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

__all__ = ["ARROW_ERRORS", "SUFFIXES", "read_file", "row_unit", "table"]

ARROW_ERRORS = (ValueError, TypeError, OverflowError)  # ArrowInvalid and ArrowTypeError are subclasses
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def row_unit(path: Path) -> str:
    """What a row of the file is called: in JSON lines its number is the line's."""
    return "line" if path.suffix.lower() == ".jsonl" else "row"


def read_file(path: Path) -> "datasets.Dataset":
    """The rows of one file; a ValueError names the first line or row that cannot be read."""
    import datasets

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"load_rows: {path}: cannot read {suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}"
        )
    if suffix == ".parquet":
        from datasets.exceptions import DatasetsError

        try:
            return datasets.Dataset.from_parquet(str(path))
        except (DatasetsError, ValueError, OSError) as error:
            raise ValueError(f"load_rows: {path}: not a readable Parquet file: {error.__cause__ or error}") from error
    try:
        rows = list({".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"load_rows: {path}: byte {error.start} is not UTF-8 text; re-encode the file") from error
    return table(rows, lambda index: f"{path}, {row_unit(path)} {index + 1}")


def _jsonl(path: Path) -> Iterator[Any]:
    # Not splitlines, which would also split inside a JSON string at U+2028.
    for number, line in enumerate(path.read_text("utf-8-sig").rstrip().split("\n"), start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            what = f"{error.msg} at column {error.colno}" if line.strip() else "the line is blank"
            raise ValueError(
                f"load_rows: {path}, line {number}: malformed JSON: {what}; every line holds one object"
            ) from error


def _json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; is it JSON lines? then name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"load_rows: {path}, line {error.lineno}: malformed JSON: {error.msg} at column {error.colno}{hint}"
        ) from error
    if not isinstance(rows, list):
        keys = f" with keys {list(rows)[:8]}" if isinstance(rows, dict) else ""
        raise ValueError(
            f"load_rows: {path}: expected a list of objects, got {type(rows).__name__}{keys}; save the list alone"
        )
    return rows


def _csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header, *rows = [*reader] or [[]]
        except csv.Error as error:
            raise ValueError(f"load_rows: {path}, line {reader.line_num}: malformed CSV: {error}") from error
    if len(set(header)) != len(header):
        raise ValueError(f"load_rows: {path}: the header names a column twice: {header}")
    while rows and not rows[-1]:
        rows.pop()
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(header):
            raise ValueError(
                f"load_rows: {path}, row {number}: {len(cells)} cells under a header of {len(header)}; "
                "quote a cell that holds a comma or a line break"
            )
        yield dict(zip(header, cells, strict=True))


def table(rows: Sequence[Any], place_of: Callable[[int], str]) -> "datasets.Dataset":
    """A Dataset with the columns of all rows: Dataset.from_list drops what the first row lacks."""
    import datasets

    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"load_rows: {place_of(index)}: expected an object such as {{'prompt': ...}}, got "
                f"{type(row).__name__} {_short(row)}"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name) for row in rows] for name in names}
    try:
        return datasets.Dataset.from_dict(values)
    except ARROW_ERRORS as error:
        name, index = _misfit(values)
        raise ValueError(
            f"load_rows: {place_of(index)}: field {name!r} is {_short(values[name][index])}, which does not fit the "
            f"rows before it ({error}); a column holds values of one type"
        ) from error


def _misfit(values: dict[str, list[Any]]) -> tuple[str, int]:
    """The first column that Arrow refuses, and the first row of it that does not fit the rows before."""
    import datasets

    def is_refused(column: list[Any]) -> bool:
        try:
            datasets.Dataset.from_dict({"column": column})
        except ARROW_ERRORS:
            return True
        return False

    name = next(name for name, column in values.items() if is_refused(column))
    # A refused beginning stays refused as it grows, so bisection finds the row.
    sizes = range(1, len(values[name]) + 1)
    return name, bisect.bisect_left(sizes, True, key=lambda size: is_refused(values[name][:size]))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
