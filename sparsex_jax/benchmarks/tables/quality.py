"""Tables of what models know and how exact arithmetic is: accuracy, perplexity, errors, losses."""

from collections.abc import Sequence

from sparsex_jax.benchmarks.names import LOGITS
from sparsex_jax.benchmarks.tables.cells import (
    Label,
    Row,
    if_measured,
    markdown,
    note_mark,
    place,
)

ACCURACY_FIELDS = ("system", "task", "tokens", "samples", "accuracy", "low", "high", "status")
ABLATION_FIELDS = ("ablation", "seed", *ACCURACY_FIELDS)
PERPLEXITY_FIELDS = (
    "system", "checkpoint", "tokens", "sequences", "perplexity", "low", "high", "ratio",
    "ratio_low", "ratio_high", "status",
)  # fmt: skip
LM_FIELDS = (
    "system", "checkpoint", "tokens", "context", "begin", "end", "sequences", "loss", "low", "high",
    "more", "more_low", "more_high", "status",
)  # fmt: skip
NUMERICS_FIELDS = (
    "system", "logits", "tokens", "queries", "head_dim", "output_error", "output_error_max",
    "lse_error", "lse_relative_error", "status",
)  # fmt: skip
LOSSES_FIELDS = ("implementation", "step", "loss")


def accuracy_table(rows: Sequence[Row], label: Label) -> str:
    """Accuracy in per cent by task, tier and length; in brackets 95 % intervals, and provenance."""
    rows = [row for row in rows if row.get("depth") is None]

    def name(row: Row) -> tuple[str, str]:
        tier = row.get("tier")
        tiered = tier is not None and len({other.get("tier") for other in rows} - {None}) > 1
        return who_answered(row) + (f", tier {tier}" if tiered else ""), row["task"]

    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(map(name, rows)))
    several = len({system for system, _ in names}) > 1
    found = {(*name(row), row["tokens"]): row for row in rows}
    lines = [
        [f"{system}: {task}" if several else task]
        + [if_measured(found.get((system, task, length)), _accuracy) for length in lengths]
        for system, task in names
    ]
    return markdown(["task", *(f"{label(length)} tokens" for length in lengths)], lines)


def who_answered(row: Row) -> str:
    """Who answered, and from how many chunks, where these were retrieved."""
    return row["system"] + (f", top {row['chunks']}" if row.get("chunks") else "")


def _accuracy(row: Row) -> str:
    share, low, high = (f"{100 * row[name]:.1f}" for name in ("accuracy", "low", "high"))
    known = row.get("provenance")
    more = "" if known is None else f"; provenance {100 * known:.1f} %"
    return f"{share.removesuffix('.0')} % ({low} to {high}; {row['samples']} samples{more})"


def headline_table(rows: Sequence[Row], label: Label) -> str:
    """Accuracy of all systems by task and length; why there is none is told below the table."""
    rows = [row for row in rows if row.get("depth") is None]
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys((row["task"], row["system"]) for row in rows))
    tasks = [task for task, _ in names]
    names.sort(key=lambda name: tasks.index(name[0]))
    found = {(row["task"], row["system"], row["tokens"]): row for row in rows}
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        if row["status"] == "measured":
            low, high = (f"{100 * row[name]:.1f}" for name in ("low", "high"))
            return f"{100 * row['accuracy']:.1f} % ({low} to {high})"
        mark = f" {note_mark(notes.index(row['note']))}" if row.get("note") else ""
        return row["status"].replace("_", " ") + mark

    lines = [[*name, *(cell(found.get((*name, length))) for length in lengths)] for name in names]
    head = ["task", "system", *(label(length) for length in lengths)]
    remarks = [f"{note_mark(i)} {note}" for i, note in enumerate(notes)]
    samples = sorted({row["samples"] for row in rows if row["status"] == "measured"})
    if samples:
        spread = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        remarks.append(f"{spread} samples a cell; in brackets 95 % intervals of Wilson.")
    return "\n\n".join((markdown(head, lines), *remarks))


