"""Pictures of what run.py measured.

    python benchmarks/plot.py                         all of benchmarks/results, the latest record of each point
    python benchmarks/plot.py FILE... --folder DIR    of these files, into DIR

against_tokens.png and against_vocabulary.png come of `run.py --sweep`: time and excess memory of forward and backward
through a head. ratios.png: in every case, how many times as long each other implementation takes. Pictures of what
gpu.py measured have the GPU's name before theirs. Failed cases are left out, and so are quick runs, unless `--quick`
asks for them: their times mean nothing.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from report import slug

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]

COLORS = {"ours": "#0b5cad", "naive": "#555555", "trl": "#d1702a", "liger": "#3d8b4f"}
COLORS |= {"liger-flce": "#7b8f2a", "liger-jsd": "#2a8f86", "liger-compiled": "#5f7d3a"}
OTHER = "#8a8a8a"
GRID = "#e6e6e6"
TITLES = {"trl": "TRL", "liger": "Liger", "cross_entropy": "F.cross_entropy", "compiled": "torch.compile"}
TITLES |= {"linear_cross_entropy": "F.linear_cross_entropy", "liger-flce": "Liger FLCE", "liger-jsd": "Liger JSD"}
TITLES["liger-compiled"] = "Liger, compiled"
AXES = {"tokens": ("N", "tokens N"), "vocabulary": ("V", "vocabulary V")}
LONGEST_BAR = 50.0  # a larger ratio is a number beside a bar that is cut
APART = 0.055  # of a panel's height: labels closer than this would overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of ratios.png")
    parser.add_argument("--quick", action="store_true", help="takes quick runs too")
    arguments = parser.parse_args()
    records = latest(arguments.files or sorted(RESULTS.glob("*.jsonl")), arguments.quick)
    figures = pictures(records, arguments.clock)
    if not figures:
        parser.exit(1, "no timed record to draw\n")
    for path in saved(figures, arguments.folder):
        print(path)


def latest(files: Iterable[Path], quick: bool) -> list[Record]:
    """The last record of each case and implementation, on each GPU or none, that has a time."""
    found: dict[tuple[str, str, str], Record] = {}
    for file in files:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if record["passed"] and record.get("wall_s") is not None and (quick or not record["quick"]):
                found[record.get("gpu", ""), record["case"], record["implementation"]] = record
    return list(found.values())


def pictures(records: list[Record], clock: str = "wall") -> dict[str, Figure]:
    """By file name."""
    figures = {}
    for gpu in dict.fromkeys(r.get("gpu", "") for r in records):
        own, prefix = [r for r in records if r.get("gpu", "") == gpu], f"{slug(gpu)}-" if gpu else ""
        for axis in AXES:
            points = [r for r in own if r["sweep"] == axis]
            if points:
                figures[f"{prefix}against_{axis}.png"] = against(axis, points)
        whole = [r for r in own if not r["sweep"]]
        if any(not r["implementation"].startswith("ours") for r in whole):
            figures[f"{prefix}ratios.png"] = ratios(whole, "wall" if gpu else clock)
    return figures


def saved(figures: dict[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_png(folder / name)
    return [folder / name for name in figures]


def against(axis: str, records: list[Record]) -> Figure:
    """Time and excess memory along one axis, both logarithmic."""
    figure = _figure(8.6, 3.7)
    panels = figure.subplots(1, 2)
    first = records[0]
    fixed = "vocabulary" if axis == "tokens" else "tokens"
    title = f"Head, {first['dtype']}, forward + backward, H = {first['hidden']:,}, {AXES[fixed][0]} = {first[fixed]:,}"
    where = first.get("gpu") or f"{first['threads']} threads"
    figure.suptitle(f"{title}, {where}", fontsize=10, x=0.01, ha="left")
    _curves(panels[0], axis, records, lambda r: r["wall_s"] * 1e3, "wall time (ms)")
    _curves(panels[1], axis, records, _excess_mib, "excess memory (MiB)")
    return figure


def _curves(panel: Axes, axis: str, records: list[Record], value: Callable[[Record], float | None], label: str) -> None:
    ends = {}
    for name in dict.fromkeys(r["implementation"] for r in records):
        points = sorted((r[axis], y) for r in records if r["implementation"] == name and (y := value(r)) is not None)
        if points:
            panel.plot(*zip(*points, strict=True), color=_color(name), marker="o", markersize=3.5, linewidth=1.6)
            ends[name] = points[-1]
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = sorted({r[axis] for r in records})
    panel.set_xticks(ticks, [str(t) if t % 1024 else f"{t // 1024}k" for t in ticks])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    for direction in (panel.xaxis, panel.yaxis):
        direction.set_minor_locator(NullLocator())
    panel.set_xlabel(AXES[axis][1])
    panel.set_ylabel(label)
    panel.grid(color=GRID, linewidth=0.8)
    _label_ends(panel, ends)


def _label_ends(panel: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the last points, moved apart where they would overlap."""
    to_height = panel.transData + panel.transAxes.inverted()
    height = -math.inf
    for name, point in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(float(to_height.transform(point)[1]), height + APART)
        panel.text(
            1.02, height, _title(name), transform=panel.transAxes, color=_color(name), va="center", clip_on=False
        )


def ratios(records: list[Record], clock: str) -> Figure:
    """One panel per implementation that is not ours, one bar per case: its time over ours."""
    key = f"{clock}_over_ours"
    cases = list(dict.fromkeys(r["case"] for r in records))[::-1]
    names = [n for n in dict.fromkeys(r["implementation"] for r in records) if not n.startswith("ours")]
    shown = [min(r[key], LONGEST_BAR) for r in records if r["implementation"] in names]
    figure = _figure(2.3 + 1.6 * len(names), 1.2 + 0.24 * len(cases))
    figure.suptitle("Time over ours; pale where it is less", fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        of_case = {r["case"]: r[key] for r in records if r["implementation"] == name}
        _bars(panel, [(i, of_case[case]) for i, case in enumerate(cases) if case in of_case], name)
        panel.set_xlabel(f"{clock} time / ours")
    panels[0].set_xlim(min(0.8, *shown) / 1.25, max(2.0, *shown) * 4)  # room for the numbers
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(-0.6, len(cases) - 0.4)
    return figure


def _bars(panel: Axes, bars: list[tuple[int, float]], name: str) -> None:
    panel.set_xscale("log")
    for place, ratio in bars:
        left, right = sorted((1.0, min(ratio, LONGEST_BAR)))
        panel.barh(place, right - left, left=left, height=0.66, color=_color(name), alpha=1 if ratio >= 1 else 0.4)
        panel.text(right * 1.1, place, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", fontsize=7.5)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_title(_title(name), fontsize=9, color=_color(name))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="y", length=0)


def _figure(width: float, height: float) -> Figure:
    with style.context("default"):  # the user's style may be white on black
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=160)
    return figure


def _excess_mib(record: Record) -> float | None:
    excess = record["excess_bytes"]
    return None if excess is None or excess <= 0 else excess / 2**20


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _color(name: str) -> str:
    return COLORS.get(name, OTHER)


if __name__ == "__main__":
    main()
