"""`sparsex tune`."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import rich.console

from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands.arguments import make_console, make_progress, parse, parse_length

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.tuning import Trial, Tuner


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Finds the fastest config of each kernel on this Hopper GPU, and stores it for later runs.

    Each candidate is compiled, compared with plain JAX and, if equal, timed. One that is faster
    than the default by more than the spread of the times is stored, else the default. Results are
    stored kernel by kernel. The command exits with 1 if no config of a kernel is right.

    Attributes:
      kernels: what to tune: range_attention, block_sparse_attention, block_selection, or a single
        kernel such as range_attention.key_gradients.
      head_dims: widths of a head; of features, for block_selection.
      length: tokens of the sequence, a multiple of 64 from 1K on; 4096, 16K and 1M are understood.
      query_heads: Hq.
      kv_heads: Hkv; each serves a group of query heads.
      samples: times taken for a candidate, at most.
      seconds: time budget of a candidate.
      seed: decides the operands.
      out: folder of the tuned configs; by default the one that the kernels read, which is
        SPARSEX_TUNED if that is set.
      resume: tunes only what the file has no config of.
    """

    kernels: tuple[str, ...] = ("range_attention", "block_sparse_attention", "block_selection")
    head_dims: tuple[int, ...] = (64, 128)
    length: str = "128K"
    query_heads: int = 16
    kv_heads: int = 2
    samples: int = 20
    seconds: float = 2.0
    seed: int = 0
    out: Path | None = None
    resume: bool = False


def main(arguments: list[str]) -> int:
    """Parses the arguments, runs the command and returns its exit status."""
    parsed = parse(Arguments, "tune", arguments)
    from pallas_kernels import tuning
    from sparsex_jax.benchmarks.tuning import Settings, Tuner

    given = dataclasses.asdict(parsed)
    for name in ("out", "resume"):
        del given[name]
    settings = Settings(**given | {"length": parse_length(parsed.length)})
    used = tuning.folder()
    folder = used if parsed.out is None else parsed.out
    command = shlex.join(["sparsex", "tune", *arguments])
    tuner = Tuner(settings, folder, command, resume=parsed.resume)
    console = make_console()
    complete = _run(tuner, console)
    hint = "" if folder == used else f" (kernels take them with {tuning.FOLDER}={folder})"
    console.print(f"tuned configs: {tuner.path}{hint}", markup=False, soft_wrap=True)
    return int(not complete)


def _run(tuner: "Tuner", console: rich.console.Console) -> bool:
    """Whether every kernel has a config that is right."""
    complete = True
    if tuner.kept:
        console.print(f"{len(tuner.kept)} entries are in {tuner.path} already", markup=False)
    steps = tuner.steps()
    with make_progress(console) as bar:
        count = sum(len(step.kernel.candidates(step.head_dim)) for step in steps)
        shown = bar.add_task("", total=count)
        for step in steps:
            name = f"{step.kernel.name} at {step.head_dim}"
            bar.update(shown, description=name)
            trials = []
            for trial in tuner.try_all(step):
                trials.append(trial)
                text = f"{name}, {_describe(trial)}"
                console.print(text, markup=False, soft_wrap=True)
                bar.advance(shown)
            best = tuner.conclude(step, trials)
            complete &= best is not None
            console.print(f"{name}: {_outcome(best, trials)}", markup=False, soft_wrap=True)
    return complete


def _configured(trial: "Trial") -> str:
    return " ".join(f"{name}={value}" for name, value in vars(trial.config).items())


def _describe(trial: "Trial") -> str:
    if trial.milliseconds is None:
        return f"{_configured(trial)}: {trial.status.replace('_', ' ')}: {trial.note}"
    q1, median, q3 = map(format_number, trial.milliseconds)
    return f"{_configured(trial)}: {median} ms ({q1} to {q3})"


def _outcome(best: "Trial | None", trials: "list[Trial]") -> str:
    default = trials[0]
    if best is None:
        return "no config is right; nothing was stored"
    if best is default:
        return "the default stands"
    if default.milliseconds is None:
        return f"{_configured(best)}, since the default has no time"
    faster = format_number(default.median / best.median)
    return f"{_configured(best)}, {faster} times as fast as the default"
