"""Pictures of rows of attention and decoding: time and speed-up by length, and the parts of it."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from sparsex_jax.benchmarks.names import DIRECTIONS
from sparsex_jax.benchmarks.tables.cells import Label, Row, format_number
from sparsex_jax.benchmarks.tables.speed import ADDED_PARTS, describe_system

FITTED = 3  # lengths: short ones show what does not grow with the length
Series = dict[str, list[tuple[int, float]]]


def fit_exponent(points: Sequence[tuple[int, float]]) -> float:
    """x of the best time ~ length^x, by least squares in logarithms.

    Args:
      points: (length, time), at least two.
    """
    lengths, times = np.log(np.array(points, float)).T
    return float(np.polyfit(lengths, times, 1)[0])


def _series(rows: Sequence[Row], direction: str, field: str) -> Series:
    """(length, value) of ops by system, where measured, in the order of lengths."""
    found: Series = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        wanted = row["part"] == "op" and row["direction"] == direction
        if wanted and row["status"] == "measured" and row.get(field):
            found.setdefault(describe_system(row), []).append((row["tokens"], row[field]))
    return found


def _axes(rows: Sequence[Row], label: Label):
    """A figure with axes for each direction that was measured, a length a tick."""
    directions = [x for x in DIRECTIONS if any(row["direction"] == x for row in rows)]
    figure = matplotlib.figure.Figure(figsize=(6 * len(directions), 4.5), layout="constrained")
    pairs = list(
        zip(directions, figure.subplots(1, len(directions), squeeze=False)[0], strict=True)
    )
    lengths = sorted({row["tokens"] for row in rows})
    for direction, axes in pairs:
        axes.set_title(direction.replace("_", " and "))
        axes.set_xlabel("tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [label(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return figure, pairs


def _lines(rows: Sequence[Row], field: str, label: Label, unit: str, *, fitted: bool):
    figure, pairs = _axes(rows, label)
    for direction, axes in pairs:
        for name, points in _series(rows, direction, field).items():
            if fitted and len(points) > 1:
                last = points[-FITTED:]
                span = f"{label(last[0][0])} to {label(last[-1][0])}"
                name += f": N^{fit_exponent(last):.2f} ({span})"
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_yscale("log")
        axes.set_ylabel(unit)
        if axes.lines:
            axes.legend(fontsize=8)
    return figure


def _stacks(rows: Sequence[Row], selection: str | None, label: Label):
    """Bars of the parts that make up an op, one on the other.

    Lengths without one of the parts are left out; of equal rows, the last counts.
    """
    chosen = [row for row in rows if row.get("selection") in (selection, None)]
    figure, pairs = _axes(chosen, label)
    for direction, axes in pairs:
        here = [row for row in chosen if row["direction"] == direction]
        found = {(row["part"], row["tokens"]): row["milliseconds"] for row in here}
        parts = [part for part in ADDED_PARTS if any(part == x for x, _ in found)]
        lengths = sorted({n for _, n in found if all((part, n) in found for part in parts)})
        times = np.array([[found[part, n] for n in lengths] for part in parts])
        # Shares of the sum, since times span orders of magnitude; the sums stand above.
        shares = 100 * times / times.sum(axis=0)
        bottoms = np.cumsum(shares, axis=0) - shares
        axes.set_xscale("linear")
        axes.set_xticks(range(len(lengths)), [label(length) for length in lengths])
        for part, share, bottom in zip(parts, shares, bottoms, strict=True):
            axes.bar(range(len(lengths)), share, 0.6, bottom=bottom, label=part)
        for place, length in enumerate(lengths):
            text = f"sum {format_number(times[:, place].sum())} ms"
            if ("op", length) in found:
                text += f"\nop {format_number(found['op', length])} ms"
            axes.text(place, 101, text, ha="center", va="bottom", fontsize=8)
        axes.set_ylim(0, 118)
        axes.set_ylabel("% of the sum of the parts")
    figure.legend(*pairs[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"{selection} selection" if selection else "")
    return figure


def draw_attention(
    rows: Sequence[Row], folder: Path, label: Label, name: str = "attention", suffix: str = ""
) -> list[Path]:
    """Writes time, speed-up and parts as PNG.

    Args:
      rows: of one shape.
      folder: for the pictures; it is made.
      label: text for a length.
      name: that the names of the files begin with.
      suffix: that they end with.

    Returns:
      The files; a picture without anything to show is left out.

    Raises:
      OSError: they cannot be written.
    """
    measured = [row for row in rows if row["status"] == "measured"]
    ops = [row for row in measured if row["part"] == "op"]
    faster = [row for row in ops if row.get("speedup_over_dense") and row["system"] == "sparsex"]
    ours = [row for row in measured if row["system"] == "sparsex"]
    selections = dict.fromkeys(row.get("selection") for row in ours if row["part"] in ADDED_PARTS)
    figures = {}
    if ops:
        figures["time"] = _lines(ops, "milliseconds", label, "milliseconds", fitted=True)
    if faster:
        unit = "times as fast as dense"
        figures["speedup"] = _lines(faster, "speedup_over_dense", label, unit, fitted=False)
    for selection in [x for x in selections if x] or selections:
        title = f"parts-{selection}" if selection else "parts"
        figures[title] = _stacks(ours, selection, label)
    return save({f"{name}-{title}{suffix}": x for title, x in figures.items()}, folder)


def save(figures: dict[str, matplotlib.figure.Figure], folder: Path) -> list[Path]:
    """Writes figures, by name, to a folder that is made; returns the files."""
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=150)
    return paths
