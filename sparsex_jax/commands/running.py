"""How the commands of `sparsex bench` run a benchmark and tell of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparsex_jax.commands.arguments import (
    format_length,
    make_console,
    make_progress,
    parse_lengths,
)

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.runner import Benchmark, Row


def given_settings(arguments: Any) -> dict[str, Any]:
    """The arguments that are settings, lengths as numbers."""
    given = dataclasses.asdict(arguments)
    del given["out"], given["resume"]
    return given | {"lengths": tuple(parse_lengths(arguments.lengths))}


def run_benchmark[Step](
    benchmark: "Benchmark[Step]",
    describe: Callable[["Row"], str],
    checks: Sequence[tuple[str, Callable[[], None]]] = (),
) -> int:
    """Measures what is missing, tells of each row; 1 if one is wrong or failed.

    Args:
      benchmark: what to measure.
      describe: a measured row in words.
      checks: what to call before, with names.
    """
    from sparsex_jax.benchmarks.runner import BAD

    console = make_console()
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    steps, bad = benchmark.steps(), False
    if benchmark.rows:
        say(f"{len(benchmark.rows)} rows are in {benchmark.path} already")
    with make_progress(console) as bar:
        shown = bar.add_task("", total=len(checks) + len(steps))
        for name, check in checks:
            bar.update(shown, description=name)
            check()
            bar.advance(shown)
        for step in steps:
            name = _name(benchmark.identity(step))
            bar.update(shown, description=name)
            row = benchmark.measure(step)
            bad |= row["status"] in BAD
            say(f"{name}: {_outcome(row, describe)}")
            bar.advance(shown)
    say(f"results: {benchmark.path} (`sparsex report` shows them)")
    return int(bad)


def _name(row: "Row") -> str:
    """What a row measures, in words."""
    names = "part", "direction", "logits", "tier", "strategy", "work", "target"
    details = [row[name] for name in names if name in row]
    return f"{format_length(row['tokens'])} {row['system']} {', '.join(details)}"


def _outcome(row: "Row", describe: Callable[["Row"], str]) -> str:
    """A row in words."""
    if row["status"] not in ("measured", "compiled", "modelled"):
        return f"{row['status'].replace('_', ' ')}: {row['note']}"
    return describe(row) + (f" ({row['note']})" if row["note"] else "")
