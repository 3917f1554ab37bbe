"""The best blocks of each query among the blocks of its groups.

A query's groups are copied next to each other, and multiplied with the 8 queries around it, of
which one column is kept. The scores of the 64 queries of a warpgroup gather in shared memory, and
are read across.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, shapes
from pallas_kernels.block_selection.mosaic_gpu import lists
from pallas_kernels.block_selection.mosaic_gpu.configs import GROUP, Config, Sizes
from pallas_kernels.hopper import HALF, ROWS, Ring

_COLUMNS = 8  # of a product: queries


def _plan(group, start, limit):
    """int32 [B, Hkv, tiles, 2, 128]: the first candidate of a query, and the one after the last.

    Groups ascend, so a start hides the first candidates and a limit the last ones: no group is
    missing between one that a bound cuts and those beyond it.
    """
    found = jnp.sum(group >= 0, axis=3)
    low = start[..., None] - group[..., 0] * GROUP
    cut = (jnp.max(group, axis=3) + 1) * GROUP - limit[..., None]
    high = found * GROUP - jnp.maximum(cut, 0)
    bounds = jnp.stack([jnp.maximum(low, 0), jnp.where(found > 0, high, 0)])
    bounds = shapes.pad(bounds, 2, ROWS)
    bounds = bounds.reshape(2, len(group), -1, ROWS, group.shape[2])
    return bounds.transpose(1, 4, 2, 0, 3)


class _Walk:
    """A thread block that scores the candidates of one tile of queries after the other.

    `at` has the references: u, c, columns, plan, group, column and score in device memory; u_tile,
    plan_tile, group_tile, c_tile, all_scores and best_tile in shared memory; and the rings'
    barriers.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.tile_ring = Ring(sizes.places, *at.tile_ring)
        # A slot belongs to one warpgroup, as the ring's size is a multiple of their number.
        self.c_ring = Ring(2 * config.places, *at.c_ring)
        self.own_items = hopper.share(sizes.items, at)
        self.parts = sizes.groups // sizes.part
        self.candidates = sizes.part * GROUP
        self.tiles = [pl.ds(n, HALF) for n in range(0, self.candidates, HALF)]

    def locate(self, i):
        """(batch element, tile, KV head) of this block's item i."""
        return self.sizes.locate(self.at.program + i * self.at.programs)

    def load(self):
        """Fills the rings, item after item."""
        at, copy, sizes = self.at, plgpu.copy_gmem_to_smem, self.sizes

        def load_item(i, _):
            b, tile, h = self.locate(i)
            place = self.tile_ring.claim(i)
            ready = self.tile_ring.ready.at[place]
            tokens = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)
            copy(at.group.at[b, tokens, h], at.group_tile.at[place], ready)
            copy(at.plan.at[b, h, tile], at.plan_tile.at[place], ready)
            copy(at.u.at[b, tokens, h], at.u_tile.at[place], ready)
            self.tile_ring.receive(i)

            @pl.loop(0, self.parts * HALF)
            def _(n):
                part, row = lax.div(n, HALF), lax.rem(n, HALF)
                for half in range(2):
                    slot = self.c_ring.claim(self.turn(i, n, half))
                    ready = self.c_ring.ready.at[slot]
                    groups = [
                        at.group_tile[place, half * HALF + row, part * sizes.part + k]
                        for k in range(sizes.part)
                    ]
                    groups = [jnp.maximum(group, 0) for group in groups]

                    def load(k, slot=slot, ready=ready, groups=groups):
                        rows = pl.ds(k * GROUP, GROUP)
                        copy(at.c.at[b, groups[k], :, h], at.c_tile.at[slot, rows], ready)

                    hopper.by_warp(sizes.part, load)

        lax.fori_loop(0, self.own_items, load_item, None)

    def turn(self, i, n, half):
        """Of the candidates that are the n-th of an item for one half of its queries."""
        return 2 * (i * self.parts * HALF + n) + half

    def compute(self):
        """Scores for this warpgroup's queries of item after item."""
        lax.fori_loop(0, self.own_items, self._score_item, None)
        plgpu.wait_smem_to_gmem(0)

    def _score_item(self, i, _):
        sizes = self.sizes
        place = self.tile_ring.receive(i)

        def columns():
            # Loaded once a step: an iota might be converted in each round.
            number = plgpu.load(self.at.columns, layout=hopper.COLUMN, optimized=False)
            return hopper.along_columns(number, (HALF, self.candidates))

        if self.parts == 1:
            best = lists.by_score(self._score(i, place, 0), columns(), sizes.count)
        else:

            def add(part, best):
                origin = (part * self.candidates).astype(jnp.float32)
                scores = self._score(i, place, part)
                return lists.take_best(scores, columns(), origin, best)

            best = lax.fori_loop(0, self.parts, add, lists.nothing(sizes.count))
            best = lists.by_score(best.score, best.number, sizes.count)
        self.tile_ring.release(i)
        self._store(i, best)

    def _score(self, i, place, part):
        """The scores of each query's own candidates, f32 [64, part x 8]."""
        at, own = self.at, self.at.warpgroup

        def score_row(first, row, kept):
            turn = self.turn(i, part * HALF + first + row, own)
            slot = self.c_ring.receive(turn)
            queries = pl.ds(pl.multiple_of(own * HALF + first, _COLUMNS), _COLUMNS)
            products = self._products(slot, at.u_tile.at[place, queries])
            self.c_ring.release(turn)
            column = plgpu.broadcasted_iota(
                jnp.int32, (HALF, _COLUMNS), 1, layout=plgpu.Layout.WGMMA
            )
            return [jnp.where(column == row, *x) for x in zip(products, kept, strict=True)]

        @pl.loop(0, HALF // _COLUMNS)
        def _(n):
            first = pl.multiple_of(n * _COLUMNS, _COLUMNS)
            kept = [hopper.full((HALF, _COLUMNS), 0) for _ in self.tiles]
            kept = lax.fori_loop(0, _COLUMNS, functools.partial(score_row, first), kept)
            for tile, scores in zip(self.tiles, kept, strict=True):
                at.all_scores.at[own, tile, pl.ds(first, _COLUMNS)][...] = scores

        plgpu.commit_smem()
        scores = hopper.transposed(at.all_scores.at[own])
        scores = plgpu.load(scores, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()  # All warps have read what the next scores replace.
        plan = at.plan_tile.at[place]
        bounds = (plgpu.load(plan.at[n, hopper.half_of(own)], layout=hopper.ROW) for n in (0, 1))
        return hopper.keep(scores, 1, *(x - part * self.candidates for x in bounds))

    def _products(self, slot, queries):
        """Candidates times 8 queries, in tiles of 64 candidates."""

        def compute(*accs):
            for acc, tile in zip(accs, self.tiles, strict=True):
                plgpu.wgmma(acc, self.at.c_tile.at[slot, tile], hopper.transposed(queries))
            return [acc[...] for acc in accs]

        accs = [plgpu.ACC((HALF, _COLUMNS), jnp.float32) for _ in self.tiles]
        return pl.run_scoped(compute, *accs)

    def _store(self, i, best):
        """Copies out the scores and the columns of this warpgroup's queries of an item."""
        at, own = self.at, self.at.warpgroup
        b, tile, h = self.locate(i)
        token = pl.multiple_of(tile * ROWS + own * HALF, HALF)
        for x, target in zip(best, (at.score, at.column), strict=True):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the copy before
            plgpu.commit_smem()
            at.best_tile[own] = x
            plgpu.commit_smem()

            @pl.when(token < self.sizes.tokens)
            def _(target=target):
                plgpu.copy_smem_to_gmem(at.best_tile.at[own], target.at[b, pl.ds(token, HALF), h])


def scratch(sizes: Sizes, config: Config):
    """The scratch of the rescoring."""
    candidates = sizes.part * GROUP
    return {
        "u_tile": hopper.operand_tile((sizes.places, ROWS, sizes.dim)),
        "plan_tile": plgpu.SMEM((sizes.places, 2, ROWS), jnp.int32),
        "group_tile": plgpu.SMEM((sizes.places, ROWS, sizes.groups), jnp.int32),
        "c_tile": hopper.operand_tile((2 * config.places, candidates, sizes.dim)),
        "all_scores": hopper.crossed_tile((2, candidates, HALF)),
        "best_tile": plgpu.SMEM((2, HALF, sizes.count), jnp.float32),
        "tile_ring": Ring.barriers(sizes.places, copies=3),
        "c_ring": Ring.barriers(2 * config.places, copies=sizes.part, consumers=1),
    }


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def score_groups(u, c, group, limit, start, sizes: Sizes, config: Config):
    """index int32 and score f32 [B, T, Hkv, count], of the blocks of each query's groups.

    Arguments as of `select`, and the groups: int32 [B, T, Hkv, groups], ascending, then -1. Groups
    outside of [start, limit) are allowed as neighbours, without a gap, of one that this cuts.
    """
    shape = sizes.batch, sizes.tokens, sizes.heads, sizes.count
    results = hopper.launch(
        "score_groups",
        hopper.roles(functools.partial(_Walk, sizes, config), loader_registers=40),
        programs=min(config.programs, sizes.items),
        meets=False,
        operands={
            "u": u, "c": c.reshape(c.shape[0], -1, GROUP, *c.shape[2:]),
            "columns": jnp.arange(sizes.part * GROUP, dtype=jnp.float32),
            "plan": _plan(group, start, limit), "group": group,
        },
        outputs=dict.fromkeys(("column", "score"), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch=scratch(sizes, config),
    )  # fmt: skip
    column, score = results["column"].astype(jnp.int32), results["score"]
    group = jnp.take_along_axis(group, column // GROUP, axis=3, mode="clip")
    found = score > -jnp.inf
    index = jnp.where(found, group * GROUP + column % GROUP, -1)
    # A choice that changes nothing: where a kernel's result is put into a larger array as it is,
    # XLA (JAX 0.11.2) runs the kernel once for that, and again for whoever else uses the result.
    return index, jnp.where(found, score, -jnp.inf)
