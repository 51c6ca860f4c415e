"""What a person sees of a run: metrics.jsonl and a progress bar while it goes, a table when it is over."""

import json
import logging
import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

__all__ = ["RunLog", "before_after_table", "read_metrics"]

_LOGGER = logging.getLogger("rlloss")
_FILE = "metrics.jsonl"
_BAR = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
_BAR_NAMES = {"accuracy": "acc", "ref_kl": "kl", "entropy": "ent", "clip_frac": "clip"}  # five fit into 80 columns


class RunLog:
    """The log of a run: one JSON line per call of `log` in `folder`/metrics.jsonl, and a progress bar.

    JSON has no NaN and no infinity. Such a value is written as null and reported once per key through the logger
    "rlloss": a run is worth more than one of its metrics.

    Args:
        folder: Is made if it does not exist; a file from an earlier run is appended to. None keeps no file.
        total_steps: The length of the bar.
        bar_keys: The numbers beside the bar, each as last logged.
        resume_from: The step that this run begins with: lines of that step and of later ones are dropped from the
            file (atomically), so that a run which died after its last checkpoint does not log its steps twice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RunLog(folder, total_steps=2, progress=False) as log:
    ...         log.log(0, {"reward": 0.25})
    ...         log.log(1, {"reward": 0.5, "accuracy": 0.75})
    ...     read_metrics(folder)
    [{'step': 0, 'reward': 0.25}, {'step': 1, 'reward': 0.5, 'accuracy': 0.75}]
    """

    def __init__(
        self,
        folder: str | Path | None,
        total_steps: int | None = None,
        progress: bool = True,
        bar_keys: Sequence[str] = ("reward", "accuracy", "ref_kl", "entropy", "clip_frac"),
        *,
        resume_from: int | None = None,
    ) -> None:
        self._bar_keys = tuple(bar_keys)
        self._shown: dict[str, str] = {}
        self._not_finite: set[str] = set()
        self._last_step = -1
        self._closed = False
        path = None if folder is None else Path(folder) / _FILE
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last_step = _cut_back(path, resume_from)
        self._bar = _bar(total_steps, resume_from or 0) if progress else None
        self._file = None if path is None else path.open("a", encoding="utf-8", newline="\n")

    def log(self, step: int, metrics: Mapping[str, SupportsFloat | str]) -> None:
        """Writes the metrics of one step, counted from 0; several calls of one step are several lines.

        A value may be anything that `float` accepts, a 0-dim tensor or a `Metric` too.
        """
        if self._closed:
            raise ValueError(f"RunLog: step {step} came after close(); log inside of the with block")
        if "step" in metrics:
            raise ValueError('RunLog: "step" is the name of the step itself; log the metric under another name')
        if step < self._last_step:
            raise ValueError(
                f"RunLog: step {step} came after step {self._last_step} was logged; resume_from={step} drops what an "
                "earlier run left in the folder, another folder keeps it"
            )
        self._last_step = step
        line = {"step": step} | {key: self._json_value(key, value) for key, value in metrics.items()}
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._bar is not None:
            self._shown |= {key: _short(line[key]) for key in self._bar_keys if key in line}
            shown = (f"{_BAR_NAMES.get(key, key)} {self._shown[key]}" for key in self._bar_keys if key in self._shown)
            self._bar.set_postfix_str(" ".join(shown), refresh=False)
            self._bar.update(step + 1 - self._bar.n)

    def close(self) -> None:
        """Closes the file and the bar; a second call does nothing."""
        self._closed = True
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _json_value(self, key: str, value: Any) -> float | int | str | None:
        if isinstance(value, str | int):
            return value
        number = float(value)
        if math.isfinite(number):
            return number
        if key not in self._not_finite:
            self._not_finite.add(key)
            if self._bar is not None:
                self._bar.clear()  # or the warning would be written onto its line
            _LOGGER.warning(
                "RunLog: %s is %s at step %d; written as null, here and from now on", key, number, self._last_step
            )
        return None


