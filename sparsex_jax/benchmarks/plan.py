"""What work takes of chips that are not here: it is compiled for them, not run."""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

from pallas_kernels.ahead_of_time import (
    TPU_TARGETS,
    MemoryExceededError,
    compile_for,
)
from sparsex_jax.benchmarks.hlo import COLLECTIVES, Program
from sparsex_jax.benchmarks.operations import count_operations
from sparsex_jax.benchmarks.planned import (
    Prefill,
    TrainingStep,
    Work,
    absent_devices,
    rounds_of,
    trace,
)
from sparsex_jax.benchmarks.rooflines import find_chip, link_seconds
from sparsex_jax.config import ConfigError, TrainConfig
from sparsex_jax.parallel.mesh import make_mesh

# That programs may take: of a v5e, as libtpu says; of a GPU nine tenths of what its driver says, as
# with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
_CHIP_BYTES = {
    "v5e": int(15.75 * 2**30),
    "h100": int(0.9 * 81559 * 2**20),
    "h200": int(0.9 * 143771 * 2**20),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the work takes of each chip.

    Attributes:
      chip: kind of the devices, as JAX names it.
      chip_bytes: that programs may take of one's memory.
      devices: that share the work.
      tokens: of a sequence, those of a chip.
      sequences: that a chip computes with at a time.
      parameters: of the whole model.
      parameter_bytes: a chip's part of them.
      optimizer_bytes: a chip's part of the moments.
      batch_bytes: a chip's part of the batch.
      cache_bytes: its part of what a prefill leaves.
      temporary_bytes: what else there is at once: whole parameters, gradients, activations; None
        where it does not fit, since the compiler then gives no count.
      program_bytes: of the program itself; None likewise.
      sent_bytes: that a chip sends to others, by kind of collective, with as many rounds of
        dispatch as even choices take; empty where it does not fit.
      operations: of a chip, see `count_operations`; of attention as the kernels for TPUs do it, by
        whole tiles, which is somewhat more than those for GPUs do.
      kernels: how many calls of each there are in the program; none where it does not fit.
      problem: why it does not fit, in the compiler's words; None if it does.
    """

    chip: str
    chip_bytes: int
    devices: int
    tokens: int
    sequences: int
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    cache_bytes: int
    temporary_bytes: int | None
    program_bytes: int | None
    sent_bytes: dict[str, int]
    operations: int
    kernels: dict[str, int]
    problem: str | None

    @property
    def total_bytes(self) -> int | None:
        """Of all categories, or None."""
        if self.temporary_bytes is None or self.program_bytes is None:
            return None
        held = self.parameter_bytes + self.optimizer_bytes + self.batch_bytes + self.cache_bytes
        return held + self.temporary_bytes + self.program_bytes

    def least_seconds(self) -> dict[str, float]:
        """The work's time if nothing but arithmetic took any, or links, where that is known."""
        chip = find_chip(self.chip)
        assert chip is not None
        found = {"arithmetic": self.operations / (chip.tflops * 1e12)}
        if self.sent_bytes:
            sent = self.sent_bytes.items()
            found["links"] = sum(link_seconds(*each, self.devices, chip) for each in sent)
        return found

    def row(self) -> dict[str, Any]:
        """For a results file."""
        kernels = ", ".join(f"{name} {count}" for name, count in self.kernels.items())
        seconds = self.least_seconds()
        return {
            **dataclasses.asdict(self),
            "total_bytes": self.total_bytes,
            "arithmetic_seconds": seconds["arithmetic"],
            "links_seconds": seconds.get("links"),
            "kernels": kernels,
            "sent_bytes": sum(self.sent_bytes.values()) if self.sent_bytes else None,
            **{f"{k.replace('-', '_')}_bytes": self.sent_bytes.get(k) for k in COLLECTIVES},
            "status": "compiled",
        }


def _bytes(tree: Any) -> int:
    """Of what a device holds of shapes."""

    def part(x):
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def longest_stage(config: TrainConfig) -> int:
    """The last of the stages with the longest sequences."""
    return max(range(len(config.stages)), key=lambda n: (config.stages[n].length, n))


def parse_target(target: str, devices: int | None) -> tuple[str, int | None]:
    """What `compile_for` calls a target, and how many devices; arguments as in `make_plan`."""
    if target in TPU_TARGETS:
        return target, devices
    found = re.fullmatch(r"(h100|h200)x(\d+)", target)
    if found is None:
        raise ConfigError(
            f"target={target!r} must be a slice, {', '.join(TPU_TARGETS)}, or a number of GPUs,"
            " h100x8 or h200x8, say"
        )
    if devices is not None:
        raise ConfigError(f"devices={devices} is for slices: {target} says how many GPUs there are")
    return found[1], int(found[2])


def make_plan(
    config: TrainConfig,
    target: str,
    devices: int | None = None,
    *,
    stage: int | None = None,
    prefill: int | None = None,
) -> Plan:
    """Compiles a training step or a prefill, which takes minutes, and counts what it takes.

    Args:
      config: of the training.
      target: of TPUs a slice, one of TPU_TARGETS; of GPUs their number, too: h100x8, h200x16.
      devices: of a slice, the first so many; None for all.
      stage: number of the step's stage; None for `longest_stage`.
      prefill: tokens of a context to read instead.

    Raises:
      ConfigError: the target, its chips or the stage do not exist, its compiler is missing, or the
        mesh does not fit chips, model or batch.
    """
    kind, devices = parse_target(target, devices)
    chips = absent_devices(kind, devices, target)
    mesh = make_mesh(config.mesh, chips)
    work: Work
    if prefill is None:
        work = TrainingStep(config, longest_stage(config) if stage is None else stage, mesh)
    else:
        work = Prefill(config, prefill, mesh)
    state, batch = work.state(), work.batch()
    sizes = {} if mesh is None else dict(mesh.shape)
    rounds = rounds_of(work)
    plan = Plan(
        chip=chips[0].device_kind,
        chip_bytes=_CHIP_BYTES[kind.partition(":")[0]],
        devices=len(chips),
        tokens=work.length // sizes.get("seq", 1),
        sequences=work.batch_size // (sizes.get("data", 1) * sizes.get("fsdp", 1)),
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"])),
        parameter_bytes=_bytes(state["params"]),
        optimizer_bytes=_bytes(state.get("optimizer")),
        batch_bytes=_bytes(batch),
        cache_bytes=0,
        temporary_bytes=None,
        program_bytes=None,
        sent_bytes={},
        operations=count_operations(trace(work), rounds),
        kernels={},
        problem=None,
    )
    options = {} if prefill else {"donate_argnums": 0}
    try:
        compilation = compile_for(
            kind, work.function(), state, batch, devices=devices, mesh=mesh, **options
        )
    except MemoryExceededError as error:
        return dataclasses.replace(plan, problem=str(error))
    memory: Any = compilation.executable.memory_analysis()
    names = sorted(kernel.name for kernel in compilation.kernels)
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    plan = dataclasses.replace(
        plan,
        cache_bytes=made if prefill else 0,
        temporary_bytes=memory.temp_size_in_bytes + (0 if prefill else made),
        program_bytes=memory.generated_code_size_in_bytes,
        sent_bytes=Program(compilation.executable.as_text() or "", rounds).sent(),
        kernels=dict(collections.Counter(names)),
    )
    assert plan.total_bytes is not None
    if plan.total_bytes <= plan.chip_bytes:
        return plan
    # The compiler for GPUs does not say so.
    needed, there = (f"{x / 2**30:.2f} GiB" for x in (plan.total_bytes, plan.chip_bytes))
    return dataclasses.replace(
        plan, problem=f"{needed} are more than the {there} of an {kind.upper()}"
    )


def way_out(config: TrainConfig, plan: Plan, *, prefill: bool = False) -> str:
    """What to try first where a plan does not fit."""
    if prefill:
        return "use a shorter context, or more devices along mesh.seq"
    if plan.sequences > 1:
        fewer = next(n for n in range(2, plan.sequences + 1) if plan.sequences % n == 0)
        return f"use --accumulation {config.accumulation * fewer}"
    if config.model.remat == "none":
        return "use --model.remat layer"
    if config.model.remat == "layer":
        return "use --model.remat repetition, where layers repeat, or a larger slice"
    return "use shorter sequences, or a larger slice with as many more sequences"
