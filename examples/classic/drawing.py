"""One plot for all of these examples."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")


def smooth(values: list[float], window: int) -> list[float]:
    """Means over the last `window` values, or as many as there are."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def draw(path: Path, title: str, panels: dict[str, dict[str, list[float]]], xlabel: str) -> None:
    """A panel for every quantity, in it a line for every algorithm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for ax, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for label, values in lines.items():
            ax.plot(values, label=label, linewidth=1.5)
        ax.set(xlabel=xlabel, ylabel=name)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)
