"""`sparsex report`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from sparsex_jax.benchmarks import tables
from sparsex_jax.benchmarks.names import DIRECTIONS
from sparsex_jax.commands.arguments import format_length, parse
from sparsex_jax.config import ConfigError

ATTENTION = ("attention", "attention_peers")
ACCURACY = ("needle",)
NUMERICS = ("numerics",)
PLANS = ("plan",)
DECODE = ("decode",)
PREFILL = ("prefill",)
LOSSES = ("losses",)
TRAFFIC = ("traffic",)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints tables of all results (Markdown) and draws those of `sparsex bench attention`.

    Attributes:
      results: folder with a folder for each hardware, which holds results files.
      out: folder for the pictures, one in it for each hardware; by default
        RESULTS/HARDWARE/plots.
    """

    results: Path = Path("results")
    out: Path | None = None


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    report(parse(Arguments, "report", arguments))


def report(arguments: Arguments) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.plots import draw_attention

    found = _read(arguments.results)
    if not found:
        raise ConfigError(
            f"results='{arguments.results}' must hold files like h200/attention.json: run `sparsex"
            " bench attention` first, or give --results DIR"
        )
    for hardware, files in found.items():
        timed = [results for _, results in files if results["benchmark"] in ATTENTION]
        rows = [row for results in timed for row in results["rows"] if not row.get("target")]
        folder = arguments.results / hardware / "plots"
        if arguments.out is not None:
            folder = arguments.out / hardware
        pictures, shapes = [], tables.shapes(rows)
        for shape in shapes:
            suffix = "" if len(shapes) == 1 else "-" + "-".join(map(str, shape))
            chosen = tables.of_shape(rows, shape)
            pictures += draw_attention(chosen, folder, format_length, suffix)
        for path, results in files:
            _print_section(hardware, path, results)
        for path in pictures:
            print(f"![{path.stem}]({path})")
        print()


def _read(folder: Path) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    """Results files by hardware; what is no such file is named on stderr and left out."""
    from sparsex_jax.benchmarks.results import read_results

    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            results = read_results(path)
            _check(path, results)
        except ConfigError as error:
            print(f"sparsex: {error}: left out", file=sys.stderr)
        else:
            found.setdefault(path.parent.name, []).append((path, results))
    return found


def _check(path: Path, results: dict[str, Any]) -> None:
    """Raises ConfigError unless rows are of a known kind and have its fields."""
    name = results.get("benchmark")
    fields: tuple[str, ...]
    of_targets: tuple[str, ...] = ()
    if name in ATTENTION:
        fields, of_targets = tables.ATTENTION_FIELDS, tables.COMPILED_FIELDS
    elif name in ACCURACY:
        fields = tables.ACCURACY_FIELDS
    elif name in NUMERICS:
        fields = tables.NUMERICS_FIELDS
    elif name in PLANS:
        fields = tables.PLAN_FIELDS
    elif name in DECODE:
        fields = tables.ATTENTION_FIELDS
    elif name in PREFILL:
        fields = tables.PREFILL_FIELDS
    elif name in LOSSES:
        fields = tables.LOSSES_FIELDS
    elif name in TRAFFIC:
        fields = tables.TRAFFIC_FIELDS
    else:
        known = ", ".join(
            ATTENTION + ACCURACY + NUMERICS + PLANS + DECODE + PREFILL + LOSSES + TRAFFIC
        )
        raise ConfigError(f"{path} has benchmark={name!r}, not {known}")
    for number, row in enumerate(results["rows"]):
        more = of_targets if row.get("target") else ()
        missing = [field for field in (*fields, *more) if field not in row]
        if missing:
            raise ConfigError(f"{path}: row {number} lacks {', '.join(missing)}")


def _print_section(hardware: str, path: Path, results: dict[str, Any]) -> None:
    """A heading, what the numbers rest on, and the tables."""
    machine = results.get("hardware") or {}
    print(f"### {hardware}: {results['benchmark']}\n")
    count = "" if machine.get("count") is None else f"{machine['count']} x "
    print(
        f"`{results.get('command')}` on {count}{machine.get('kind')}, driver"
        f" {machine.get('driver')}, commit {results.get('commit')}, {results.get('date')}"
        f" (`{path}`)\n"
    )
    if results["benchmark"] in ACCURACY:
        print(tables.accuracy_table(results["rows"], format_length), end="\n\n")
    elif results["benchmark"] in NUMERICS:
        print("Relative errors: of the worst query's output, and of the worst lse.\n")
        print(tables.numerics_table(results["rows"], format_length), end="\n\n")
    elif results["benchmark"] in PLANS:
        print("A training step, compiled and not run; GiB on each chip.\n")
        print(tables.plan_table(results["rows"], format_length), end="\n\n")
    elif results["benchmark"] in DECODE:
        print("Milliseconds of one decoding step of one layer over a full cache.\n")
        _print_attention(results["rows"])
    elif results["benchmark"] in PREFILL:
        model = (results.get("config") or {}).get("model_name")
        print(f"A context read in chunks by {model}.\n")
        print(tables.prefill_table(results["rows"], format_length), end="\n\n")
    elif results["benchmark"] in LOSSES:
        print("The same training, by implementation of the primitives.\n")
        print(tables.losses_table(results["rows"], str), end="\n\n")
    elif results["benchmark"] in TRAFFIC:
        print("One layer's attention, forward and backward, compiled and not run; MiB that a chip")
        print("sends.\n")
        print(tables.traffic_table(results["rows"], format_length), end="\n\n")
    else:
        _print_attention([row for row in results["rows"] if not row.get("target")])
        compiled = [row for row in results["rows"] if row.get("target")]
        _print_compiled(compiled, (results.get("config") or {}).get("method"))


def _print_compiled(rows: list[dict[str, Any]], method: str | None) -> None:
    if rows:
        print(f"Compiled, not run. Memory is a chip's. Times are {method or 'not measured'}\n")
    for shape in tables.shapes(rows):
        print("{} query heads, {} KV heads, head dim {}:\n".format(*shape))
        print(tables.compiled_table(tables.of_shape(rows, shape), format_length), end="\n\n")


def _print_attention(rows: list[dict[str, Any]]) -> None:
    for shape in tables.shapes(rows):
        chosen = tables.of_shape(rows, shape)
        print("{} query heads, {} KV heads, head dim {}:\n".format(*shape))
        if any(row["part"] == "op" for row in chosen):
            print(tables.op_table(chosen, format_length), end="\n\n")
        for direction in DIRECTIONS:
            table = tables.parts_table(chosen, direction, format_length)
            if table:
                print(f"Parts, {direction.replace('_', ' and ')}, milliseconds:\n\n{table}\n")
