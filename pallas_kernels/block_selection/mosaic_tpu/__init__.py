"""Selection of the best blocks on TPUs (Pallas Mosaic TPU, cut for v5e): exact, in one kernel.

The K best blocks lie in the K groups of 8 neighbouring blocks with the best maxima, and these in
the K supergroups of 8 neighbouring groups with the best maxima; of equal maxima, the lower. So a
tile of queries scores a chunk of blocks on the matrix unit, keeps the scores and both levels of
maxima in VMEM, and then descends: K supergroups, the K best of their groups, the K best of the
blocks in those and of what earlier chunks left. Scores of all blocks never reach device memory.

Queries lie along lanes, blocks along sublanes. XLA orders the blocks of each step of 512 so that
the members of a group, and the groups of a supergroup, are the same sublane of different
registers: a maximum over them is one operation on whole registers, and a descent is one gather
within a register and one select for 8 x 128 scores and 8 of the K.

In two levels, the kernel finds the nodes; XLA gathers and scores the blocks in them, as xla.py has
it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import shapes
from pallas_kernels.block_selection import two_levels, xla
from pallas_kernels.block_selection.gradients import select_bwd
from pallas_kernels.block_selection.mosaic_tpu.configs import GROUP, LANES, STEP, Config, Sizes
from pallas_kernels.block_selection.mosaic_tpu.search import search_tile

CONFIG = Config()


def _plan(start, limit, queries: int):
    """int32 [B x tiles, 1, 4]: of each tile of queries its first step, and the step after its last.

    Then the first, and the one after the last, that all of its queries see whole.
    """
    start, limit = (x.reshape(-1, queries) for x in (start, limit))
    some = start < limit
    last = jnp.max(jnp.where(some, limit, 0), axis=1)
    first = jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=1)
    first = jnp.minimum(first, last) // STEP
    stop = (last + STEP - 1) // STEP
    whole_first = jnp.clip((jnp.max(start, axis=1) + STEP - 1) // STEP, first, stop)
    whole_stop = jnp.clip(jnp.min(limit, axis=1) // STEP, whole_first, stop)
    return jnp.stack([first, stop, whole_first, whole_stop], axis=-1)[:, None]


def _by_step(c):
    """c [B, Nb, H, d] as [B, H, Nb, d], in whole steps; row 8 i + j of a step is block 64 j + i."""
    c = shapes.pad(c, 1, STEP)
    batch, blocks, heads, dim = c.shape
    c = c.reshape(batch, blocks // STEP, GROUP, STEP // GROUP, heads, dim)
    return c.transpose(0, 4, 1, 3, 2, 5).reshape(batch, heads, blocks, dim)


def select(u, c, limit, start, *, count: int, config: Config):
    """index int32 and score f32 [B, T, H, count].

    Args:
      u: bf16 [B, T, H, d].
      c: bf16 [B, Nb, H, d].
      limit: int32 [B, T], at most Nb.
      start: int32 [B, T], at least 0.
      count: K, at most 64.
      config: of the kernel.
    """
    batch, tokens, heads, dim = u.shape
    queries = min(config.queries, -(-tokens // LANES) * LANES)
    u, limit, start = (shapes.pad(x, 1, queries) for x in (u, limit, start))
    c = _by_step(c)
    sizes = Sizes(queries, min(config.blocks, c.shape[2]), dim, count)
    tiles = u.shape[1] // queries

    def of_tile(rows):
        return pl.BlockSpec((None, None, rows, queries), lambda b, h, t: (b, h, 0, t))

    def result(dtype):
        shape = (batch, heads, sizes.slots, u.shape[1])
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(u).manual_axis_type)

    rows = batch * heads * u.shape[1]
    pairs = rows * c.shape[2]
    index, score = pl.pallas_call(
        functools.partial(search_tile, sizes=sizes),
        out_shape=(result(jnp.int32), result(jnp.float32)),
        grid=(batch, heads, tiles),
        in_specs=[
            pl.BlockSpec(
                (None, 1, 4), lambda b, h, t: (b * tiles + t, 0, 0), memory_space=pltpu.SMEM
            ),
            of_tile(dim),
            pl.BlockSpec((None, 2, queries), lambda b, h, t: (b, 0, t)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=(of_tile(sizes.slots), of_tile(sizes.slots)),
        scratch_shapes=[
            *(pltpu.VMEM(shape, dtype) for shape, dtype in sizes.buffers().values()),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=sizes.vmem_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * dim * pairs,
            bytes_accessed=2 * dim * (pairs // queries + rows) + 8 * sizes.slots * rows,
            transcendentals=0,
        ),
        name="block_selection",
    )(
        _plan(start, limit, queries),
        u.transpose(0, 2, 3, 1),
        jnp.stack([start, limit], axis=1),
        c,
    )
    index, score = (x.transpose(0, 3, 1, 2)[:, :tokens, :, :count] for x in (index, score))
    return index, score


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _select(u, c, limit, start, count):
    find = shapes.batchable(functools.partial(select, count=count, config=CONFIG))
    return find(u, c, limit, start)


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


# The kernel searches for nodes; XLA gathers and scores the blocks in them.
select_blocks_in_nodes = functools.partial(
    two_levels.select, two_levels.Levels(select_blocks, xla.best_of_nodes)
)
