"""How the kernels are cut unless they are tuned, and what `sparsex tune` tries."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from pallas_kernels import hopper, tuning
from pallas_kernels.range_attention.mosaic_gpu.key_walk import (
    forward_scratch,
    query_gradient_scratch,
)
from pallas_kernels.range_attention.mosaic_gpu.plan import Config, Sizes
from pallas_kernels.range_attention.mosaic_gpu.query_walk import QueryWalk

# Steps, stages, places. A step is a multiple of 64, for wgmma; the longer ones that are missing
# here spill registers with 8 query heads per KV head (docs/log.md).
_GRIDS = {
    ("forward", 64): ((64, 128), (2, 4, 6, 8), (2, 3)),
    ("forward", 128): ((64,), (2, 3, 4, 5), (1, 2)),
    ("query_gradient", 64): ((64,), (2, 4, 6, 8), (1, 2, 3)),
    ("query_gradient", 128): ((64,), (2, 3, 4), (1, 2)),
    ("key_gradients", 64): ((64, 128), (2, 3, 4, 6, 8), (2,)),
    ("key_gradients", 128): ((64,), (2, 3, 4), (2,)),
}
_WIDE = Config(stages=2, places=1)
# Where keys have a bias they are landmarks, a few for each query: tiles of 192 rows were slower.
_BIASED = Config(stages=4)
_SCRATCH = {
    "forward": forward_scratch,
    "query_gradient": query_gradient_scratch,
    "key_gradients": QueryWalk.scratch,
}


def _default(function: str, head_dim: int) -> Config:
    if function == "forward":
        return {64: Config(stages=4), 128: Config(stages=3, computing=3)}.get(head_dim, _WIDE)
    if function == "query_gradient":
        return Config(stages=4 if head_dim == 64 else 2)
    return Config(stages=4 if head_dim == 64 else 3)


def _grid(function: str, head_dim: int) -> Iterator[Config]:
    yield dataclasses.replace(_default(function, head_dim), programs=2 * hopper.MULTIPROCESSORS)
    if function == "forward" and head_dim <= 128:
        # A tile of keys serves half as many rows more.
        yield Config(stages=3, computing=3)
    for cut in itertools.product(*_GRIDS.get((function, head_dim), ((), (), ()))):
        yield Config(*cut)


def _scratch(function: str, head_dim: int, config: Config):
    """Of calls with a bias; other sizes do not matter."""
    return _SCRATCH[function](Sizes(1, 8, 8, head_dim, 8, 1, 1.0, True, config.computing), config)


KERNELS = {
    function: tuning.Kernel(
        "range_attention",
        function,
        (64, 128, 256) if function == "forward" else (64, 128),
        *(functools.partial(f, function) for f in (_default, _grid, _scratch)),
        reduces=function != "query_gradient",
    )
    for function in _SCRATCH
}


def config_for(function: str, head_dim: int, *, biased: bool = False) -> Config:
    """How "forward", "query_gradient" or "key_gradients" is cut, to fit shared memory.

    Args:
      function: one of them.
      head_dim: D.
      biased: whether keys have a bias; forward has its own, untuned config then.
    """
    if function == "forward" and biased and head_dim <= 128:
        return _BIASED
    return tuning.choose(KERNELS[function], head_dim)
