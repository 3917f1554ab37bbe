"""A count of kernels that JAX puts into each: programs that it compiles must do without it."""

import contextlib
import os
from collections.abc import Iterator

from jaxlib.mosaic.python import mosaic_gpu

_NAME = "get_or_set_dump_options"  # of the function that counts; None stands for no dumps
_counting = False


def leave_out() -> None:
    """Keeps a count of kernels out of what JAX compiles.

    JAX 0.11.2 writes into each Mosaic GPU kernel what its dumps would be called: its name, and how
    many kernels the process had lowered before. So a program has another key in the cache in every
    process that did something else first: a training that is resumed, say, compiles again what it
    had compiled already. Where dumps are asked for (MOSAIC_GPU_DUMP_...), nothing changes.
    """
    count = getattr(mosaic_gpu, _NAME, None)
    if count is None or any(name.startswith("MOSAIC_GPU_DUMP_") for name in os.environ):
        return
    setattr(mosaic_gpu, _NAME, lambda module: count(module) if _counting else None)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Leaves the counts in: kernels that are lowered meanwhile are found in no cache."""
    global _counting
    was, _counting = _counting, True
    try:
        yield
    finally:
        _counting = was
