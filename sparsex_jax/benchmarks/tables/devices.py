"""Tables of many devices, compiled or modelled: plans, scaling, traffic."""

from collections.abc import Sequence

from sparsex_jax.benchmarks.tables.cells import Label, Row, format_number, markdown
from sparsex_jax.benchmarks.tables.speed import SHAPE

PLAN_FIELDS = (
    "preset", "target", "devices", "tokens", "sequences", "parameters", "parameter_bytes",
    "optimizer_bytes", "temporary_bytes", "program_bytes", "total_bytes", "status",
)  # fmt: skip
SCALING_FIELDS = (
    "work", "chips", "tokens", "length", "arithmetic_seconds", "links_seconds",
    "all_gather_seconds", "all_reduce_seconds", "reduce_scatter_seconds", "all_to_all_seconds",
    "collective_permute_seconds", "status",
)  # fmt: skip
TRAFFIC_FIELDS = (
    "strategy", "target", "chips", "tokens", *SHAPE, "all_gather_bytes", "all_reduce_bytes",
    "reduce_scatter_bytes", "all_to_all_bytes", "collective_permute_bytes", "total_bytes",
    "rule_bytes", "status",
)  # fmt: skip


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
