"""How long a program compiled for TPU v5e might take, from what its compiler says of it.

Nothing of this is a measurement, and nothing of it was compared with one.
"""

from typing import NamedTuple

from pallas_kernels.ahead_of_time import Compilation, TpuKernel
from sparsex_jax.benchmarks.hlo import Program
from sparsex_jax.benchmarks.rooflines import Chip
from sparsex_jax.benchmarks.trips import count_cycles
from sparsex_jax.benchmarks.workload import Workload

MATRIX_UNITS = 4  # of 128 x 128, of a TPU v5e
# Stands in results files.
METHOD = (
    "modelled, not measured. kernel_milliseconds: for each Pallas kernel the larger of two times,"
    " that of its static schedule (bundles times trip counts, a bundle a cycle of 1.5 GHz; waiting"
    " for copies and for the matrix unit is not in it) and that of its bytes at 820 GB/s."
    " xla_milliseconds: for the rest, the cycles that XLA estimates, and where it does not (sorts,"
    " gathers, some reshapes) the bytes of operands and results at 820 GB/s, which for sorts is far"
    " too little. Copies beside other work are not in it. modelled_milliseconds: the sum."
)
# Costs nothing, or runs beside other work.
_FREE = frozenset(
    "parameter constant bitcast get-tuple-element tuple after-all optimization-barrier copy-start"
    " copy-done slice-start slice-done async-start async-done async-update partition-id".split()
)


class Modelled(NamedTuple):
    """Seconds of a program.

    Attributes:
      kernels: of what is written by hand.
      xla: of the rest.
    """

    kernels: float
    xla: float


def model(compilation: Compilation, work: Workload, chip: Chip) -> Modelled:
    """See METHOD.

    Args:
      compilation: for TPU v5e.
      work: the sequence that a chip has.
      chip: v5e's ceilings.

    Raises:
      ValueError: the compiler did not say enough, or not as before.
    """
    clock = chip.tflops * 1e12 / (2 * MATRIX_UNITS * 128**2)
    bandwidth = chip.gigabytes * 1e9
    kernels = {x.instruction: x for x in _kernels(compilation)}
    by_hand = rest = 0.0
    text = compilation.executable.as_text() or ""
    for each, around, times in Program(text).executed():
        operands = [around[name] for name in each.operands if name in around]
        if kernel := kernels.get(each.name):
            if kernel.schedule is None:
                raise ValueError(f"the schedule of {kernel.name} is not known")
            shapes = [shape for x in operands for shape in x.shapes]
            cycles = count_cycles(kernel.name, kernel.schedule, shapes, work)
            moved = each.number("bytes_accessed") or 0
            by_hand += times * max(cycles / clock, moved / bandwidth)
        elif (estimate := each.number("estimated_cycles")) is not None:
            rest += times * estimate / clock
        elif each.opcode not in _FREE:
            rest += times * sum(x.bytes for x in (each, *operands)) / bandwidth
    return Modelled(by_hand, rest)


def _kernels(compilation: Compilation) -> list[TpuKernel]:
    return [x for x in compilation.kernels if isinstance(x, TpuKernel)]


def count_bundles(compilation: Compilation) -> dict[str, int | None]:
    """Fields of a row: bundles and spills in the code of all kernels, loops counted once."""
    found = [x.schedule for x in _kernels(compilation) if x.schedule is not None]
    return {
        "bundles": sum(x.body.total for x in found),
        "spill_stores": sum(x.spill_stores for x in found),
        "spill_loads": sum(x.spill_loads for x in found),
    }