def ablations_table(rows: Sequence[Row], label: Label) -> str:
    """Accuracy in per cent by ablation, task and length: means over seeds, and their range."""
    columns = list(dict.fromkeys((row["task"], row["tokens"]) for row in rows))
    names = list(dict.fromkeys(row["ablation"] for row in rows))
    lengths = {tokens for _, tokens in columns}

    def cell(name: str, task: str, tokens: int) -> str:
        wanted = name, task, tokens
        found = [
            100 * row["accuracy"] for row in rows
            if (row["ablation"], row["task"], row["tokens"]) == wanted
            and row["accuracy"] is not None
        ]  # fmt: skip
        if not found:
            return ""
        spread = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
        return f"{sum(found) / len(found):.1f}{spread}"

    head = [task + (f", {label(tokens)}" if len(lengths) > 1 else "") for task, tokens in columns]
    lines = [[name, *(cell(name, *column) for column in columns)] for name in names]
    return markdown(["ablation", *head], lines)


def perplexity_table(rows: Sequence[Row], label: Label) -> str:
    """Perplexity by system and length with 95 % intervals, and that of the first in per cent."""
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys((row["system"], row["checkpoint"]) for row in rows))
    found = {(row["system"], row["checkpoint"], row["tokens"]): row for row in rows}

    def cell(row: Row) -> str:
        text = f"{row['perplexity']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if row["ratio"] is None:
            return text
        more, low, high = (
            f"{100 * (row[name] - 1):+.2f}" for name in ("ratio", "ratio_low", "ratio_high")
        )
        return f"{text}; {more} % ({low} to {high})"

    lines = [
        [*name, *(if_measured(found.get((*name, length)), cell) for length in lengths)]
        for name in names
    ]
    head = ["system", "checkpoint", *(f"{label(length)} tokens" for length in lengths)]
    return markdown(head, lines)


def position_table(rows: Sequence[Row], label: Label) -> str:
    """Nats per token by bucket of positions, and how many more than the first has."""
    ends = sorted({row["end"] for row in rows})
    names = list(dict.fromkeys((row["checkpoint"], row["context"]) for row in rows))
    found = {(row["checkpoint"], row["context"], row["end"]): row for row in rows}

    def cell(row: Row) -> str:
        if row["more"] is None:
            return f"{row['loss']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
        more, low, high = (f"{row[name]:+.4f}" for name in ("more", "more_low", "more_high"))
        return f"{row['loss']:.4f}; {more} ({low} to {high})"

    lines = [
        [
            name,
            label(context),
            *(if_measured(found.get((name, context, end)), cell) for end in ends),
        ]
        for name, context in names
    ]
    return markdown(["checkpoint", "context", *(f"to {label(end)}" for end in ends)], lines)


def numerics_table(rows: Sequence[Row], label: Label) -> str:
    """Relative errors by logits, system and length: of the worst query's output, and of lse."""
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys((row["logits"], describe_numerics(row)) for row in rows))
    names.sort(key=lambda name: place(LOGITS, name[0]))
    found = {(row["logits"], describe_numerics(row), row["tokens"]): row for row in rows}
    lines = [
        [logits, system] + [_errors(found.get((logits, system, length))) for length in lengths]
        for logits, system in names
    ]
    return markdown(["logits", "system", *(f"{label(length)} keys" for length in lengths)], lines)


def describe_numerics(row: Row) -> str:
    """Who computed a row of errors, and from how many numbers."""
    details = [row.get("implementation"), f"{row['queries']} queries", f"D = {row['head_dim']}"]
    return f"{row['system']} ({', '.join(x for x in details if x)})"


def _errors(row: Row | None) -> str:
    if row is None:
        return ""
    if row["output_error_max"] is None:
        return row["status"].replace("_", " ")
    over = "" if row["status"] == "measured" else f" {row['status']}"
    return f"{row['output_error_max']:.1e}, {row['lse_relative_error']:.1e}{over}"


def losses_table(rows: Sequence[Row], label: Label) -> str:
    """Losses of the same run by different implementations, ten steps of it."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    shown = steps[:: -(-len(steps) // 10)] if len(steps) > 10 else steps
    shown = sorted({*shown, *steps[-1:]})
    losses = {(row["implementation"], row["step"]): f"{row['loss']:.4f}" for row in rows}
    lines = [(label(step), *(losses.get((name, step), "") for name in names)) for step in shown]
    return markdown(("step", *names), lines)
