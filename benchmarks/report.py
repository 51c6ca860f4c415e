"""The table of a case, and its JSON lines."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import Case

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"torch": "torch", "triton": "triton", "trl": "trl", "liger": "liger-kernel", "rlloss": "rlloss"}
MEASURED = (
    *("wall_s", "wall_min_s", "cpu_s", "forward_wall_s", "backward_wall_s", "wall_over_ours", "cpu_over_ours"),
    *("rounds", "roofline_fraction", "excess_bytes", "mandatory_bytes", "backward_over_dense"),
)
TOLERATED_NEIGHBOURS = 0.05  # of all cores
HEADINGS = ("wall ms", "CPU ms", "wall/ours", "CPU/ours", "excess MiB", "max error", "grad error", "roofline")


def machine() -> dict[str, Any]:
    return {
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.*)") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Null for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checked out commit, with `+` where files of it were changed; null outside a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return None if head is None else head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def results_file(folder: Path, gpu: str = "") -> Path:
    """That of the GPU, or of this machine's processor."""
    name = slug(gpu) if gpu else f"{slug(str(machine()['cpu'])) or 'unknown'}-{os.cpu_count()}cores"
    return folder / f"{time.strftime('%Y-%m-%d')}-{name}.jsonl"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def lines(case: Case, record: dict[str, Any], **run: Any) -> list[dict[str, Any]]:
    """One object per implementation and case; times are null where the case failed.

    Args:
        run: What else there is to say of the run: `quick`, `threads`, ...
    """
    shared = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "case": case.name,
        **{key: value for key, value in asdict(case).items() if key not in ("name", "only")},
        **run,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": sys.argv[1:],
        "passed": not record["failures"],
        "roofline": case.work[0],
        "roofline_rate": record.get("roofline_rate"),
        "neighbours": record.get("neighbours"),
    }
    empty = dict.fromkeys(MEASURED)
    return [{**shared, "implementation": name, **empty, **row} for name, row in record["rows"].items()]


def appended(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def table(case: Case, record: dict[str, Any], headings: Sequence[str] = HEADINGS) -> str:
    cells = [("implementation", *headings)]
    for name, row in record["rows"].items():
        of_row = _cells(case, row)
        cells.append((name, *(of_row[heading] for heading in headings)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join([f"  {name:<{widths[0]}}", *map(str.rjust, rest, widths[1:])]) for name, *rest in cells]
    part = record["rows"]["ours"].get("backward_over_dense")
    if part is not None:
        text.append(f"  ours: backward takes {part:.2f} of its own dense backward")
    if (record.get("neighbours") or 0) > TOLERATED_NEIGHBOURS:
        text.append(
            f"  NOT ALONE: other processes took {record['neighbours']:.0%} of the cores; do not quote these times"
        )
    return "\n".join(text)


def _cells(case: Case, row: dict[str, Any]) -> dict[str, str]:
    """What a table can show of a row, by heading."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        value = row.get(key)
        return "-" if value is None else format(value * scale, form)

    return {
        "wall ms": number("wall_s", ".1f", 1e3),
        "CPU ms": number("cpu_s", ".1f", 1e3),
        "ms": number("wall_s", ".3f", 1e3),
        "least": number("wall_min_s", ".3f", 1e3),
        "forward": number("forward_wall_s", ".3f", 1e3),
        "backward": number("backward_wall_s", ".3f", 1e3),
        "wall/ours": number("wall_over_ours", ".2f"),
        "CPU/ours": number("cpu_over_ours", ".2f"),
        "excess MiB": number("excess_bytes", ".1f", 2**-20),
        "max error": "not finite" if row["max_error"] is None else f"{row['max_error']:.1e}",
        "grad error": _gradient_error(case, row),
        "roofline": number("roofline_fraction", ".2f"),
    }


def _gradient_error(case: Case, row: dict[str, Any]) -> str:
    """In low precision also as a multiple of its floor."""
    if not row["gradient_errors"]:
        return "-"
    error, floor = row["gradient_error"], row["gradient_floor"]
    if error is None:
        return "not finite"
    return f"{error:.1e}" + ("" if case.dtype == "float32" else f" ({error / floor:.2f} floors)")


def _first_match(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found and found.group(1).strip()
