"""Pictures of needle rows: accuracy by length, a line a system, and by depth and length."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from sparsex_jax.benchmarks.plots import save
from sparsex_jax.benchmarks.tables.cells import Label, Row

_COLUMNS = 3


def draw_needles(rows: Sequence[Row], folder: Path, label: Label) -> list[Path]:
    """Writes the pictures as PNG.

    Args:
      rows: of accuracy, those of depths among them, each system under a name of its own.
      folder: for the pictures; it is made.
      label: text for a length.

    Returns:
      The files; a picture without anything to show is left out.

    Raises:
      OSError: they cannot be written.
    """
    figures = {}
    totals = [row for row in rows if row.get("depth") is None]
    if len({row["tokens"] for row in totals if row["status"] == "measured"}) > 1:
        figures["needle-accuracy"] = curves(totals, label)
    deep = [row for row in rows if row.get("depth") is not None and row["status"] == "measured"]
    for system in dict.fromkeys(row["system"] for row in deep):
        name = "".join(c if c.isalnum() else "-" for c in system).strip("-")
        chosen = [row for row in deep if row["system"] == system]
        figures[f"needle-depth-{name}"] = heat_maps(chosen, label)
    return save(figures, folder)


def _grid(names: Sequence[str], width: float, height: float):
    """A figure with axes for each name."""
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = matplotlib.figure.Figure(
        figsize=(width * columns, height * lines), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, grid, strict=False):
        axes.set_title(name)
    return figure, dict(zip(names, grid, strict=False))


def curves(rows: Sequence[Row], label: Label) -> matplotlib.figure.Figure:
    """Accuracy by length for each task, a line a system with a band of its Wilson intervals.

    A cross at the bottom marks a length that a system could not be measured at.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    figure, grid = _grid(tasks, 4.5, 3.2)
    for task, axes in grid.items():
        for number, system in enumerate(systems):
            found = sorted(
                (row for row in rows if (row["task"], row["system"]) == (task, system)),
                key=lambda row: row["tokens"],
            )
            good = [row for row in found if row["status"] == "measured"]
            tokens = [row["tokens"] for row in good]
            accuracy, low, high = (
                [100 * row[name] for row in good] for name in ("accuracy", "low", "high")
            )
            axes.plot(tokens, accuracy, marker="o", ms=4, color=f"C{number}", label=system)
            axes.fill_between(tokens, low, high, color=f"C{number}", alpha=0.15, lw=0)
            bad = [row["tokens"] for row in found if row["status"] != "measured"]
            axes.plot(bad, [0] * len(bad), "x", color=f"C{number}", ms=9, mew=2, zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [label(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(-4, 104)
        axes.set_ylabel("% right")
        axes.grid(alpha=0.3)
    handles = next(iter(grid.values())).get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def heat_maps(rows: Sequence[Row], label: Label) -> matplotlib.figure.Figure:
    """Accuracy of one system by depth and length, for each task."""
    figure, grid = _grid(list(dict.fromkeys(row["task"] for row in rows)), 4.5, 3.8)
    for task, axes in grid.items():
        found = {(row["depth"], row["tokens"]): row for row in rows if row["task"] == task}
        depths, lengths = (sorted({key[i] for key in found}) for i in (0, 1))
        share = np.full((len(depths), len(lengths)), np.nan)
        for (depth, length), row in found.items():
            share[depths.index(depth), lengths.index(length)] = 100 * row["accuracy"]
        axes.imshow(share, cmap="RdYlGn", vmin=-40, vmax=140, aspect="auto")  # pale, for the text
        for (line, column), value in np.ndenumerate(share):
            if not np.isnan(value):
                axes.text(column, line, f"{value:.0f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [label(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0f} %" for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth of the needle")
    figure.suptitle(f"{rows[0]['system']}: % right")
    return figure
