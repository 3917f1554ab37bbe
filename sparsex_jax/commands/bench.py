"""`sparsex bench`."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console

from sparsex_jax.benchmarks.names import DIRECTIONS, PARTS, Direction, Part, Selection
from sparsex_jax.benchmarks.tables import format_number
from sparsex_jax.commands.arguments import (
    format_length,
    make_console,
    make_progress,
    parse,
    parse_length,
    parse_lengths,
)
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.attention import Benchmark


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Times the attention and its parts against dense attention (cuDNN's on a GPU), in bfloat16.

    The op is everything from q, k, v, salience, features and gates to the output. Scoring finds the
    best block only, selection the best 16, so scoring is within selection. Nothing gets a time
    whose outputs or gradients differ from a reference, computed for some rows; the command
    then exits with 1.

    Attributes:
      lengths: tokens of the sequence, a multiple of 64 from 1K on; 4096, 16K and 1M are understood.
      parts: what to time; "op" comes with dense attention, "local" with the library's own window.
      directions: forward alone, or with the backward pass.
      query_heads: Hq.
      kv_heads: Hkv; each serves a group of query heads.
      head_dim: width of a head.
      implementation: of the primitives (mosaic_gpu, xla, reference); by default what `sparsex info`
        names.
      selection: of blocks. An untrained model's is near random; with "correlated" neighbouring
        tokens share about 80 % of their blocks (the rows say how many).
      samples: times taken for a row, at most.
      seconds: time budget of a row.
      dense_seconds: dense attention that would take longer is timed with one head and scaled.
      check_length: where everything is compared before anything is timed; 0 for nowhere.
      seed: decides the inputs.
      out: results file (JSON); by default results/HARDWARE/attention.json (cpu, h200, ...).
      resume: keeps the rows that the file has, except failed ones, and measures the others.
    """

    lengths: tuple[str, ...] = ("4K", "32K", "128K", "1M", "4M")
    parts: tuple[Part, ...] = PARTS
    directions: tuple[Direction, ...] = DIRECTIONS
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    implementation: str | None = None
    selection: Selection = "random"
    samples: int = 20
    seconds: float = 10.0
    dense_seconds: float = 60.0
    check_length: str = "4K"
    seed: int = 0
    out: Path | None = None
    resume: bool = False


def main(arguments: list[str]) -> int:
    """Parses the arguments, runs the command and returns its exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: sparsex bench attention [arguments]\n")
        print("`sparsex bench attention --help` tells more.")
        return 0
    if arguments[:1] == ["attention"]:
        command = shlex.join(["sparsex", "bench", *arguments])
        return attention(parse(AttentionArguments, "bench attention", arguments[1:]), command)
    given = f"{arguments[0]!r}" if arguments else "nothing"
    raise ConfigError(f"bench must be followed by what to measure, not {given}: use attention")


def attention(arguments: AttentionArguments, command: str) -> int:
    """Runs the command, which is quoted in what it writes; 1 if a row is wrong or failed."""
    from sparsex_jax.benchmarks.attention import BAD, Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable, default_path

    path = arguments.out or default_path("attention")
    check = arguments.check_length
    given = dataclasses.asdict(arguments)
    for name in ("out", "resume"):
        del given[name]
    given["lengths"] = tuple(parse_lengths(arguments.lengths))
    given["check_length"] = None if check == "0" else parse_length(check)
    settings = Settings(**given)
    check_writable(path)
    benchmark = Benchmark(settings, path, command, resume=arguments.resume)
    console = make_console()
    rows = _run(benchmark, console)
    console.print(f"results: {path} (`sparsex report` draws them)", markup=False, soft_wrap=True)
    return int(any(row["status"] in BAD for row in rows))


def _run(benchmark: "Benchmark", console: rich.console.Console) -> list[dict[str, Any]]:
    """The rows that were measured now."""
    rows = []
    checks, steps = benchmark.checks(), benchmark.steps()
    kept = len(benchmark.rows)
    if kept:
        console.print(f"{kept} rows are in {benchmark.path} already", markup=False, soft_wrap=True)
    with make_progress(console) as bar:
        shown = bar.add_task("", total=len(checks) + len(steps))
        for step in checks:
            bar.update(shown, description=f"comparing {step.case.part}, {step.direction}")
            benchmark.check(step)
            bar.advance(shown)
        for step in steps:
            name = f"{format_length(step.length)} {step.case.system} {step.case.part}"
            bar.update(shown, description=f"{name}, {step.direction}")
            rows.append(benchmark.measure(step))
            text = f"{name}, {step.direction}: {_outcome(rows[-1])}"
            console.print(text, markup=False, soft_wrap=True)
            bar.advance(shown)
    return rows


def _outcome(row: dict[str, Any]) -> str:
    """A row in words."""
    if row["status"] != "measured":
        return f"{row['status'].replace('_', ' ')}: {row['note']}"
    parts = [f"{format_number(row['milliseconds'])} ms"]
    if row["speedup_over_dense"] and row["system"] == "sparsex":
        parts.append(f"{format_number(row['speedup_over_dense'])} times as fast as dense")
    if row["roofline_share"]:
        parts.append(f"{row['roofline_share']:.0%} of the roofline")
    return ", ".join(parts) + (f" ({row['note']})" if row["note"] else "")
