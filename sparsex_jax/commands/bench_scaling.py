"""`sparsex bench scaling`."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands.arguments import parse_length
from sparsex_jax.commands.running import run_benchmark
from sparsex_jax.commands.train import parse_with_preset
from sparsex_jax.config import TrainConfig

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.runner import Row


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Models how long work takes where chips and tokens grow together; nothing runs.

    The preset's last stage, or a prefill, is traced for ever more chips that share one sequence,
    and divided by what chips and links do at best. It needs the extra `compile`. Each field of the
    preset's TrainConfig is an option, too.

    Attributes:
      preset: a Python file that defines `config`, a TrainConfig (see configs/).
      work: a training step, or the reading of a context.
      target: kind of the chips.
      chips: numbers of them, ascending; of v5e those of its slices.
      tokens: of each chip; 4096 and 16K are understood.
      out: results file (JSON).
      resume: keeps the rows that the file has.
      config: the preset's.
    """

    preset: tyro.conf.Positional[Path]
    out: Path
    work: Literal["training", "prefill"] = "training"
    target: Literal["v5e", "h100", "h200"] = "v5e"
    chips: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    tokens: str = "16K"
    resume: bool = False
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()


def main(arguments: list[str], command: str) -> int:
    """Parses the arguments, runs the command and returns its exit status."""

    def default(preset: Path, config: TrainConfig) -> Arguments:
        return Arguments(preset, tyro.MISSING, config=config)

    parsed = parse_with_preset(Arguments, "bench scaling", arguments, default)
    # Nothing runs on this machine's devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sparsex_jax.benchmarks.results import check_writable
    from sparsex_jax.benchmarks.scaling import Benchmark, Settings

    tokens = parse_length(parsed.tokens, "tokens")
    settings = Settings(parsed.config, parsed.work, parsed.target, parsed.chips, tokens)
    check_writable(parsed.out)
    benchmark = Benchmark(settings, parsed.out, command, resume=parsed.resume)
    return run_benchmark(benchmark, _describe)


def _describe(row: "Row") -> str:
    arithmetic, links = (format_number(row[f"{x}_seconds"]) for x in ("arithmetic", "links"))
    return f"{row['chips']} chips: arithmetic {arithmetic} s, links {links} s"
