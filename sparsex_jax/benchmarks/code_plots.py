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
    """Nats per token by the end of the bucket, a line a model and context.

    Below, how many more than those of the first line, sequence by sequence, with intervals: those
    of the losses themselves are wide, for they are of different text.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    names = list(dict.fromkeys((row["checkpoint"], row["context"]) for row in rows))
    for number, (checkpoint, context) in enumerate(names):
        chosen = [row for row in rows if (row["checkpoint"], row["context"]) == names[number]]
        style = {"marker": "o", "ms": 4, "color": f"C{number}"}
        ends = [row["end"] for row in chosen]
        line = f"{checkpoint}, context {label(context)}"
        above.plot(ends, [row["loss"] for row in chosen], label=line, **style)
        if chosen[0]["more"] is None:  # what the others are compared with
            continue
        more, low, high = (
            [row[name] for row in chosen] for name in ("more", "more_low", "more_high")
        )
        below.plot(ends, more, **style)
        below.fill_between(ends, low, high, color=f"C{number}", alpha=0.2, lw=0)
    below.axhline(0, color="C0")
    ticks = sorted({row["end"] for row in rows})
    below.set_xscale("log", base=2)
    below.set_xticks(ticks, [label(end) for end in ticks])
    below.minorticks_off()
    below.set_xlabel("position, to")
    above.set_ylabel("nats per token")
    below.set_ylabel("nats more than the first")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
