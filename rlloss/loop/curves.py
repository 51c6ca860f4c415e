"""The curves of a run as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlloss.loop.report import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curves"]

_ONLINE_KEYS = ("reward", "accuracy", "ref_kl", "entropy", "clip_frac")
_OFFLINE_KEYS = ("loss", "nll", "accuracy", "margin")
_TITLES = {
    "reward": "Reward",
    "accuracy": "Accuracy",
    "explained_variance_before": "Explained variance",
    "kl_coef": "KL coefficient",
    "sequence_kl": "KL to the reference (nats per answer)",
    "ref_kl": "KL to the reference (nats per token)",
    "approx_kl": "KL to the old policy (nats per token)",
    "entropy": "Entropy (nats per token)",
    "clip_frac": "Clip fraction (of tokens)",
    "loss": "Loss",
    "nll": "Negative log-likelihood (nats per token)",
    "margin": "Margin",
}
_SMOOTHED_FROM = 50  # points: below, a line shows itself


def plot_curves(folder: str | Path, keys: Sequence[str] | None = None) -> Path:
    """Draws `folder`/curves.png from metrics.jsonl, one small panel per key over shared steps; returns its path.

    A key that is logged every step is a line (a long one is drawn pale, with its running mean on top); one that is
    logged now and then has a marker at each of its steps. Without `keys` the panels are reward, accuracy, KL, entropy
    and clip fraction, or loss, likelihood, accuracy and margin of a run without rewards: those that the run logged.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_curves: needs matplotlib: pip install "rlloss[examples]"') from error

    records = read_metrics(folder)
    keys = _panel_keys(records, keys)
    n_columns = 2 if len(keys) == 4 else min(len(keys), 3)
    n_rows = math.ceil(len(keys) / n_columns)
    path = Path(folder) / "curves.png"
    with style.context("default"):  # the user's style may be white on black
        figure = Figure(figsize=(0.4 + 3.6 * n_columns, 0.4 + 2.2 * n_rows), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)  # pyplot, and with it the user's backend, stays out of it
        panels = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False).flatten()
        for panel, key in zip(panels, keys, strict=False):
            _draw_panel(panel, key, records)
        for panel in panels[len(keys) :]:
            panel.set_visible(False)
        for panel in panels[: len(keys)][-n_columns:]:
            panel.tick_params(labelbottom=True)
        is_long = len(records) >= _SMOOTHED_FROM
        figure.supxlabel("step (pale: as logged, bold: running mean)" if is_long else "step", fontsize=10)
        figure.savefig(path, dpi=150)
    return path


def _panel_keys(records: list[dict[str, Any]], keys: Sequence[str] | None) -> list[str]:
    numeric = {k for r in records for k, v in r.items() if isinstance(v, int | float) and k != "step"}
    defaults = _ONLINE_KEYS if "reward" in numeric else _OFFLINE_KEYS
    chosen = [k for k in defaults if k in numeric] if keys is None else list(keys)
    missing = [k for k in chosen if k not in numeric]
    if missing or not chosen:
        wanted = missing or list(defaults)
        raise ValueError(f"plot_curves: no numbers were logged under {wanted}; keys= may name any of {sorted(numeric)}")
    return chosen


def _draw_panel(panel: "Axes", key: str, records: list[dict[str, Any]]) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    points = [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]
    steps, values = np.array(points, dtype=float).T
    blue = "#1a66b3"
    if len(points) < len({r["step"] for r in records}):
        panel.plot(steps, values, color=blue, linewidth=1.5, marker="o", markersize=4.5)
    elif len(points) < _SMOOTHED_FROM:
        panel.plot(steps, values, color=blue, linewidth=1.5, marker=".", markersize=4)
    else:
        panel.plot(steps, values, color=blue, linewidth=0.8, alpha=0.35)
        panel.plot(steps, _running_mean(values, len(values) // 10), color=blue, linewidth=1.8)
    panel.set_title(_TITLES.get(key, key), loc="left", fontsize=10)
    panel.tick_params(labelsize=8.5, color="0.6")
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("0.6")
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _running_mean(values: Any, window: int) -> Any:
    """The mean of the window around every point; at the ends, of the part that exists. NaN counts for nothing."""
    import numpy as np

    box = np.ones(2 * (window // 2) + 1)
    known = ~np.isnan(values)
    counts = np.convolve(known, box, mode="same")
    return np.where(
        counts > 0, np.convolve(np.where(known, values, 0.0), box, mode="same") / np.maximum(counts, 1), np.nan
    )
