"""What a training step takes of chips that are not here: it is compiled for them, not run."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import (
    GPUS_PER_HOST,
    TPU_TARGETS,
    MemoryExceededError,
    compile_for,
    target_mesh,
)
from sparsex_jax.benchmarks.hlo import COLLECTIVES, Program
from sparsex_jax.benchmarks.operations import count_operations
from sparsex_jax.benchmarks.rooflines import find_chip
from sparsex_jax.config import ConfigError, TrainConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel.dispatch import plan_rounds
from sparsex_jax.parallel.mesh import batch_spec, check_batch, check_model, make_mesh
from sparsex_jax.parallel.rules import state_shardings
from sparsex_jax.training.optimizer import make_optimizer, make_schedule
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import make_step

# That programs may take: of a v5e, as libtpu says; of a GPU nine tenths of what its driver says, as
# with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
_CHIP_BYTES = {
    "v5e": int(15.75 * 2**30),
    "h100": int(0.9 * 81559 * 2**20),
    "h200": int(0.9 * 143771 * 2**20),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes of each chip.

    Attributes:
      chip: kind of the devices, as JAX names it.
      chip_bytes: that programs may take of one's memory.
      devices: that share the step.
      tokens: of a sequence, those of a chip.
      sequences: that a chip computes with at a time.
      parameters: of the whole model.
      parameter_bytes: a chip's part of them.
      optimizer_bytes: a chip's part of the moments.
      batch_bytes: a chip's part of the batch.
      temporary_bytes: what else there is at once: whole parameters, gradients, activations; None
        where it does not fit, since the compiler then gives no count.
      program_bytes: of the program itself; None likewise.
      sent_bytes: that a chip sends to others, by kind of collective, with as many rounds of
        dispatch as even choices take; empty where it does not fit.
      operations: of a chip, see `count_operations`.
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
        held = self.parameter_bytes + self.optimizer_bytes + self.batch_bytes
        return held + self.temporary_bytes + self.program_bytes

    def least_seconds(self) -> dict[str, float]:
        """A step's time if nothing but arithmetic took any, or links, where that is known."""
        chip = find_chip(self.chip)
        assert chip is not None
        links = chip.link_gigabytes
        if chip.network_gigabytes is not None and self.devices > GPUS_PER_HOST:
            links = chip.network_gigabytes
        found = {"arithmetic": self.operations / (chip.tflops * 1e12)}
        if self.sent_bytes:
            found["links"] = sum(self.sent_bytes.values()) / (links * 1e9)
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


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on devices that need not be here.

    Attributes:
      config: of the training.
      stage: number of the stage that the step is of.
      mesh: of `make_mesh`.
    """

    config: TrainConfig
    stage: int
    mesh: Mesh | None

    def __post_init__(self):
        count = len(self.config.stages)
        if not 0 <= self.stage < count:
            raise ConfigError(f"stage={self.stage} must be one of the preset's: 0 to {count - 1}")
        stage = self.config.stages[self.stage]
        check_model(self.config.model, self.mesh)
        check_batch(
            f"stages[{self.stage}]", stage.batch_size, stage.length, self.config.accumulation,
            self.config.model, self.mesh,
        )  # fmt: skip

    @functools.cached_property
    def _model(self) -> tuple[Any, dict]:
        """The skeleton, and the shapes of the parameters."""
        skeletons = []

        def make():
            model = Transformer(self.config.model, rngs=nnx.Rngs(self.config.seed))
            skeleton, params = split_model(model)
            skeletons.append(skeleton)
            return params

        params = jax.eval_shape(make)
        return skeletons[0], params

    def state(self) -> dict:
        """The shapes of the state, and how they lie on the devices."""
        skeleton, params = self._model
        optimizer = make_optimizer(self.config.optimizer, self.config.total_steps)
        state = {
            "params": params,
            "optimizer": jax.eval_shape(optimizer.init, params),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        if self.mesh is None:
            return state
        return jax.tree.map(_place, state, state_shardings(state, skeleton.axes, self.mesh))

    def batch(self) -> dict:
        """The shapes of a batch, likewise."""
        stage, parts = self.config.stages[self.stage], self.config.accumulation
        shape = parts, stage.batch_size // parts, stage.length
        types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, batch_spec(self.mesh))
        return {name: _place(x, sharding) for name, x in batch.items()}

    def function(self) -> Callable:
        """What `make_step` makes of it."""
        skeleton, _ = self._model
        optimizer, steps = self.config.optimizer, self.config.total_steps
        return make_step(
            skeleton, make_optimizer(optimizer, steps), make_schedule(optimizer, steps),
            self.config.stages[self.stage].top_k, self.mesh, self.config.implementation,
            self.config.mesh.sequence_strategy,
        )  # fmt: skip


def _place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


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


def make_plan(config: TrainConfig, stage: int, target: str, devices: int | None = None) -> Plan:
    """Compiles a training step, which takes minutes, and counts what it takes.

    Args:
      config: of the training.
      stage: its number.
      target: of TPUs a slice, one of TPU_TARGETS; of GPUs their number, too: h100x8, h200x16.
      devices: of a slice, the first so many; None for all.

    Raises:
      ConfigError: the target, its chips or the stage do not exist, its compiler is missing, or the
        mesh does not fit chips, model or batch.
    """
    kind, devices = parse_target(target, devices)
    try:
        chips = list(target_mesh(kind, devices).devices.flat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"target={target!r}: {error}") from error
    step = Step(config, stage, make_mesh(config.mesh, chips))
    state, batch = step.state(), step.batch()
    with dispatch.targeting(chips[0]):
        traced = jax.make_jaxpr(step.function())(state, batch)
    sizes = {} if step.mesh is None else dict(step.mesh.shape)
    groups = sizes.get("data", 1) * sizes.get("fsdp", 1)
    plan = Plan(
        chip=chips[0].device_kind,
        chip_bytes=_CHIP_BYTES[kind.partition(":")[0]],
        devices=len(chips),
        tokens=config.stages[stage].length // sizes.get("seq", 1),
        sequences=config.stages[stage].batch_size // config.accumulation // groups,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"])),
        parameter_bytes=_bytes(state["params"]),
        optimizer_bytes=_bytes(state["optimizer"]),
        batch_bytes=_bytes(batch),
        temporary_bytes=None,
        program_bytes=None,
        sent_bytes={},
        operations=count_operations(traced.jaxpr),
        kernels={},
        problem=None,
    )
    try:
        compilation = compile_for(
            kind, step.function(), state, batch, devices=devices, mesh=step.mesh, donate_argnums=0
        )
    except MemoryExceededError as error:
        return dataclasses.replace(plan, problem=str(error))
    memory: Any = compilation.executable.memory_analysis()
    names = sorted(kernel.name for kernel in compilation.kernels)
    plan = dataclasses.replace(
        plan,
        temporary_bytes=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        sent_bytes=Program(compilation.executable.as_text() or "", _rounds(step, plan)).sent(),
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


def _rounds(step: Step, plan: Plan) -> int:
    """Rounds of dispatch in a layer where choices are even; 1 where sequences are whole."""
    sizes, model = ({} if step.mesh is None else step.mesh.shape), step.config.model
    count = step.config.stages[step.stage].top_k
    rounds = plan_rounds(
        sizes.get("seq", 1), plan.sequences, plan.tokens,
        model.num_heads // sizes.get("tensor", 1), model.head_dim,
        model.attention.top_k if count is None else count,
    )  # fmt: skip
    return rounds.expected


def way_out(config: TrainConfig, plan: Plan) -> str:
    """What to try first where a plan does not fit."""
    if plan.sequences > 1:
        fewer = next(n for n in range(2, plan.sequences + 1) if plan.sequences % n == 0)
        return f"use --accumulation {config.accumulation * fewer}"
    if config.model.remat == "none":
        return "use --model.remat layer"
    if config.model.remat == "layer":
        return "use --model.remat repetition, where layers repeat, or a larger slice"
    return "use shorter sequences, or a larger slice with as many more sequences"
