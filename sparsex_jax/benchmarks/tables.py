"""Markdown tables of the rows of results files; those of the README are made here."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparsex_jax.benchmarks.names import DIRECTIONS, LOGITS, PARTS

Row = dict[str, Any]
Label = Callable[[int], str]
# What tells attention rows of one length, direction and part apart, and must be there.
SHAPE = ("query_heads", "kv_heads", "head_dim")
ATTENTION_FIELDS = ("system", "part", "direction", "tokens", *SHAPE, "milliseconds", "status")
MEMORY = ("argument_bytes", "output_bytes", "temporary_bytes", "peak_bytes")
COMPILED_FIELDS = ("chips", *MEMORY)  # of rows that name a target, too
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
PLAN_FIELDS = (
    "preset", "target", "devices", "tokens", "sequences", "parameters", "parameter_bytes",
    "optimizer_bytes", "temporary_bytes", "program_bytes", "total_bytes", "status",
)  # fmt: skip
SCALING_FIELDS = (
    "work", "chips", "tokens", "length", "arithmetic_seconds", "links_seconds",
    "all_gather_seconds", "all_reduce_seconds", "reduce_scatter_seconds", "all_to_all_seconds",
    "collective_permute_seconds", "status",
)  # fmt: skip
LOSSES_FIELDS = ("implementation", "step", "loss")
PREFILL_FIELDS = (
    "tokens", "layers", "chunk", "milliseconds", "tokens_per_second", "cache_bytes", "peak_bytes",
    "status",
)  # fmt: skip
TRAFFIC_FIELDS = (
    "strategy", "target", "chips", "tokens", *SHAPE, "all_gather_bytes", "all_reduce_bytes",
    "reduce_scatter_bytes", "all_to_all_bytes", "collective_permute_bytes", "total_bytes",
    "rule_bytes", "status",
)  # fmt: skip
ADDED_PARTS = ("selection", "rotary", "local", "landmarks", "dynamic", "fusion")  # make up an op


def format_number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)
    )  # fmt: skip


def shapes(rows: Iterable[Row]) -> list[tuple[int, int, int]]:
    """The distinct (query heads, KV heads, head dim), in the order of appearance."""
    return list(dict.fromkeys(tuple(row[name] for name in SHAPE) for row in rows))  # type: ignore[misc]


def of_shape(rows: Iterable[Row], shape: tuple[int, int, int]) -> list[Row]:
    """The rows of a shape."""
    return [row for row in rows if tuple(row[name] for name in SHAPE) == shape]


def describe_system(row: Row) -> str:
    """Who computed a row: its system, the implementation and how blocks were selected."""
    if row["system"] != "sparsex":
        return row["system"]
    details = [row.get("implementation"), row.get("selection")]
    return f"sparsex ({', '.join(x for x in details if x)})" if any(details) else "sparsex"


def op_table(rows: Sequence[Row], label: Label) -> str:
    """The op beside dense attention and other whole attentions, a line each, with notes below."""
    chosen = [row for row in rows if row["part"] == "op"]
    chosen.sort(key=lambda row: (_place(DIRECTIONS, row["direction"]), row["tokens"]))
    notes = list(dict.fromkeys(row["note"] for row in chosen if row.get("note")))
    head = ["direction", "length", "system", "ms (quartiles)", "times as fast as dense",
            "TFLOP/s", "of the roofline", "temporaries", "largest error"]  # fmt: skip
    lines = [_op_line(row, label, notes) for row in chosen]
    remarks = [f"{_mark(i)} {note}" for i, note in enumerate(notes)]
    return "\n\n".join((markdown(head, lines), *remarks))


def _op_line(row: Row, label: Label, notes: list[str]) -> list[str]:
    share, memory = row.get("roofline_share"), row.get("peak_bytes")
    note = f" {_mark(notes.index(row['note']))}" if row.get("note") else ""
    return [
        row["direction"].replace("_", " and "),
        label(row["tokens"]),
        describe_system(row),
        _milliseconds(row, spread=True) + note,
        _cell(row.get("speedup_over_dense")),
        _cell(row.get("teraflops_per_second")),
        "" if share is None else f"{share:.0%}",
        "" if memory is None else f"{format_number(memory / 2**30)} GiB",
        "" if row.get("max_error") is None else f"{row['max_error']:.1g}",
    ]


def parts_table(rows: Sequence[Row], direction: str, label: Label) -> str:
    """Milliseconds of the parts by length; scoring is within selection. "" without any.

    Systems that compute one part only, as other libraries' windows do, have a column each.
    """
    chosen = [row for row in rows if row["part"] != "op" and row["direction"] == direction]
    columns = sorted(
        dict.fromkeys((row["part"], describe_system(row)) for row in chosen),
        key=lambda column: _place(PARTS, column[0]),
    )
    if not columns:
        return ""
    found = {(row["tokens"], row["part"], describe_system(row)): row for row in chosen}
    lines = [
        [label(length)] + [_milliseconds(found.get((length, *column))) for column in columns]
        for length in sorted({row["tokens"] for row in chosen})
    ]
    return markdown(["length", *(f"{part}: {system}" for part, system in columns)], lines)


def compiled_table(rows: Sequence[Row], label: Label) -> str:
    """What was compiled for a target and not run, a line each: memory, and times not measured."""
    head = ["direction", "tokens a chip", "part", "chips", "arguments", "results", "temporaries",
            "peak", "roofline, ms", "modelled, ms", "of this kernels"]  # fmt: skip
    times = ("roofline_milliseconds", "modelled_milliseconds", "kernel_milliseconds")

    def order(row: Row) -> tuple[int, ...]:
        part, direction = _place(PARTS, row["part"]), _place(DIRECTIONS, row["direction"])
        return direction, row["tokens"], part, row["chips"]

    def line(row: Row) -> list[str]:
        what = [row["direction"].replace("_", " and "), label(row["tokens"]), row["part"]]
        if row["status"] == "compiled":
            found = [f"{row[name] / 2**30:.2f} GiB" for name in MEMORY]
        else:
            found = [row["status"].replace("_", " "), "", "", ""]
        return [*what, str(row["chips"]), *found, *(_cell(row.get(name)) for name in times)]

    return markdown(head, map(line, sorted(rows, key=order)))


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
        + [_accuracy(found.get((system, task, length))) for length in lengths]
        for system, task in names
    ]
    return markdown(["task", *(f"{label(length)} tokens" for length in lengths)], lines)


def who_answered(row: Row) -> str:
    """Who answered, and from how many chunks, where these were retrieved."""
    return row["system"] + (f", top {row['chunks']}" if row.get("chunks") else "")


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
        mark = f" {_mark(notes.index(row['note']))}" if row.get("note") else ""
        return row["status"].replace("_", " ") + mark

    lines = [[*name, *(cell(found.get((*name, length))) for length in lengths)] for name in names]
    head = ["task", "system", *(label(length) for length in lengths)]
    remarks = [f"{_mark(i)} {note}" for i, note in enumerate(notes)]
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

    def cell(row: Row | None) -> str:
        if row is None or row["status"] != "measured":
            return "" if row is None else row["status"].replace("_", " ")
        text = f"{row['perplexity']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if row["ratio"] is None:
            return text
        more, low, high = (
            f"{100 * (row[name] - 1):+.2f}" for name in ("ratio", "ratio_low", "ratio_high")
        )
        return f"{text}; {more} % ({low} to {high})"

    lines = [[*name, *(cell(found.get((*name, length))) for length in lengths)] for name in names]
    head = ["system", "checkpoint", *(f"{label(length)} tokens" for length in lengths)]
    return markdown(head, lines)


def position_table(rows: Sequence[Row], label: Label) -> str:
    """Nats per token by bucket of positions, and how many more than the first has."""
    ends = sorted({row["end"] for row in rows})
    names = list(dict.fromkeys((row["checkpoint"], row["context"]) for row in rows))
    found = {(row["checkpoint"], row["context"], row["end"]): row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None or row["status"] != "measured":
            return "" if row is None else row["status"].replace("_", " ")
        if row["more"] is None:
            return f"{row['loss']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
        more, low, high = (f"{row[name]:+.4f}" for name in ("more", "more_low", "more_high"))
        return f"{row['loss']:.4f}; {more} ({low} to {high})"

    lines = [
        [name, label(context), *(cell(found.get((name, context, end))) for end in ends)]
        for name, context in names
    ]
    return markdown(["checkpoint", "context", *(f"to {label(end)}" for end in ends)], lines)


def numerics_table(rows: Sequence[Row], label: Label) -> str:
    """Relative errors by logits, system and length: of the worst query's output, and of lse."""
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys((row["logits"], describe_numerics(row)) for row in rows))
    names.sort(key=lambda name: _place(LOGITS, name[0]))
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


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _mark(number: int) -> str:
    return f"[{number + 1}]"


