"""`sparsex bench`."""

import dataclasses
import functools
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sparsex_jax.benchmarks.names import (
    DIRECTIONS,
    LOGITS,
    PARTS,
    PRECISIONS,
    STRATEGIES,
    Direction,
    Logits,
    Part,
    Precision,
    Selection,
    Strategy,
)
from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands import bench_scaling
from sparsex_jax.commands.arguments import parse, parse_length
from sparsex_jax.commands.bench_cache import (
    DecodeArguments,
    PrefillArguments,
    decode,
    prefill,
)
from sparsex_jax.commands.running import given_settings, run_benchmark
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.runner import Row

WHAT = ("attention", "numerics", "decode", "prefill", "traffic", "scaling")


@dataclasses.dataclass(frozen=True)
class AttentionArguments:
    """Times the attention and its parts against dense attention (cuDNN's on a GPU), in bfloat16.

    The op is everything from q, k, v, salience, features and gates to the output. Scoring finds the
    best block only, selection the best 16, so scoring is within selection. Selection in nodes is
    another way to select, in two levels, that may miss blocks: its rows say how many it finds
    (recall), of random ones. Nothing gets a time whose outputs or gradients differ from a
    reference, computed for some rows; the command then exits with 1.

    With a target everything is compiled for TPUs that need not be here, and nothing runs: rows have
    status "compiled", the memory of a chip, the roofline's time and a modelled one. Each chip has
    its own sequence and heads. Dense attention, selection, samples, seconds, dense_seconds,
    check_length and seed are of no use then and refused.

    Attributes:
      target: compile for it instead of measuring: v5e:2x2 to v5e:16x16; v5e is v5e:2x4.
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
      out: results file (JSON); by default results/HARDWARE/attention.json (cpu, h200, ..., tpu-v5e
        with a target).
      resume: keeps the rows that the file has, except failed ones, and measures the others.
    """

    target: str | None = None
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


@dataclasses.dataclass(frozen=True)
class NumericsArguments:
    """Measures the errors of attention over all keys of a long context, against float64.

    The queries, heads of one token, see all keys by range attention. The reference has the same
    operands, so only the arithmetic is judged. The command exits with 1 if in float32 a query's
    output or lse has a relative error above 1e-6. 4M keys take 8 GiB of memory.

    Attributes:
      lengths: keys, a multiple of 64; 4096, 16K and 1M are understood.
      logits: "normal" have a spread of 1, "peaked" too but for one key with 20, "large" a spread of
        6, so that the largest are near 30.
      systems: "f32" and "bf16" (operands, and sums in float32) take all keys at once. "f32_merged"
        merges the (out, lse) of blocks pair by pair, "f32_summed" adds them to a SoftmaxSum.
      queries: query heads, all of one KV head.
      head_dim: width of a head.
      block: keys of the blocks that are merged.
      implementation: of range attention (mosaic_gpu, xla, reference); by default what `sparsex
        info` names.
      seed: decides the inputs.
      out: results file (JSON); by default results/HARDWARE/numerics.json (cpu, h200, ...).
      resume: keeps the rows that the file has, except failed ones, and measures the others.
    """

    lengths: tuple[str, ...] = ("64K", "1M", "4M")
    logits: tuple[Logits, ...] = LOGITS
    systems: tuple[Precision, ...] = PRECISIONS
    queries: int = 32
    head_dim: int = 128
    block: str = "64K"
    implementation: str | None = None
    seed: int = 0
    out: Path | None = None
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class TrafficArguments:
    """Counts what chips send where they share a sequence, in programs compiled for TPU slices.

    The op, forward and backward, is compiled for each slice and strategy; nothing runs. Tokens of
    a chip are the same for all slices. Compiling takes minutes a row.

    Attributes:
      targets: slices, v5e:2x2 to v5e:16x16.
      strategies: of attention to selected blocks in other chips' parts.
      tokens: of each chip; 4096 and 16K are understood.
      query_heads: Hq.
      kv_heads: Hkv; each serves a group of query heads.
      head_dim: width of a head.
      out: results file (JSON); by default results/tpu-v5e/traffic.json.
      resume: keeps the rows that the file has, except failed ones, and compiles the others.
    """

    targets: tuple[str, ...] = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
    strategies: tuple[Strategy, ...] = STRATEGIES
    tokens: str = "16K"
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    out: Path | None = None
    resume: bool = False


