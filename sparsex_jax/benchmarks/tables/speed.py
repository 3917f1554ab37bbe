"""Tables of times and memory: attention, whole or by part, prefill."""

import functools
from collections.abc import Iterable, Sequence

from sparsex_jax.benchmarks.names import DIRECTIONS, PARTS
from sparsex_jax.benchmarks.tables.cells import (
    Label,
    Row,
    format_number,
    if_measured,
    markdown,
    note_mark,
    optional_number,
    place,
)

# What tells attention rows of one length, direction and part apart, and must be there.
SHAPE = ("query_heads", "kv_heads", "head_dim")
ATTENTION_FIELDS = ("system", "part", "direction", "tokens", *SHAPE, "milliseconds", "status")
MEMORY = ("argument_bytes", "output_bytes", "temporary_bytes", "peak_bytes")
COMPILED_FIELDS = ("chips", *MEMORY)  # of rows that name a target, too
PREFILL_FIELDS = (
    "tokens", "layers", "chunk", "milliseconds", "tokens_per_second", "cache_bytes", "peak_bytes",
    "status",
)  # fmt: skip
ADDED_PARTS = ("selection", "rotary", "local", "landmarks", "dynamic", "fusion")  # make up an op


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
    chosen.sort(key=lambda row: (place(DIRECTIONS, row["direction"]), row["tokens"]))
    notes = list(dict.fromkeys(row["note"] for row in chosen if row.get("note")))
    head = ["direction", "length", "system", "ms (quartiles)", "times as fast as dense",
            "TFLOP/s", "of the roofline", "temporaries", "largest error"]  # fmt: skip
    lines = [_op_line(row, label, notes) for row in chosen]
    remarks = [f"{note_mark(i)} {note}" for i, note in enumerate(notes)]
    return "\n\n".join((markdown(head, lines), *remarks))


def _op_line(row: Row, label: Label, notes: list[str]) -> list[str]:
    share, memory = row.get("roofline_share"), row.get("peak_bytes")
    note = f" {note_mark(notes.index(row['note']))}" if row.get("note") else ""
    return [
        row["direction"].replace("_", " and "),
        label(row["tokens"]),
        describe_system(row),
        if_measured(row, functools.partial(_milliseconds, spread=True)) + note,
        optional_number(row.get("speedup_over_dense")),
        optional_number(row.get("teraflops_per_second")),
        "" if share is None else f"{share:.0%}",
        "" if memory is None else f"{format_number(memory / 2**30)} GiB",
        "" if row.get("max_error") is None else f"{row['max_error']:.1g}",
    ]


def parts_table(rows: Sequence[Row], direction: str, label: Label) -> str:
    """Milliseconds of the parts by length; scoring is within selection. "" without any.

    A search that may miss blocks has beside it the share of the best ones that it found. Systems
    that compute one part only, as other libraries' windows do, have a column each.
    """
    chosen = [row for row in rows if row["part"] != "op" and row["direction"] == direction]
    columns = sorted(
        dict.fromkeys((row["part"], describe_system(row)) for row in chosen),
        key=lambda column: place(PARTS, column[0]),
    )
    if not columns:
        return ""
    found = {(row["tokens"], row["part"], describe_system(row)): row for row in chosen}
    lines = [
        [label(length)]
        + [if_measured(found.get((length, *column)), _part_time) for column in columns]
        for length in sorted({row["tokens"] for row in chosen})
    ]
    return markdown(["length", *(f"{part}: {system}" for part, system in columns)], lines)


def _part_time(row: Row) -> str:
    recall = row.get("recall")
    return _milliseconds(row) + ("" if recall is None else f" (recall {recall:.1%})")


def compiled_table(rows: Sequence[Row], label: Label) -> str:
    """What was compiled for a target and not run, a line each: memory, and times not measured."""
    head = ["direction", "tokens a chip", "part", "chips", "arguments", "results", "temporaries",
            "peak", "roofline, ms", "modelled, ms", "of this kernels"]  # fmt: skip
    times = ("roofline_milliseconds", "modelled_milliseconds", "kernel_milliseconds")

    def order(row: Row) -> tuple[int, ...]:
        part, direction = place(PARTS, row["part"]), place(DIRECTIONS, row["direction"])
        return direction, row["tokens"], part, row["chips"]

    def line(row: Row) -> list[str]:
        what = [row["direction"].replace("_", " and "), label(row["tokens"]), row["part"]]
        if row["status"] == "compiled":
            found = [f"{row[name] / 2**30:.2f} GiB" for name in MEMORY]
        else:
            found = [row["status"].replace("_", " "), "", "", ""]
        return [
            *what,
            str(row["chips"]),
            *found,
            *(optional_number(row.get(name)) for name in times),
        ]

    return markdown(head, map(line, sorted(rows, key=order)))


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


def _milliseconds(row: Row, spread: bool = False) -> str:
    text = format_number(row["milliseconds"])
    quartiles = [row.get(f"milliseconds_q{i}") for i in (1, 3)]
    if spread and None not in quartiles:
        text += f" ({' to '.join(format_number(x) for x in quartiles if x is not None)})"
    return text
