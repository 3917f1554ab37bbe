"""Runs Mosaic TPU kernels on the CPU, as strictly as JAX's interpreter can."""

import contextlib
import types

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

# What the kernels are chosen for.
TPU = types.SimpleNamespace(platform="tpu", device_kind="interpreted TPU")


@contextlib.contextmanager
def interpret(*, detect_races=False, dma_execution_mode="on_wait"):
    """Runs the Mosaic TPU kernels that are traced in this context on the CPU.

    Memory is NaN before it is written, reads out of bounds raise. A function that was traced
    outside must be traced anew. A race, if they are to be detected, is printed.
    """
    params = pltpu.InterpretParams(
        detect_races=detect_races,
        dma_execution_mode=dma_execution_mode,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
    )
    try:
        with pltpu.force_tpu_interpret_mode(params), dispatch.targeting(TPU):
            yield
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()  # else the next kernel fails, too
        raise