def main(arguments: list[str]) -> int:
    """Parses the arguments, runs the command and returns its exit status."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    command = shlex.join(["sparsex", "bench", *arguments])
    if name in ("-h", "--help"):
        for begin, each in zip(("usage:", *[" " * 6] * (len(WHAT) - 1)), WHAT, strict=True):
            print(f"{begin} sparsex bench {each} [arguments]")
        print("\n`sparsex bench attention --help`, say, tells more.")
        return 0
    if name == "attention":
        return attention(parse(AttentionArguments, "bench attention", rest), command)
    if name == "numerics":
        return numerics(parse(NumericsArguments, "bench numerics", rest), command)
    if name == "decode":
        return decode(parse(DecodeArguments, "bench decode", rest), command)
    if name == "prefill":
        return prefill(parse(PrefillArguments, "bench prefill", rest), command)
    if name == "traffic":
        return traffic(parse(TrafficArguments, "bench traffic", rest), command)
    if name == "scaling":
        return bench_scaling.main(rest, command)
    given = f"{name!r}" if arguments else "nothing"
    raise ConfigError(
        f"bench must be followed by what to measure, not {given}: use {', '.join(WHAT[:-1])} or"
        f" {WHAT[-1]}"
    )


def attention(arguments: AttentionArguments, command: str) -> int:
    """Runs the command, which is quoted in what it writes; 1 if a row is wrong or failed."""
    if arguments.target is not None:
        return _compile(arguments, command)
    from sparsex_jax.benchmarks.attention import Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable, default_path

    path = arguments.out or default_path("attention")
    check = arguments.check_length
    short = None if check == "0" else parse_length(check, "check_length")
    given = given_settings(arguments)
    del given["target"]
    settings = Settings(**given | {"check_length": short})
    check_writable(path)
    benchmark = Benchmark(settings, path, command, resume=arguments.resume)
    checks = [
        (f"comparing {step.case.part}, {step.direction}", functools.partial(benchmark.check, step))
        for step in benchmark.checks()
    ]
    return run_benchmark(benchmark, _describe_times, checks)


def _compile(arguments: AttentionArguments, command: str) -> int:
    """`attention` for a target; 1 if a row failed."""
    # Nothing runs on this machine's devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sparsex_jax.benchmarks.compiled import DEFAULT, PATH, Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable

    given = given_settings(arguments)
    for name in ("selection", "samples", "seconds", "dense_seconds", "check_length", "seed"):
        usual = getattr(AttentionArguments, name)
        if (value := given.pop(name)) != usual:
            raise ConfigError(
                f"{name}={value} is of no use with target={arguments.target!r}, for which nothing"
                " runs: leave one of them out"
            )
    if arguments.target == "v5e":
        given["target"] = DEFAULT
    settings, path = Settings(**given), arguments.out or PATH
    check_writable(path)
    return run_benchmark(
        Benchmark(settings, path, command, resume=arguments.resume), _describe_compiled
    )


def numerics(arguments: NumericsArguments, command: str) -> int:
    """Runs the command, which is quoted in what it writes; 1 if a row is wrong or failed."""
    from sparsex_jax.benchmarks.numerics import Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable, default_path

    path = arguments.out or default_path("numerics")
    settings = Settings(
        **given_settings(arguments) | {"block": parse_length(arguments.block, "block")}
    )
    check_writable(path)
    return run_benchmark(
        Benchmark(settings, path, command, resume=arguments.resume), _describe_errors
    )


def traffic(arguments: TrafficArguments, command: str) -> int:
    """Runs the command; 1 if a row failed."""
    # Nothing runs on this machine's devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sparsex_jax.benchmarks.results import check_writable
    from sparsex_jax.benchmarks.traffic import PATH, Benchmark, Settings

    given, path = dataclasses.asdict(arguments), arguments.out or PATH
    del given["out"], given["resume"]
    settings = Settings(**given | {"tokens": parse_length(arguments.tokens, "tokens")})
    check_writable(path)
    benchmark = Benchmark(settings, path, command, resume=arguments.resume)
    return run_benchmark(benchmark, _describe_traffic)


def _describe_times(row: "Row") -> str:
    parts = [f"{format_number(row['milliseconds'])} ms"]
    if row["speedup_over_dense"] and row["system"] == "sparsex":
        parts.append(f"{format_number(row['speedup_over_dense'])} times as fast as dense")
    if row["roofline_share"]:
        parts.append(f"{row['roofline_share']:.0%} of the roofline")
    return ", ".join(parts)


def _describe_compiled(row: "Row") -> str:
    parts = [f"peak {row['peak_bytes'] / 2**30:.2f} GiB a chip"]
    if row["modelled_milliseconds"] is not None:
        parts.append(f"modelled {format_number(row['modelled_milliseconds'])} ms")
    parts.append(f"roofline {format_number(row['roofline_milliseconds'])} ms")
    return ", ".join(parts)


def _describe_traffic(row: "Row") -> str:
    sent, rule = row["total_bytes"] / 2**20, row["rule_bytes"] / 2**20
    return (
        f"{row['chips']} chips send {format_number(sent)} MiB each, {format_number(rule)} MiB by"
        " the rule"
    )


def _describe_errors(row: "Row") -> str:
    return (
        f"relative error {row['output_error']:.1e}, of the worst query"
        f" {row['output_error_max']:.1e}; lse {row['lse_relative_error']:.1e}"
    )
