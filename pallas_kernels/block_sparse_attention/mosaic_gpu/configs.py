"""How the kernels are cut unless they are tuned, and what `sparsex tune` tries."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from pallas_kernels import hopper, tuning
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu.block_walk import BlockWalk
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import (
    forward_scratch,
    query_gradient_scratch,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import Config

# Stages, key stages, computing warpgroups. With one key stage forward and dQ would wait for ever,
# as would dQ with one stage for each warpgroup.
_GRIDS = {
    ("forward", 64): ((6, 12), (2, 3, 4), (2, 3)),
    ("forward", 128): ((4, 6, 8), (2, 3), (2, 3)),
    ("query_gradient", 64): ((6, 12), (2, 3, 4), (2, 3)),
    ("query_gradient", 128): ((4,), (2,), (2,)),
    ("key_gradients", 64): ((2, 4, 6, 8), (2, 4), (2,)),
    ("key_gradients", 128): ((2, 3, 4), (2, 3), (2,)),
}
_DEFAULTS = {
    ("forward", 64): Config(12, 3, computing=3),
    ("forward", 128): Config(6, 2, computing=3),
    ("query_gradient", 64): Config(6, 3, computing=3),
    ("query_gradient", 128): Config(4, 2),
    ("key_gradients", 64): Config(6),
    ("key_gradients", 128): Config(3),
}
_SCRATCH = {
    "forward": forward_scratch,
    "query_gradient": query_gradient_scratch,
    "key_gradients": BlockWalk.scratch,
}


def _default(function: str, head_dim: int) -> Config:
    return _DEFAULTS[function, head_dim]


def _grid(function: str, head_dim: int) -> Iterator[Config]:
    yield dataclasses.replace(_default(function, head_dim), programs=2 * hopper.MULTIPROCESSORS)
    for cut in itertools.product(*_GRIDS[function, head_dim]):
        config = Config(*cut)
        if function == "key_gradients" or config.stages % config.computing == 0:
            yield config


def _scratch(function: str, head_dim: int, config: Config):
    """Of calls with 8 query heads per KV head, whose tiles have the most entries."""
    return _SCRATCH[function](Sizes(1, 1, 8, head_dim, 64, 64, 1, 1, 1, 1.0), config)


KERNELS = {
    function: tuning.Kernel(
        "block_sparse_attention",
        function,
        (64, 128),
        *(functools.partial(f, function) for f in (_default, _grid, _scratch)),
        reduces=function != "key_gradients",
    )
    for function in _SCRATCH
}


def config_for(function: str, head_dim: int) -> Config:
    """How "forward", "query_gradient" or "key_gradients" is cut, to fit shared memory."""
    return tuning.choose(KERNELS[function], head_dim)
