"""The best blocks of each query among the blocks of its groups.

A query's groups are copied next to each other, and multiplied with the 8 queries around it, of
which one column is kept. The scores of 64 queries gather in shared memory, and are read across.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_selection.mosaic_gpu import lists
from pallas_kernels.block_selection.mosaic_gpu.configs import GROUP, Config, Sizes
from pallas_kernels.hopper import HALF

_BLOCKS = 2  # thread blocks that share a multiprocessor, by their registers
_ROWS = 8  # queries of a product


def _plan(group, start, limit, sizes: Sizes):
    """int32 [B, Hkv, tiles, 2, 64]: the first candidate of a query, and the one after the last.

    Groups ascend, so only the first can be cut by the start, and only the last by the limit.
    """
    found = jnp.sum(group >= 0, axis=3)
    low = start[..., None] - group[..., 0] * GROUP
    cut = (jnp.max(group, axis=3) + 1) * GROUP - limit[..., None]
    high = found * GROUP - jnp.maximum(cut, 0)
    bounds = jnp.stack([jnp.maximum(low, 0), jnp.where(found > 0, high, 0)])
    bounds = bounds.reshape(2, sizes.batch, -1, HALF, sizes.heads)
    return bounds.transpose(1, 4, 2, 0, 3)


class _Walk:
    """A warpgroup that scores the candidates of one tile of queries after the other.

    `at` has the references: u, c, columns, plan, group, column and score in device memory; u_tile,
    plan_tile, group_tile, c_tile, column_tile and score_tile in shared memory; and the barriers of
    what is copied there.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.own_items = hopper.share(sizes.items(HALF), at)
        self.candidates = sizes.part * GROUP
        self.tiles = [pl.ds(n, HALF) for n in range(0, self.candidates, HALF)]

    def run(self):
        """Scores item after item."""
        lax.fori_loop(0, self.own_items, self._score_item, jnp.int32(0))

    def _score_item(self, i, turn):
        at, copy, sizes, places = self.at, plgpu.copy_gmem_to_smem, self.sizes, self.config.places
        b, tile, h = sizes.locate(at.program + i * at.programs, HALF)
        tokens = pl.ds(pl.multiple_of(tile * HALF, HALF), HALF)
        plgpu.commit_smem()  # All warps meet: none still reads what is replaced.
        copy(at.plan.at[b, h, tile], at.plan_tile, at.tile_ready)
        copy(at.group.at[b, tokens, h], at.group_tile, at.tile_ready)
        copy(at.u.at[b, tokens, h], at.u_tile, at.tile_ready)
        plgpu.barrier_wait(at.tile_ready)
        parts = sizes.count // sizes.part

        def load(n):
            part, row = lax.div(n, HALF), lax.rem(n, HALF)
            slot = lax.rem(turn + n, places)
            for k in range(sizes.part):
                group = jnp.maximum(at.group_tile[row, part * sizes.part + k], 0)
                rows = pl.ds(k * GROUP, GROUP)
                copy(at.c.at[b, group, :, h], at.c_tile.at[slot, rows], at.c_ready.at[slot])

        pl.loop(0, places)(load)

        def multiply(slot, queries):
            """Candidates times 8 queries, in tiles of 64 candidates."""

            def compute(*accs):
                for acc, tile in zip(accs, self.tiles, strict=True):
                    plgpu.wgmma(acc, at.c_tile.at[slot, tile], hopper.transposed(queries))
                return [acc[...] for acc in accs]

            accs = [plgpu.ACC((HALF, _ROWS), jnp.float32) for _ in self.tiles]
            return pl.run_scoped(compute, *accs)

        def score(part):
            """The scores of each query's own candidates, f32 [64, part x 8]."""

            def score_row(first, row, kept):
                n = part * HALF + first + row
                slot = lax.rem(turn + n, places)
                plgpu.barrier_wait(at.c_ready.at[slot])
                products = multiply(slot, at.u_tile.at[pl.ds(first, _ROWS)])
                plgpu.commit_smem()  # All warps meet: none still reads the slot.
                pl.when(n + places < parts * HALF)(lambda: load(n + places))
                column = plgpu.broadcasted_iota(
                    jnp.int32, (HALF, _ROWS), 1, layout=plgpu.Layout.WGMMA
                )
                return [jnp.where(column == row, *x) for x in zip(products, kept, strict=True)]

            @pl.loop(0, HALF // _ROWS)
            def _(n):
                first = pl.multiple_of(n * _ROWS, _ROWS)
                kept = [hopper.full((HALF, _ROWS), 0) for _ in self.tiles]
                kept = lax.fori_loop(0, _ROWS, functools.partial(score_row, first), kept)
                for tile, scores in zip(self.tiles, kept, strict=True):
                    at.all_scores.at[tile, pl.ds(first, _ROWS)][...] = scores

            plgpu.commit_smem()
            scores = hopper.transposed(at.all_scores)
            scores = plgpu.load(scores, layout=plgpu.Layout.WGMMA, optimized=False)
            bounds = (plgpu.load(at.plan_tile.at[n], layout=hopper.ROW) for n in (0, 1))
            return hopper.keep(scores, 1, *(x - part * self.candidates for x in bounds))

        def columns():
            # Loaded once a step: an iota might be converted in each round.
            number = plgpu.load(at.columns, layout=hopper.COLUMN, optimized=False)
            return hopper.along_columns(number, (HALF, self.candidates))

        if parts == 1:
            best = lists.by_score(score(0), columns(), sizes.count)
        else:

            def add(part, best):
                origin = (part * self.candidates).astype(jnp.float32)
                any_row = functools.partial(lists.any_row, at.flags)
                return lists.take_best(score(part), columns(), origin, best, any_row)

            best = lax.fori_loop(0, parts, add, lists.nothing(sizes.count))
            best = lists.by_score(best.score, best.number, sizes.count)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        at.score_tile[...] = best[0]
        at.column_tile[...] = best[1].astype(jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.score_tile, at.score.at[b, tokens, h])
        plgpu.copy_smem_to_gmem(at.column_tile, at.column.at[b, tokens, h])
        pl.when(i == self.own_items - 1)(lambda: plgpu.wait_smem_to_gmem(0))
        return turn + parts * HALF


def scratch(sizes: Sizes, config: Config):
    """The scratch of the rescoring."""
    return {
        "u_tile": hopper.operand_tile((HALF, sizes.dim)),
        "plan_tile": plgpu.SMEM((2, HALF), jnp.int32),
        "group_tile": plgpu.SMEM((HALF, sizes.count), jnp.int32),
        "c_tile": hopper.operand_tile((config.places, sizes.part * GROUP, sizes.dim)),
        "all_scores": hopper.crossed_tile((sizes.part * GROUP, HALF)),
        "column_tile": plgpu.SMEM((HALF, sizes.count), jnp.int32),
        "score_tile": plgpu.SMEM((HALF, sizes.count), jnp.float32),
        "flags": plgpu.SMEM((HALF,), jnp.float32),
        "tile_ready": plgpu.Barrier(num_arrivals=3),
        "c_ready": plgpu.Barrier(num_arrivals=sizes.part, num_barriers=config.places),
    }


def score_groups(u, c, group, limit, start, sizes: Sizes, config: Config):
    """index int32 and score f32 [B, T, Hkv, count], of the blocks of each query's groups.

    Arguments as of `select`, and the groups that `find_groups` returns.
    """
    shape = sizes.batch, sizes.tokens, sizes.heads, sizes.count
    by_group = c.reshape(c.shape[0], -1, GROUP, *c.shape[2:])
    own = scratch(sizes, config)
    fitting = max(1, min(_BLOCKS, hopper.SHARED_MEMORY // hopper.shared_memory(own, reduces=True)))
    results = hopper.launch(
        "score_groups",
        lambda at: _Walk(sizes, config, at).run(),
        programs=min(fitting * config.programs, sizes.items(HALF)),
        warpgroups=1,
        meets=False,  # once for a query, not for each of its groups
        operands={
            "u": u, "c": by_group, "columns": jnp.arange(sizes.part * GROUP, dtype=jnp.float32),
            "plan": _plan(group, start, limit, sizes), "group": group,
        },
        outputs={
            "column": jax.ShapeDtypeStruct(shape, jnp.int32),
            "score": jax.ShapeDtypeStruct(shape, jnp.float32),
        },
        scratch=own,
    )  # fmt: skip
    column, score = results["column"], results["score"]
    group = jnp.take_along_axis(group, column // GROUP, axis=3, mode="clip")
    found = score > -jnp.inf
    index = jnp.where(found, group * GROUP + column % GROUP, -1)
    # A choice that changes nothing: where a kernel's result is put into a larger array as it is,
    # XLA (JAX 0.11.2) runs the kernel once for that, and again for whoever else uses the result.
    return index, jnp.where(found, score, -jnp.inf)
