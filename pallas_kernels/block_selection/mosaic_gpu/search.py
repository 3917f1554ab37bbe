"""The groups of 8 blocks in which the best blocks of each query lie: those with the best maxima.

A tile of 64 queries walks over its blocks, 512 a step: eight products of 64 queries and 64 blocks,
one block of each group, whose maximum is a tile of 64 queries and 64 groups. Of that, a warpgroup
keeps the best of each query in registers. A thread block is one warpgroup, since the reduction
that asks whether any query goes on has one place in shared memory; two of them share a
multiprocessor.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_selection.mosaic_gpu import lists
from pallas_kernels.block_selection.mosaic_gpu.configs import GROUP, STEP, Config, Sizes
from pallas_kernels.hopper import HALF


def _plan(start, limit, sizes: Sizes):
    """int32 [B, tiles, 3, 64]: the starts and the limits of a tile's queries, and its walk.

    The walk: its first step, the step after its last, and the first and the one after the last
    that all queries see whole.
    """
    shape = sizes.batch, sizes.tiles, HALF
    start, limit = (x.reshape(shape) for x in (start, limit))
    last = jnp.max(jnp.where(start < limit, limit, 0), axis=2)
    first = jnp.min(jnp.where(start < limit, start, jnp.iinfo(jnp.int32).max), axis=2)
    first = jnp.minimum(first, last) // STEP
    stop = (last + STEP - 1) // STEP
    whole_first = jnp.clip((jnp.max(start, axis=2) + STEP - 1) // STEP, first, stop)
    whole_stop = jnp.clip(jnp.min(limit, axis=2) // STEP, whole_first, stop)
    walk = jnp.stack([first, stop, whole_first, whole_stop], axis=-1)
    walk = jnp.pad(walk, [(0, 0), (0, 0), (0, HALF - 4)])
    return jnp.stack([start, limit, walk], axis=2)


def _by_step(c):
    """[B, H, steps x 8, 64, d] of c [B, Nb, H, d]: tile j of a step has block j of each group."""
    c = hopper.pad(c, 1, STEP)
    batch, blocks, heads, dim = c.shape
    c = c.reshape(batch, blocks // STEP, HALF, GROUP, heads, dim)
    return c.transpose(0, 4, 1, 3, 2, 5).reshape(batch, heads, blocks // HALF, HALF, dim)


class _Walk:
    """A warpgroup that walks, for each of its tiles of queries, over their blocks.

    `at` has the references: u, c, columns, plan and group in device memory; u_tile, plan_tile,
    c_tile and group_tile in shared memory; and the barriers of what is copied there.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.own_items = hopper.share(sizes.items, at)

    def run(self):
        """Searches for item after item."""
        lax.fori_loop(0, self.own_items, self._search_item, jnp.int32(0))

    def _search_item(self, i, turn):
        at, copy, stages = self.at, plgpu.copy_gmem_to_smem, self.config.stages
        b, tile, h = self.sizes.locate(at.program + i * at.programs)
        tokens = pl.ds(pl.multiple_of(tile * HALF, HALF), HALF)
        copy(at.plan.at[b, tile], at.plan_tile, at.u_ready)
        copy(at.u.at[b, tokens, h], at.u_tile, at.u_ready)
        plgpu.barrier_wait(at.u_ready)
        first, stop, whole_first, whole_stop = (at.plan_tile[2, n] for n in range(4))
        first_tile, tiles = first * GROUP, (stop - first) * GROUP

        def load(n):
            slot = lax.rem(turn + n, stages)
            copy(at.c.at[b, h, first_tile + n], at.c_tile.at[slot], at.c_ready.at[slot])

        def replace(n):
            # All warps meet before a copy begins, so none still reads what it replaces.
            pl.when(n + stages < tiles)(lambda: load(n + stages))

        pl.loop(0, jnp.minimum(tiles, stages))(load)

        def step(masked, s, state):
            n = (s - first) * GROUP
            maxima = self._maxima(s * STEP, turn + n, masked, lambda j: replace(n + j))
            # Loaded once a step: an iota might be converted in each round.
            columns = plgpu.load(at.columns, layout=hopper.COLUMN, optimized=False)
            groups = (s * HALF).astype(jnp.float32) + hopper.along_columns(columns, maxima.shape)
            return lists.add(maxima, groups, *state)

        state = lists.none_waiting(HALF), lists.nothing(self.sizes.count)
        state = lax.fori_loop(first, whole_first, functools.partial(step, True), state)
        state = lax.fori_loop(whole_first, whole_stop, functools.partial(step, False), state)
        waiting, best = lax.fori_loop(whole_stop, stop, functools.partial(step, True), state)
        best = lists.take_best(waiting.score, waiting.number, 0.0, best)
        group = lists.ascending(best.number)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        at.group_tile[...] = jnp.where(group < lists.NOTHING, group, -1.0).astype(jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.group_tile, at.group.at[b, tokens, h])
        pl.when(i == self.own_items - 1)(lambda: plgpu.wait_smem_to_gmem(0))
        return turn + tiles

    def _maxima(self, origin, turn, masked: bool, done):
        """The best score of each group of a step, f32 [64, 64].

        Args:
          origin: the first block.
          turn: of the first tile.
          masked: whether a query may not see all blocks.
          done: is called with the number of each tile that has been read.
        """

        def add(j, maxima):
            slot = lax.rem(turn + j, self.config.stages)
            plgpu.barrier_wait(self.at.c_ready.at[slot])
            scores = self._product(slot)
            done(j)
            if masked:
                scores = self._mask(scores, origin + j)
            return jnp.maximum(maxima, scores)

        return lax.fori_loop(0, GROUP, add, hopper.full((HALF, HALF), -jnp.inf))

    def _product(self, slot):
        features = hopper.transposed(self.at.c_tile.at[slot])
        return hopper.multiply(self.at.u_tile, features, (HALF, HALF))

    def _mask(self, scores, origin):
        """Hides every 8th block from `origin` on that a query may not select."""
        bounds = (plgpu.load(self.at.plan_tile.at[n], layout=hopper.ROW) for n in (0, 1))
        # Rounded up; the shift rounds down negative numbers, too.
        return hopper.keep(scores, 1, *((x - origin + GROUP - 1) >> 3 for x in bounds))


def scratch(sizes: Sizes, config: Config):
    """The scratch of the search."""
    return {
        "u_tile": hopper.operand_tile((HALF, sizes.dim)),
        "plan_tile": plgpu.SMEM((3, HALF), jnp.int32),
        "c_tile": hopper.operand_tile((config.stages, HALF, sizes.dim)),
        "group_tile": plgpu.SMEM((HALF, sizes.count), jnp.int32),
        "u_ready": plgpu.Barrier(num_arrivals=2),
        "c_ready": plgpu.Barrier(num_barriers=config.stages),
    }


def find_groups(u, c, limit, start, sizes: Sizes, config: Config):
    """The `count` best groups of each query in ascending order, int32 [B, T, Hkv, count], then -1.

    Arguments as of `select`.
    """
    shape = sizes.batch, sizes.tokens, sizes.heads, sizes.count
    columns = jnp.arange(HALF, dtype=jnp.float32)
    return hopper.launch(
        "find_groups",
        lambda at: _Walk(sizes, config, at).run(),
        programs=min(config.programs, sizes.items),
        warpgroups=1,
        operands={
            "u": u, "c": _by_step(c), "columns": columns, "plan": _plan(start, limit, sizes)
        },
        outputs={"group": jax.ShapeDtypeStruct(shape, jnp.int32)},
        scratch=scratch(sizes, config),
    )["group"]  # fmt: skip