def read_metrics(folder_or_file: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first; a metric that was not finite reads None.

    A last line without its newline is one that a run is writing, or died writing, and is left out.
    """
    path = Path(folder_or_file)
    path = path / _FILE if path.is_dir() else path
    return [record for record, _ in _records(path)]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    *lines, _unfinished = path.read_text("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"read_metrics: {path}, line {number}: malformed JSON: {error.msg}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'read_metrics: {path}, line {number}: needs an object with an integer "step", got {line}')
        yield record, line


def _cut_back(path: Path, first_step: int | None) -> int:
    """Drops the lines from `first_step` on, and an unfinished last line; returns the last step that is left, or -1."""
    if not path.exists():
        return -1
    records = list(_records(path))
    kept = [(r["step"], line) for r, line in records if first_step is None or r["step"] < first_step]
    text = "".join(line + "\n" for _, line in kept)
    if len(text.encode()) != path.stat().st_size:
        if len(kept) < len(records):
            _LOGGER.warning(
                "RunLog: dropped %d lines of %s from step %d on", len(records) - len(kept), path, first_step
            )
        partial = path.with_suffix(".partial")
        partial.write_text(text, "utf-8", newline="\n")
        os.replace(partial, path)
    return kept[-1][0] if kept else -1


def _bar(total_steps: int | None, first_step: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('RunLog: the bar needs tqdm: pip install "rlloss[loop]", or pass progress=False') from error
    shape = "{n_fmt} steps {elapsed}{postfix}" if total_steps is None else _BAR
    return tqdm(total=total_steps, initial=first_step, dynamic_ncols=True, bar_format=shape)


def _short(value: float | int | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "nan"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def before_after_table(
    prompts: Sequence[str],
    targets: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    headline: Mapping[str, tuple[float, float]] | None = None,
    max_width: int = 40,
) -> str:
    r"""What the model wrote before and after training, one row per prompt, as aligned plain text.

    Line breaks are shown as `\n`, and texts longer than `max_width` are cut with an ellipsis.

    Args:
        headline: name -> (before, after): the numbers under the table.

    >>> print(before_after_table(["12+35=", "40+61="], ["47", "101"], ["4", "11\n"], ["47", "101"],
    ...                          headline={"accuracy": (0.0625, 0.9375)}))
    prompt  target  before  after
    ------  ------  ------  -----
    12+35=  47      4       47
    40+61=  101     11\n    101
    <BLANKLINE>
              before  after
    accuracy   0.062  0.938
    """
    columns = {"prompt": prompts, "target": targets, "before": before, "after": after}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"before_after_table: the columns must have one text per prompt, got {lengths}")
    rows = [[_one_line(text, max_width) for text in row] for row in zip(*columns.values(), strict=True)]
    table = _aligned([list(columns), [], *rows], left=4)
    if headline:
        numbers = [
            [name, *(f"{x:.3f}" if isinstance(x, float) else str(x) for x in pair)] for name, pair in headline.items()
        ]
        table += "\n\n" + _aligned([["", "before", "after"], *numbers], left=1)
    return table


def _one_line(text: str, max_width: int) -> str:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if _width(shown) <= max_width:
        return shown
    while _width(shown) > max_width - 1:
        shown = shown[:-1]
    return shown + "…"


def _width(text: str) -> int:
    """Columns of a terminal: an ideograph takes two, a combining mark none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _aligned(rows: list[list[str]], left: int) -> str:
    """Cells in columns two blanks apart, the first `left` of them left-aligned; an empty row becomes a rule."""
    widths = [max(map(_width, column)) for column in zip(*filter(None, rows), strict=True)]
    lines = []
    for row in rows:
        cells = row or ["-" * width for width in widths]
        gaps = [" " * (width - _width(cell)) for cell, width in zip(cells, widths, strict=True)]
        padded = [cell + gap if i < left else gap + cell for i, (cell, gap) in enumerate(zip(cells, gaps, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
