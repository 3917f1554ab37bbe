"""Times of the attention op and its parts against dense attention, over lengths.

Nothing gets a time whose outputs differ from the reference: first at a short length, then at each
length that is timed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax.benchmarks import cases, reference, rooflines, runner
from sparsex_jax.benchmarks.cases import Case, Inputs
from sparsex_jax.benchmarks.names import Direction, Part, Selection
from sparsex_jax.benchmarks.reference_keys import fetch
from sparsex_jax.benchmarks.runner import BAD, Row, judge, require_positive, require_some
from sparsex_jax.benchmarks.timing import Timing, compile_program, measure
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.config import AttentionConfig

LIKELY_SHARE = 0.5  # of the roofline, for dense attention of which nothing is known yet


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      lengths: tokens, ascending.
      parts: of the op.
      directions: forward alone, or with the backward pass.
      query_heads: Hq.
      kv_heads: Hkv.
      head_dim: D.
      implementation: of the primitives; None picks by platform.
      selection: of blocks; see `Workload`.
      samples: times taken for each row, at most.
      seconds: time budget of a row.
      dense_seconds: dense attention that would take longer is measured with one head.
      check_length: where everything is compared before anything is timed; None for nowhere.
      seed: of the inputs.
    """

    lengths: tuple[int, ...]
    parts: tuple[Part, ...]
    directions: tuple[Direction, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    implementation: str | None
    selection: Selection
    samples: int
    seconds: float
    dense_seconds: float
    check_length: int | None
    seed: int

    def __post_init__(self):
        require_some(self, "lengths", "parts", "directions")
        require_positive(self, "samples", "seconds", "dense_seconds")
        for length in (*self.lengths, *([self.check_length] if self.check_length else [])):
            for case in cases.find_cases(self.parts, "forward"):
                cases.implementation_of(case, self.workload(length))

    def workload(self, length: int) -> Workload:
        """The shapes at a length."""
        return Workload(
            length, self.query_heads, self.kv_heads, self.head_dim, selection=self.selection,
            implementation=self.implementation, seed=self.seed,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What the rows have in common, for the results file; the rest stands in them."""
        return {
            "attention": dataclasses.asdict(AttentionConfig()),
            "dtype": "bfloat16",
            "samples": self.samples,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "check_length": self.check_length,
            "seed": self.seed,
        }


class Step(NamedTuple):
    """A row to measure."""

    case: Case
    length: int
    direction: Direction


class Measurement(NamedTuple):
    """What was found out about a program.

    Attributes:
      errors: differences from the reference.
      recall: of a search that may miss blocks, the share of the best ones found; None otherwise.
      timing: None if they are too large.
      temporaries: bytes.
      moved: bytes of inputs and outputs, the least that must be read and written.
    """

    errors: list[reference.Error]
    recall: float | None
    timing: Timing | None
    temporaries: int
    moved: int

    @property
    def equal(self) -> bool:
        """Whether rounding explains all differences."""
        return all(error.value <= error.tolerance for error in self.errors)

    def largest(self, of: str) -> float | None:
        """The largest finite difference of a kind; None if there is none, or one is not finite."""
        values = [error.value for error in self.errors if error.of == of]
        return max(values) if values and np.isfinite(values).all() else None


def _cotangents(work: Workload, outputs, tokens: np.ndarray | None) -> tuple[jax.Array, ...]:
    """Random ones, [1, T, ...] each; zero but at `tokens`, if these are given."""
    if tokens is None:
        return tuple(work.random("cotangent", x, i) for i, x in enumerate(outputs))
    rng = np.random.default_rng(work.seed)
    made = []
    for x in outputs:
        values = jnp.asarray(rng.standard_normal((len(tokens), *x.shape[2:])), x.dtype)
        made.append(jnp.zeros(x.shape, x.dtype).at[0, tokens].set(values))
    return tuple(made)


def _compare(
    case: Case, work: Workload, inputs: Inputs, run: Callable, outputs: Any, forward: bool
) -> tuple[list[reference.Error], float | None]:
    """Errors and recall of a program, run once; all that it made is gone afterwards."""
    tokens = reference.choose_tokens(case, work, inputs)
    cotangents = () if forward else _cotangents(work, outputs, tokens)
    computed, indices, *gradients = run(inputs) if forward else run(inputs, cotangents)
    rows = reference.Rows(
        tokens,
        tuple(fetch(x, tokens) for x in computed),
        tuple(np.asarray(x[0, tokens]) for x in indices),
        tuple(fetch(x, tokens) for x in cotangents),
        gradients[0] if gradients else {},
    )
    recall = None
    if case.part == "selection_in_nodes":
        recall = reference.recall(work, inputs, rows)
    return reference.compare(case, work, inputs, rows), recall


def measure_case(
    case: Case, work: Workload, direction: Direction, samples: int, seconds: float
) -> Measurement:
    """Compiles a case, compares it with the reference and, if equal, times it.

    Args:
      case: what to run.
      work: its shapes.
      direction: forward alone, or with the backward pass.
      samples: times to take, at most; 0 for none.
      seconds: budget for them.

    Raises:
      OutOfMemory: from the compiler's count.
      JaxRuntimeError: from the device, also if it is out of memory.
    """
    forward = direction == "forward"
    specs = {name: work.spec(name) for name in case.inputs}
    outputs = jax.eval_shape(lambda inputs: case.function(work, inputs), specs)[0]
    operands = (specs,) if forward else (specs, outputs)
    run, temporaries = compile_program(cases.program(case, work, direction), *operands)
    made = jax.eval_shape(cases.program(case, work, direction), *operands)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, made)))

    inputs = work.make(case.inputs)
    errors, recall = _compare(case, work, inputs, run, outputs, forward)
    found = Measurement(errors, recall, None, temporaries, moved)
    if not samples or not found.equal:
        return found
    arguments = (inputs,) if forward else (inputs, _cotangents(work, outputs, None))
    return found._replace(timing=measure(lambda: run(*arguments), samples, seconds))


class Benchmark(runner.Benchmark[Step]):
    """Times the cases of `settings` as far as they are right; see `runner.Benchmark`."""

    name = "attention"
    fields = (
        "overlap", "milliseconds", "milliseconds_q1", "milliseconds_q3", "samples",
        "calls_per_sample", "speedup_over_dense", "teraflops_per_second", "gigabytes_per_second",
        "roofline_share", "peak_bytes", "recall", "max_error", "gradient_error",
        "measured_heads", "status", "note",
    )  # fmt: skip

    def __init__(self, settings: Settings, path: Path, command: str, *, resume: bool = False):
        super().__init__(settings.describe(), path, command, resume=resume)
        self.settings = settings
        self.bad: dict[tuple[str, str, str], Row] = {}  # what the short length has shown
        self.chip = rooflines.find_chip(jax.devices()[0].device_kind)

    def checks(self) -> list[Step]:
        """What to compare at the short length, unless it is timed there anyway."""
        length = self.settings.check_length
        if not length or length >= self.settings.lengths[0]:
            return []
        return [step for step in self._steps((length,)) if self._timed_later(step)]

    def all_steps(self) -> list[Step]:
        """A step for each row, in order."""
        return self._steps(self.settings.lengths)

    def _steps(self, lengths: tuple[int, ...]) -> list[Step]:
        return [
            Step(case, length, direction)
            for length in lengths
            for direction in self.settings.directions
            for case in cases.find_cases(self.settings.parts, direction)
        ]

    def _timed_later(self, check: Step) -> bool:
        name = check.case.system, check.case.part
        return any((x.case.system, x.case.part) == name for x in self.steps())

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        case, settings, work = step.case, self.settings, self.settings.workload(step.length)
        return {
            "system": case.system,
            "part": case.part,
            "direction": step.direction,
            "tokens": step.length,
            "query_heads": settings.query_heads,
            "kv_heads": settings.kv_heads,
            "head_dim": settings.head_dim,
            "selection": settings.selection if cases.depends_on_selection(case) else None,
            "implementation": cases.implementation_of(case, work),
        }

    def check(self, step: Step) -> None:
        """Compares at the short length: what differs or fails there is not timed elsewhere."""
        work = self.settings.workload(step.length)
        try:
            found = measure_case(step.case, work, step.direction, 0, 0)
            status = "measured" if found.equal else "wrong"
            note = describe_errors(found.errors)
        except Exception as error:
            status, note = judge(error)
        if status in BAD:
            key = step.case.system, step.case.part, step.direction
            self.bad[key] = {"status": status, "note": f"at {step.length} tokens: {note}"}

    def run(self, step: Step) -> Row:
        """The fields beyond `identity`: times and rates, or why there are none."""
        key = step.case.system, step.case.part, step.direction
        return self.bad.get(key) or self._measured(step)

    def _measured(self, step: Step) -> Row:
        settings, case = self.settings, step.case
        work, full = settings.workload(step.length), settings.workload(step.length)
        note = None
        if cases.is_dense(case) and self._predict_dense(step, full) > settings.dense_seconds:
            work = dataclasses.replace(full, query_heads=1, kv_heads=1)
            note = f"measured with 1 of {full.query_heads} query heads; times and bytes scaled up"
        factor = full.query_heads / work.query_heads
        found = measure_case(case, work, step.direction, settings.samples, settings.seconds)
        row: Row = {
            "overlap": work.overlap if cases.depends_on_selection(case) else None,
            "recall": found.recall,
            "max_error": found.largest("outputs"),
            "gradient_error": found.largest("norm"),
            "measured_heads": work.query_heads,
        }
        if found.timing is None:
            return row | {"status": "wrong", "note": describe_errors(found.errors)}
        q1, median, q3 = (factor * x for x in found.timing.quartiles())
        operations = cases.count_operations(case, full, step.direction)
        moved, seconds = factor * found.moved, median / 1e3
        least = self.chip and rooflines.least_seconds(operations, moved, self.chip)
        return row | {
            "milliseconds": median,
            "milliseconds_q1": q1,
            "milliseconds_q3": q3,
            "samples": len(found.timing.seconds),
            "calls_per_sample": found.timing.calls,
            "speedup_over_dense": self._speedup(step, median),
            "teraflops_per_second": operations / seconds / 1e12,
            "gigabytes_per_second": moved / seconds / 1e9,
            "roofline_share": least and least / seconds,
            "peak_bytes": int(factor * found.temporaries),
            "status": "measured",
            "note": note,
        }

    def _dense_rows(self, direction: Direction) -> list[Row]:
        """Dense attention of these shapes that was measured, by length."""
        wanted = {
            "direction": direction,
            "query_heads": self.settings.query_heads,
            "kv_heads": self.settings.kv_heads,
            "head_dim": self.settings.head_dim,
            "status": "measured",
        }
        found = [
            row
            for row in self.rows
            if row["system"] == f"dense_{cases.dense_library()}" and wanted.items() <= row.items()
        ]
        return sorted(found, key=lambda row: row["tokens"])

    def _predict_dense(self, step: Step, work: Workload) -> float:
        """Seconds of a call: from the last length, by N^2, or else from the chip's ceiling."""
        before = [row for row in self._dense_rows(step.direction) if row["tokens"] < step.length]
        if before:
            last = before[-1]
            return last["milliseconds"] / 1e3 * (step.length / last["tokens"]) ** 2
        if self.chip is None:
            return 0.0
        operations = cases.count_operations(step.case, work, step.direction)
        return operations / (LIKELY_SHARE * self.chip.tflops * 1e12)

    def _speedup(self, step: Step, milliseconds: float) -> float | None:
        """Of an op; its parts alone do not do what dense attention does."""
        if step.case.part != "op":
            return None
        if cases.is_dense(step.case):
            return 1.0
        dense = [row for row in self._dense_rows(step.direction) if row["tokens"] == step.length]
        return dense[-1]["milliseconds"] / milliseconds if dense else None


def describe_errors(errors: list[reference.Error]) -> str:
    """The largest difference, measured by what rounding may make it, in words."""
    worst = max(errors, key=lambda error: error.value / error.tolerance)
    what = {"outputs": "outputs", "gradients": "gradients", "norm": "gradients (in norm)"}[worst.of]
    return f"{what} differ from the reference by {worst.value:.3g}, over {worst.tolerance:g}"