def _cell(value: float | None) -> str:
    return "" if value is None else format_number(value)


def _milliseconds(row: Row | None, spread: bool = False) -> str:
    if row is None:
        return ""
    if row["status"] != "measured":
        return row["status"].replace("_", " ")
    text = format_number(row["milliseconds"])
    quartiles = [row.get(f"milliseconds_q{i}") for i in (1, 3)]
    if spread and None not in quartiles:
        text += f" ({' to '.join(format_number(x) for x in quartiles if x is not None)})"
    return text


def _accuracy(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "measured":
        return row["status"].replace("_", " ")
    share, low, high = (f"{100 * row[name]:.1f}" for name in ("accuracy", "low", "high"))
    known = row.get("provenance")
    more = "" if known is None else f"; provenance {100 * known:.1f} %"
    return f"{share.removesuffix('.0')} % ({low} to {high}; {row['samples']} samples{more})"


def _errors(row: Row | None) -> str:
    if row is None:
        return ""
    if row["output_error_max"] is None:
        return row["status"].replace("_", " ")
    over = "" if row["status"] == "measured" else f" {row['status']}"
    return f"{row['output_error_max']:.1e}, {row['lse_relative_error']:.1e}{over}"


def plan_table(rows: Sequence[Row], label: Label) -> str:
    """Compiled training steps and prefills: GiB on each chip."""

    def size(row: Row, name: str) -> str:
        value = row.get(f"{name}_bytes", 0)  # what prefills leave is not in older files
        return "not known" if value is None else f"{value / 2**30:.2f}"

    names = ("parameter", "optimizer", "cache", "temporary", "program", "total")
    lines = [
        (
            f"`{row['preset']}`",
            row.get("work", "training step"),
            f"{row['devices']} chips of {row['target']}",
            f"{row['sequences']} x {label(row['tokens'])}",
            *(size(row, name) for name in names),
            "does not fit" if row.get("problem") else "fits",
        )
        for row in rows
    ]
    head = ("preset", "", "compiled for", "tokens of each", *names, "")
    return markdown(head, lines)


def prefill_table(rows: Sequence[Row], label: Label) -> str:
    """Contexts that were read: tokens a second, and GiB."""

    def size(value: int | None) -> str:
        return "not known" if value is None else f"{value / 2**30:.2f}"

    lines = []
    for row in rows:
        numbers = ["", "", "", row["status"].replace("_", " ")]
        if row["status"] == "measured":
            numbers = [
                f"{row['tokens_per_second']:,.0f}",
                format_number(row["milliseconds"] / 1e3),
                size(row["cache_bytes"]),
                size(row["peak_bytes"]),
            ]
        lines.append((
            label(row["tokens"]), row["layers"], row.get("tier") or "device", label(row["chunk"]),
            *numbers,
        ))  # fmt: skip
    head = (
        "tokens", "layers", "tier", "chunk", "tokens a second", "seconds", "cache, GiB",
        "peak of the device, GiB",
    )  # fmt: skip
    return markdown(head, lines)


def losses_table(rows: Sequence[Row], label: Label) -> str:
    """Losses of the same run by different implementations, ten steps of it."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    shown = steps[:: -(-len(steps) // 10)] if len(steps) > 10 else steps
    shown = sorted({*shown, *steps[-1:]})
    losses = {(row["implementation"], row["step"]): f"{row['loss']:.4f}" for row in rows}
    lines = [(label(step), *(losses.get((name, step), "") for name in names)) for step in shown]
    return markdown(("step", *names), lines)


def scaling_table(rows: Sequence[Row], label: Label) -> str:
    """Modelled seconds where chips and tokens grow together, and how well they scale."""
    modelled = [row for row in rows if row["status"] == "modelled"]

    def line(row: Row) -> list[str]:
        what = [row["work"], str(row["chips"]), label(row["length"])]
        if row not in modelled:
            return [*what, row["status"], *[""] * 4]
        alike = [x for x in modelled if all(x[name] == row[name] for name in ("work", "tokens"))]
        fewest = min(alike, key=lambda x: x["chips"])
        seconds = {
            name.removesuffix("_seconds").replace("_", "-"): row[name]
            for name in SCALING_FIELDS if name.endswith("_seconds") and name != "links_seconds"
        }  # fmt: skip
        apart, beside = (
            f"{100 * combine(fewest) / combine(row):.0f} %" for combine in (_one_by_one, _at_once)
        )
        return [
            *what, format_number(row["arithmetic_seconds"]), format_number(row["links_seconds"]),
            max(seconds, key=lambda name: seconds[name]), apart, beside,
        ]  # fmt: skip

    chosen = sorted(rows, key=lambda row: (row["work"], row["tokens"], row["chips"]))
    head = (
        "", "chips", "tokens", "arithmetic, s", "links, s", "longest", "efficiency", "overlapped",
    )  # fmt: skip
    return markdown(head, map(line, chosen))


def _one_by_one(row: Row) -> float:
    return row["arithmetic_seconds"] + row["links_seconds"]


def _at_once(row: Row) -> float:
    return max(row["arithmetic_seconds"], row["links_seconds"])


def traffic_table(rows: Sequence[Row], label: Label) -> str:
    """What chips send that share a sequence, MiB of each, by kind of collective."""
    kinds = [name for name in TRAFFIC_FIELDS if name.endswith("_bytes")]

    def line(row: Row) -> list[str]:
        what = [row["strategy"], str(row["chips"]), label(row["tokens"])]
        if row["status"] != "compiled":
            return [*what, row["status"].replace("_", " "), *[""] * (len(kinds) - 1)]
        return what + [format_number(row[name] / 2**20) for name in kinds]

    chosen = sorted(rows, key=lambda row: (row["strategy"], row["chips"]))
    named = [name.removesuffix("_bytes").replace("_", " ") for name in kinds]
    head = ["strategy", "chips", "tokens of each", *named[:-1], "by the rule"]
    return markdown(head, map(line, chosen))
