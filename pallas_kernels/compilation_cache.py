"""What lets JAX's persistent compilation cache find programs with Hopper kernels again."""

import os

from jaxlib.mosaic.python import mosaic_gpu


def leave_out_counts() -> None:
    """Keeps a count of kernels out of what JAX compiles.

    JAX 0.11.2 writes into each Mosaic GPU kernel what its dumps would be called: its name, and how
    many kernels the process had lowered before. So a program has another key in the cache in every
    process that did something else first; a training that is resumed, say, compiles for a minute
    what it had compiled already. Where dumps are asked for (MOSAIC_GPU_DUMP_...), nothing changes.
    """
    dumps = any(name.startswith("MOSAIC_GPU_DUMP_") for name in os.environ)
    if hasattr(mosaic_gpu, "get_or_set_dump_options") and not dumps:
        mosaic_gpu.get_or_set_dump_options = lambda module: None
