"""Runs Mosaic TPU kernels on the CPU: `interpret`.

JAX's interpreter simulates HBM, VMEM, SMEM, copies and semaphores. Memory is NaN before it is
written and reads out of bounds raise. Copies are made when they are awaited, or at once: a kernel
that reads too early is wrong in the first mode, one that overwrites too early in the second.

Races are printed ("RACE DETECTED"), for what JAX has in a variable is of the last kernel only. They
are seen when copies are made at once; not those of two copies that signal the same semaphore.
"""

import contextlib
import types

import jax.experimental.pallas.tpu as pltpu

from pallas_kernels import dispatch
from tests.pallas_kernels.host_callbacks import with_numpy

# What the kernels are chosen for.
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
MODES = ("on_wait", "eager")  # when copies are made


@contextlib.contextmanager
def interpret(mode="on_wait", *, detect_races=False):
    """Runs the Mosaic TPU kernels that are traced in this context on the CPU.

    They are chosen as on a TPU v5e. A function that was traced outside must be traced anew.
    """
    params = pltpu.InterpretParams(
        dma_execution_mode=mode,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        detect_races=detect_races,
        random_seed=0,  # axes of a grid that are "parallel" run in a random order
    )
    try:
        with pltpu.force_tpu_interpret_mode(params), dispatch.targeting(TPU), with_numpy():
            yield
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()  # else the next kernel fails, too
        raise
