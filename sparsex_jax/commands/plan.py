"""`sparsex plan`."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands.arguments import format_length, make_console, parse_length
from sparsex_jax.commands.train import parse_with_preset
from sparsex_jax.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.plan import Plan

BYTES = ("parameter", "optimizer", "batch", "cache", "temporary", "program", "total")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles a training step, or a prefill, for TPUs or GPUs not here, and says what it takes.

    Nothing is run. Compiling takes minutes, and the extra `compile`. Each field of the preset's
    TrainConfig is an option, too: --model.remat layer. The command exits with 1 if it does not fit.

    Attributes:
      preset: a Python file that defines `config`, a TrainConfig (see configs/).
      target: a slice of TPUs, v5e:2x2, v5e:2x4, ... v5e:16x16, or GPUs: h100x8, h200x16.
      devices: the first so many of a slice; by default all.
      stage: number of the preset's stage; by default the one with the longest sequences.
      prefill: tokens of a context that the devices read instead, keeping what later tokens need;
        4096, 16K and 1M are understood.
      out: a results file to write.
      config: the preset's.
    """

    preset: tyro.conf.Positional[Path]
    target: str
    devices: int | None = None
    stage: int | None = None
    prefill: str | None = None
    out: Path | None = None
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()


def main(arguments: list[str]) -> int:
    """Parses the arguments, runs the command and returns its exit status."""

    def default(preset: Path, config: TrainConfig) -> Arguments:
        return Arguments(preset, tyro.MISSING, config=config)

    parsed = parse_with_preset(Arguments, "plan", arguments, default)
    # Nothing runs on this machine's devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return _plan(parsed, shlex.join(["sparsex", "plan", *arguments]))


def _plan(arguments: Arguments, command: str) -> int:
    from pallas_kernels.ahead_of_time import target_mesh
    from sparsex_jax.benchmarks.plan import longest_stage, make_plan, parse_target, way_out
    from sparsex_jax.benchmarks.results import check_writable, compiled_for, write_results
    from sparsex_jax.training.checkpoints import to_json

    config, stage, prefill = arguments.config, arguments.stage, None
    if arguments.prefill is not None:
        if stage is not None:
            raise ConfigError(f"stage={stage} is for a training step: leave it out with prefill")
        prefill = parse_length(arguments.prefill, "prefill")
    elif stage is None:
        stage = longest_stage(config)
    if arguments.out is not None:
        check_writable(arguments.out)
    kind, _ = parse_target(arguments.target, arguments.devices)
    plan = make_plan(config, arguments.target, arguments.devices, stage=stage, prefill=prefill)
    work = f"stage {stage}: a training step" if prefill is None else "a prefill"
    console = make_console()
    console.print(_describe(plan, arguments, work), markup=False, soft_wrap=True)
    if plan.problem:
        advice = way_out(config, plan, prefill=prefill is not None)
        console.print(f"{plan.problem}\n{advice}", markup=False, soft_wrap=True)
    if arguments.out is not None:
        row = {"preset": str(arguments.preset), "stage": stage, "target": arguments.target}
        row["work"] = "training step" if prefill is None else "prefill"
        write_results(
            arguments.out, "plan", command, to_json(config), [row | plan.row()],
            hardware=compiled_for(target_mesh(kind, 1).devices.flat[0]),
        )  # fmt: skip
    return int(plan.problem is not None)


def _describe(plan: "Plan", arguments: Arguments, work: str) -> str:
    """The plan in words."""
    seconds = plan.least_seconds()
    bottleneck = max(seconds, key=lambda name: seconds[name])
    lines = [
        f"{arguments.preset}, {work} on {plan.devices} chips of {arguments.target}, compiled, not"
        " run",
        f"{format_number(plan.parameters / 1e6)}M parameters; each chip computes with"
        f" {plan.sequences} x {format_length(plan.tokens)} tokens at a time",
        "",
        "GiB on each chip",
    ]
    for name in BYTES:
        size = getattr(plan, f"{name}_bytes")
        shown = "not known" if size is None else f"{size / 2**30:.2f}"
        lines.append(f"  {name:<11}{shown}")
    fits = "does not fit" if plan.problem else "fits"
    sent = [f"  {kind:<20}{size / 2**20:,.1f}" for kind, size in plan.sent_bytes.items()]
    if sent:
        sent = ["MiB that each chip sends", *sent, ""]
    lines += [
        f"  {fits}, of {plan.chip_bytes / 2**30:.2f}",
        "",
        *sent,
        f"{plan.operations / 1e12:,.1f} TFLOP on each chip, recomputation included",
        f"at best {seconds[bottleneck]:.3g} s, by {bottleneck}: "
        + ", ".join(f"{name} {x:.3g} s" for name, x in seconds.items()),
        "kernels in the program:",
        *(f"  {name} {count}" for name, count in plan.kernels.items()),
    ]
    return "\n".join(lines)
