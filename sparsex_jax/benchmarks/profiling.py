"""Where the time of the attention op, or of a part of it, goes: the GPU's kernels in one call."""

import collections
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sparsex_jax.benchmarks import cases
from sparsex_jax.benchmarks.cases import Case
from sparsex_jax.benchmarks.names import Direction
from sparsex_jax.benchmarks.timing import compile_program, measure
from sparsex_jax.benchmarks.workload import Workload

SAMPLES, SECONDS = 8, 1.0  # of the time without profiler


class Profile(NamedTuple):
    """What was seen of a program.

    Attributes:
      milliseconds: of a call without profiler, the median.
      temporaries: bytes.
      kernels: milliseconds of each launch in one call, by kernel; the one that took longest first.
    """

    milliseconds: float
    temporaries: int
    kernels: dict[str, list[float]]


def profile_case(case: Case, work: Workload, direction: Direction) -> Profile:
    """Compiles a case, times it, and profiles one call of it. Nothing is compared.

    Args:
      case: what to run.
      work: its shapes.
      direction: forward alone, or with the backward pass.

    Raises:
      OutOfMemory: from the compiler's count.
    """
    specs = {name: work.spec(name) for name in case.inputs}
    shapes: tuple[Any, ...] = (specs,)
    operands: tuple[Any, ...] = (work.make(case.inputs),)
    if direction == "forward_backward":
        outputs = jax.eval_shape(lambda inputs: case.function(work, inputs), specs)[0]
        shapes = (specs, outputs)
        cotangents = tuple(work.random("cotangent", x, i) for i, x in enumerate(outputs))
        operands = (*operands, cotangents)
    run, temporaries = compile_program(cases.program(case, work, direction), *shapes)
    jax.block_until_ready(run(*operands))
    _, median, _ = measure(lambda: run(*operands), SAMPLES, SECONDS).quartiles()
    return Profile(median, temporaries, _profile(lambda: run(*operands)))


def _profile(call: Callable[[], Any]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        return kernel_times(jax.profiler.ProfileData.from_file(str(path)).planes)


def kernel_times(planes: Iterable[Any]) -> dict[str, list[float]]:
    """`Profile.kernels` of the planes of a `jax.profiler.ProfileData`."""
    times = collections.defaultdict(list)
    for plane in planes:
        for line in plane.lines if "/device:GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                times[event.name].append(event.duration_ns / 1e6)
    return dict(sorted(times.items(), key=lambda item: -sum(item[1])))
