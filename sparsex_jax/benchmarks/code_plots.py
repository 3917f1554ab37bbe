"""Pictures of what is measured in source trees: functions found, and loss by position."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from sparsex_jax.benchmarks.needle_plots import curves
from sparsex_jax.benchmarks.plots import save
from sparsex_jax.benchmarks.tables.cells import Label, Row
from sparsex_jax.benchmarks.tables.quality import who_answered


def draw_code(
    found: Sequence[Row], losses: Sequence[Row], folder: Path, label: Label
) -> list[Path]:
    """Writes the pictures as PNG.

    Args:
      found: rows of `sparsex eval code`.
      losses: rows of `sparsex eval lm`.
      folder: for the pictures; it is made.
      label: text for a length.

    Returns:
      The files; a picture without anything to show is left out.

    Raises:
      OSError: they cannot be written.
    """
    figures = {}
    if len({row["tokens"] for row in found if row["status"] == "measured"}) > 1:
        named = [row | {"system": who_answered(row)} for row in found]
        figures["code-accuracy"] = curves(named, label)
    measured = [row for row in losses if row["status"] == "measured"]
    for tokens in sorted({row["tokens"] for row in measured}):
        chosen = [row for row in measured if row["tokens"] == tokens]
        figures[f"lm-loss-{label(tokens)}"] = loss_curves(chosen, label)
    return save(figures, folder)


def loss_curves(rows: Sequence[Row], label: Label) -> matplotlib.figure.Figure:
    """Nats per token by the end of the bucket, a line a model and context, with their intervals."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys((row["checkpoint"], row["context"]) for row in rows))
    for number, (checkpoint, context) in enumerate(names):
        chosen = [row for row in rows if (row["checkpoint"], row["context"]) == names[number]]
        ends = [row["end"] for row in chosen]
        loss, low, high = ([row[name] for row in chosen] for name in ("loss", "low", "high"))
        line = f"{checkpoint}, context {label(context)}"
        axes.plot(ends, loss, marker="o", ms=4, color=f"C{number}", label=line)
        axes.fill_between(ends, low, high, color=f"C{number}", alpha=0.15, lw=0)
    ticks = sorted({row["end"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [label(end) for end in ticks])
    axes.minorticks_off()
    axes.set_xlabel("position, to")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
