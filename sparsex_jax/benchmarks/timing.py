"""Compiling, and timing what was compiled."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

SHORTEST_SAMPLE = 0.05  # seconds: so many that launching and reading the clock do not count


class OutOfMemory(RuntimeError):
    """A program needs more memory than the device has."""


class Timing(NamedTuple):
    """Times of a call.

    Attributes:
      seconds: of one call, f64 [samples].
      calls: of which each sample is the mean.
    """

    seconds: np.ndarray
    calls: int

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile, in milliseconds."""
        q1, median, q3 = np.percentile(self.seconds * 1e3, (25, 50, 75))
        return float(q1), float(median), float(q3)


def device_memory() -> int:
    """Bytes that JAX may take on the first device; on a CPU, those of the machine."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compile_program(
    function: Callable, *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[Any, int]:
    """Compiles a function for the first device, without running it.

    Args:
      function: traceable by JAX.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      donate: which of them the program uses up.

    Returns:
      The program, and the bytes of its temporaries: those beyond its inputs and outputs, as
      `memory_analysis` of the compiler counts them.

    Raises:
      OutOfMemory: inputs, outputs and temporaries together exceed the device's memory. (A CPU
        would hand them out, and the system would then end the process.)
    """
    program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    analysis = program.memory_analysis()
    assert analysis is not None, "this back end does not count a program's memory"
    temporaries = analysis.temp_size_in_bytes
    needed = temporaries + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    needed -= analysis.alias_size_in_bytes
    available = device_memory()
    if needed > available:
        raise OutOfMemory(f"needs {needed / 2**30:.1f} of {available / 2**30:.1f} GiB")
    return program, temporaries


def _elapsed(call: Callable[[], Any], calls: int) -> float:
    """Seconds of several calls in a row; the device waits for nothing between them."""
    began = time.perf_counter()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return time.perf_counter() - began


def measure(call: Callable[[], Any], samples: int, budget: float) -> Timing:
    """Times a call that has run before.

    Args:
      call: without arguments; what it returns is waited for.
      samples: at most.
      budget: seconds; one sample is taken even if it takes longer.

    Returns:
      A sample is the mean of as many calls in a row as take SHORTEST_SAMPLE seconds.
    """
    first = _elapsed(call, 1)
    if first > budget:
        return Timing(np.array([first]), 1)
    # The first call may have been slow, so the number of calls is settled by a second try.
    calls = int(np.clip(np.ceil(SHORTEST_SAMPLE / first), 1, 1000))
    first = _elapsed(call, calls) / calls
    calls = int(np.clip(np.ceil(SHORTEST_SAMPLE / first), 1, 1000))
    count = int(np.clip(budget / (first * calls), 1, samples))
    return Timing(np.array([_elapsed(call, calls) / calls for _ in range(count)]), calls)
