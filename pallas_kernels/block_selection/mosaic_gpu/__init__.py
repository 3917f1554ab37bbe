"""Selection of the best blocks on Hopper GPUs (Pallas Mosaic GPU, sm_90): exact, in two kernels.

The first finds for each query the K best groups of 8 neighbouring blocks, by the best score of
each (`search`); the K best blocks lie in them. The second scores the blocks of those groups
(`rescoring`). Scores of all blocks never reach device memory.

In two levels, both kernels find the nodes, and the second one scores the groups of those.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import hopper, shapes, tuning
from pallas_kernels.block_selection import two_levels, xla
from pallas_kernels.block_selection.gradients import select_bwd
from pallas_kernels.block_selection.mosaic_gpu import rescoring, search
from pallas_kernels.block_selection.mosaic_gpu.configs import (
    GROUP,
    MOST,
    MOST_GROUPS,
    MOST_LISTED,
    Config,
    Sizes,
    grid,
)
from pallas_kernels.block_selection.mosaic_gpu.few_queries import select_few
from pallas_kernels.hopper import HALF
from pallas_kernels.hopper_few_queries import takes


def _scratch(dim: int, config: Config):
    """That of the kernel and the number of blocks which need most."""
    scratches = [
        kernel.scratch(Sizes(1, 8, 1, dim, count, count), config)
        for kernel in (search, rescoring)
        for count in (MOST_LISTED, MOST)
    ]
    return max(scratches, key=functools.partial(hopper.shared_memory, reduces=True))


KERNELS = {
    "select": tuning.Kernel(
        "block_selection",
        "select",
        (64, 128),
        default=lambda dim: Config(stages=2 if dim <= 64 else 3),
        grid=grid,
        scratch=_scratch,
        reduces=True,
    )
}


def config_for(dim: int) -> Config:
    """How the kernels are cut for features of a width."""
    return tuning.choose(KERNELS["select"], dim)


def _width(count: int) -> int:
    """The number of blocks, or of groups, that the kernels take for one."""
    return 8 if count <= 8 else -(-count // 16) * 16


def select(u, c, limit, start, *, count: int, config: Config):
    """index int32 and score f32 [B, T, Hkv, count].

    Args:
      u: [B, T, Hkv, d].
      c: [B, Nb, Hkv, d].
      limit: int32 [B, T], at most Nb; T is a multiple of 64, Nb of 8.
      start: int32 [B, T], at least 0.
      count: K, at most 64.
      config: of the kernels.
    """
    width = _width(count)
    sizes = Sizes(*u.shape, width, width)
    group = search.find_groups(u, c, limit, start, sizes, config)
    found = rescoring.score_groups(u, c, group, limit, start, sizes, config)
    index, score = (x[..., :count] for x in found)
    return index, score


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _select(u, c, limit, start, count):
    tokens = u.shape[1]
    c = shapes.pad(c, 1, GROUP)
    if takes(u):
        find = functools.partial(select_few, count=count)
        return shapes.batchable(find)(u, c, limit, start)
    # Whole tiles of queries: what a copy has past the end of a row falls into the next.
    u, limit, start = (shapes.pad(x, 1, HALF) for x in (u, limit, start))
    config = config_for(u.shape[3])
    find = shapes.batchable(functools.partial(select, count=count, config=config))
    index, score = find(u, c, limit, start)
    return index[:, :tokens], score[:, :tokens]


def _select_fwd(u, c, limit, start, count):
    results = _select(u, c, limit, start, count)
    index, score = checkpoint_name(results, "block_selection")
    return (index, score), (u, c, index)


_select.defvjp(_select_fwd, select_bwd)


def select_blocks(u, c, limit, start, count):
    """See `pallas_kernels.block_selection.select_blocks`; `limit` and `start` are int32 [B, T]."""
    if 0 in (*u.shape, c.shape[1], count):
        return xla.select_blocks(u, c, limit, start, count)
    return _select(u, c, jnp.minimum(limit, c.shape[1]), jnp.maximum(start, 0), count)


def unfit_in_nodes(u, count: int, node_size: int, beam: int) -> str | None:
    """Why so many nodes of a query cannot be expanded, or None if they can."""
    if takes(u):
        return None
    dim = u.shape[3]

    def needed(groups):
        sizes = Sizes(1, 8, 1, dim, _width(count), groups)
        scratch = rescoring.scratch(sizes, config_for(dim))
        return hopper.shared_memory(scratch, reduces=True)

    fits = (n for n in range(16, MOST_GROUPS + 1, 16) if needed(n) <= hopper.SHARED_MEMORY)
    most = max(fits) * GROUP // node_size - 2
    if beam <= most:
        return None
    return f"expands up to {most} nodes of {node_size} blocks, not {beam}"


def _best_of_groups(u, c, group, limit, start, *, count: int):
    sizes = Sizes(*u.shape, _width(count), group.shape[3])
    index, score = rescoring.score_groups(u, c, group, limit, start, sizes, config_for(u.shape[3]))
    return index[..., :count], score[..., :count]


def best_of_nodes(u, c, expanded, limit, start, count, node_size):
    """index int32 and score f32 [B, T, Hkv, K]; arguments as of `xla.best_of_nodes`."""
    if takes(u):
        return xla.best_of_nodes(u, c, expanded, limit, start, count, node_size)
    tokens, node = u.shape[1], expanded[..., None]
    group = node * (node_size // GROUP) + jnp.arange(node_size // GROUP, dtype=jnp.int32)
    group = jnp.where(node >= 0, group, -1).reshape(*expanded.shape[:3], -1)
    group = shapes.pad(group, 3, _width(group.shape[3]), fill=-1)
    # As in `_select`.
    u, limit, start = (shapes.pad(x, 1, HALF) for x in (u, limit, start))
    group = shapes.pad(group, 1, HALF, fill=-1)
    find = shapes.batchable(functools.partial(_best_of_groups, count=count))
    index, score = find(u, shapes.pad(c, 1, node_size), group, limit, start)
    return index[:, :tokens], score[:, :tokens]


select_blocks_in_nodes = functools.partial(
    two_levels.select, two_levels.Levels(select_blocks, best_of_nodes)
)
