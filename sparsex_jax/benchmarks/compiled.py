"""The attention op and its parts compiled for TPUs that are not here: memory, and modelled times.

Nothing runs, so nothing is compared or timed, and no row has milliseconds.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import ahead_of_time, dispatch
from pallas_kernels.ahead_of_time import TPU_TARGETS
from sparsex_jax.benchmarks import cases, rooflines, runner, tpu_model
from sparsex_jax.benchmarks.cases import Case
from sparsex_jax.benchmarks.names import Direction, Part
from sparsex_jax.benchmarks.results import compiled_for
from sparsex_jax.benchmarks.runner import Row, require_some
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.config import AttentionConfig, ConfigError

DEFAULT = "v5e:2x4"  # what "v5e" alone means
PATH = Path("results") / "tpu-v5e" / "attention.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled.

    Attributes:
      target: one of TPU_TARGETS.
      lengths: tokens of each chip, ascending.
      parts: of the op.
      directions: forward alone, or with the backward pass.
      query_heads: Hq, of each chip.
      kv_heads: Hkv, of each chip.
      head_dim: D.
      implementation: of the primitives; None picks for the target.
    """

    target: str
    lengths: tuple[int, ...]
    parts: tuple[Part, ...]
    directions: tuple[Direction, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    implementation: str | None

    def __post_init__(self):
        if self.target not in TPU_TARGETS:
            raise ConfigError(
                f"target={self.target!r} must be v5e or one of {', '.join(TPU_TARGETS)}:"
                " use v5e, say"
            )
        require_some(self, "lengths", "parts", "directions")
        with self.choosing():
            for length in self.lengths:
                for case in _find_cases(self.parts, "forward"):
                    cases.implementation_of(case, self.workload(length))

    def mesh(self) -> jax.sharding.Mesh:
        """The target's chips.

        Raises:
          ConfigError: its compiler is not installed.
        """
        try:
            return ahead_of_time.target_mesh(self.target)
        except RuntimeError as error:
            raise ConfigError(f"target={self.target!r}: {error}") from error

    def choosing(self):
        """A context in which implementations are chosen for the target."""
        return dispatch.targeting(self.mesh().devices.flat[0])

    def workload(self, length: int) -> Workload:
        """The shapes of a chip."""
        return Workload(
            length, self.query_heads, self.kv_heads, self.head_dim,
            implementation=self.implementation,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What the rows have in common, for the results file; the rest stands in them."""
        return {
            "attention": dataclasses.asdict(AttentionConfig()),
            "dtype": "bfloat16",
            "lengths_are": "of each chip, which has its own sequence and heads (shard_map)",
            "method": tpu_model.METHOD,
        }


class Step(NamedTuple):
    """A row to compile."""

    case: Case
    length: int
    direction: Direction


def _find_cases(parts: tuple[Part, ...], direction: Direction) -> list[Case]:
    """Those of this library; what others would do there is for a TPU to say."""
    return [case for case in cases.find_cases(parts, direction) if case.system == "sparsex"]


def compile_case(
    target: str, mesh: jax.sharding.Mesh, case: Case, work: Workload, direction: Direction
) -> tuple[ahead_of_time.Compilation, int]:
    """Compiles a case for all chips of a target, each with its own inputs.

    Args:
      target: of `pallas_kernels.ahead_of_time`.
      mesh: its chips.
      case: what to compile.
      work: the shapes of a chip.
      direction: forward alone, or with the backward pass.

    Returns:
      The compilation, and the bytes of a chip's inputs and outputs.
    """
    program = cases.program(case, work, direction)
    specs = {name: work.spec(name) for name in case.inputs}
    with dispatch.targeting(mesh.devices.flat[0]):
        outputs = jax.eval_shape(lambda inputs: case.function(work, inputs), specs)[0]
        operands = (specs,) if direction == "forward" else (specs, outputs)
        results = jax.eval_shape(program, *operands)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, results)))
    chips = PartitionSpec(mesh.axis_names)
    spread = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (mesh.size, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, chips)
        ),
        operands,
    )

    def on_all_chips(*operands):
        return jax.shard_map(program, in_specs=chips, out_specs=chips)(*operands)

    return ahead_of_time.compile_for(target, on_all_chips, *spread), moved


class Benchmark(runner.Benchmark[Step]):
    """Compiles the cases of `settings`; see `runner.Benchmark`."""

    name = "attention"
    fields = (
        "milliseconds", "argument_bytes", "output_bytes", "temporary_bytes", "peak_bytes",
        "roofline_milliseconds", "modelled_milliseconds", "kernel_milliseconds",
        "xla_milliseconds", "bundles", "spill_stores", "spill_loads", "status", "note",
    )  # fmt: skip

    def __init__(self, settings: Settings, path: Path, command: str, *, resume: bool = False):
        self.settings, self.mesh = settings, settings.mesh()
        super().__init__(settings.describe(), path, command, resume=resume)

    def hardware(self) -> dict[str, Any]:
        """What was compiled for; no such chip was there."""
        return compiled_for(self.mesh.devices.flat[0])

    def all_steps(self) -> list[Step]:
        """A step for each row, in order."""
        return [
            Step(case, length, direction)
            for length in self.settings.lengths
            for direction in self.settings.directions
            for case in _find_cases(self.settings.parts, direction)
        ]

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        settings = self.settings
        with settings.choosing():
            implementation = cases.implementation_of(step.case, settings.workload(step.length))
        return {
            "system": step.case.system,
            "part": step.case.part,
            "direction": step.direction,
            "target": settings.target,
            "chips": self.mesh.size,
            "tokens": step.length,
            "query_heads": settings.query_heads,
            "kv_heads": settings.kv_heads,
            "head_dim": settings.head_dim,
            "implementation": implementation,
        }

    def run(self, step: Step) -> Row:
        """The fields beyond `identity`."""
        settings, case = self.settings, step.case
        work = settings.workload(step.length)
        compilation, moved = compile_case(settings.target, self.mesh, case, work, step.direction)
        chip = rooflines.find_chip(self.mesh.devices.flat[0].device_kind)
        assert chip is not None
        operations = cases.count_operations(case, work, step.direction)
        row: Row = {
            "argument_bytes": compilation.argument_bytes,
            "output_bytes": compilation.output_bytes,
            "temporary_bytes": compilation.temporary_bytes,
            "peak_bytes": compilation.peak_bytes,
            "roofline_milliseconds": 1e3 * rooflines.least_seconds(operations, moved, chip),
            "status": "compiled",
            "note": "compiled, not run",
        }
        try:
            kernels, xla = tpu_model.model(compilation, work, chip)
        except ValueError as error:
            return row | {"note": f"{row['note']}; no modelled time: {error}"}
        return (
            row
            | tpu_model.count_bundles(compilation)
            | {
                "modelled_milliseconds": 1e3 * (kernels + xla),
                "kernel_milliseconds": 1e3 * kernels,
                "xla_milliseconds": 1e3 * xla,
            }
        )
