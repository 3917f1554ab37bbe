"""The groups of 8 blocks in which the best blocks of each query lie: those with the best maxima.

A tile of 128 queries walks over its blocks, 512 a step. For each half of the queries a warpgroup
multiplies 64 queries and eight times 64 blocks, one block of each group: the maxima are a tile of
64 queries and 64 groups. Of that it keeps the best of each query: `candidates` up to 16 of them,
`lists` more.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes, hopper_products, shapes
from pallas_kernels.block_selection.mosaic_gpu import candidates, lists, thread_lists
from pallas_kernels.block_selection.mosaic_gpu.configs import GROUP, STEP, Config, Sizes
from pallas_kernels.hopper import HALF, ROWS, Ring


def _plan(start, limit):
    """int32 [B, tiles, 3, 128]: the starts and the limits of a tile's queries, and its walk.

    The walk: its first step, the step after its last, and the first and the one after the last
    that all queries see whole.
    """
    start, limit = (shapes.pad(x, 1, ROWS) for x in (start, limit))
    start, limit = (x.reshape(len(x), -1, ROWS) for x in (start, limit))
    last = jnp.max(jnp.where(start < limit, limit, 0), axis=2)
    first = jnp.min(jnp.where(start < limit, start, jnp.iinfo(jnp.int32).max), axis=2)
    first = jnp.minimum(first, last) // STEP
    stop = (last + STEP - 1) // STEP
    whole_first = jnp.clip((jnp.max(start, axis=2) + STEP - 1) // STEP, first, stop)
    whole_stop = jnp.clip(jnp.min(limit, axis=2) // STEP, whole_first, stop)
    walk = jnp.stack([first, stop, whole_first, whole_stop], axis=-1)
    walk = jnp.pad(walk, [(0, 0), (0, 0), (0, ROWS - 4)])
    return jnp.stack([start, limit, walk], axis=2)


def _by_step(c, products: int):
    """[B, H, slots, products x 64, d] of c [B, Nb, H, d].

    The j-th 64 blocks of a step's slots are block j of each of its groups.
    """
    c = shapes.pad(c, 1, STEP)
    batch, blocks, heads, dim = c.shape
    c = c.reshape(batch, blocks // STEP, HALF, GROUP, heads, dim)
    return c.transpose(0, 4, 1, 3, 2, 5).reshape(batch, heads, -1, products * HALF, dim)


def _places(sizes: Sizes) -> int:
    """Tiles of queries in shared memory at a time; lists of candidates leave room for one."""
    return 1 if sizes.listed else sizes.places


class _Walk:
    """A thread block that walks, for each of its tiles of queries, over their blocks.

    `at` has the references: u, c, columns, plan and group in device memory; u_tile, plan_tile,
    c_tile and group_tile in shared memory; and the rings' barriers.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.tile_ring = Ring(_places(sizes), *at.tile_ring)
        self.c_ring = Ring(config.stages, *at.c_ring)
        self.rows = hopper.half_of(at.warpgroup)
        self.slots = GROUP // sizes.products  # of a step
        self.own_items = hopper.share(sizes.items, at)

    def locate(self, i):
        """(batch element, tile, KV head) of this block's item i."""
        return self.sizes.locate(self.at.program + i * self.at.programs)

    def load(self):
        """Fills the rings, item after item."""
        at, copy = self.at, plgpu.copy_gmem_to_smem

        def load_item(i, turn):
            b, tile, h = self.locate(i)
            slot = self.tile_ring.claim(i)
            ready = self.tile_ring.ready.at[slot]
            copy(at.plan.at[b, tile], at.plan_tile.at[slot], ready)
            tokens = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)
            copy(at.u.at[b, tokens, h], at.u_tile.at[slot], ready)
            first, stop = (at.plan[b, tile, 2, n] for n in (0, 1))

            @pl.loop(0, (stop - first) * self.slots)
            def _(n):
                slot = self.c_ring.claim(turn + n)
                features = at.c.at[b, h, first * self.slots + n]
                copy(features, at.c_tile.at[slot], self.c_ring.ready.at[slot])

            return turn + (stop - first) * self.slots

        lax.fori_loop(0, self.own_items, load_item, jnp.int32(0))

    def compute(self):
        """Searches for this warpgroup's queries of item after item."""
        lax.fori_loop(0, self.own_items, self._search_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _search_item(self, i, turn):
        at = self.at
        place = self.tile_ring.receive(i)
        first, stop, whole_first, whole_stop = (at.plan_tile[place, 2, n] for n in range(4))

        def step(s, state):
            visited = place, s, turn + (s - first) * self.slots, state
            maxima, state = lax.cond(
                (s >= whole_first) & (s < whole_stop),
                lambda: self._visit_whole(*visited),
                lambda: self._visit_masked(*visited),
            )
            return self._add(maxima, s, s - first, state)

        state = lax.fori_loop(first, stop, step, self._nothing())
        self.tile_ring.release(i)
        self._store(i, self._numbers(stop, stop - first, state))
        return turn + (stop - first) * self.slots

    @property
    def _own_lists(self):
        return self.at.list_tile.at[self.at.warpgroup]

    def _nothing(self):
        """What is known of this warpgroup's queries before the first step.

        In shared memory, the maxima of a step become candidates during the next one.
        """
        if self.sizes.listed:
            return hopper.full((HALF, HALF), -jnp.inf), candidates.nothing()
        return lists.none_waiting(HALF), lists.nothing(self.sizes.count)

    def _meanwhile(self, s, state):
        """Adds the maxima of the step before s, while products of that step are being computed."""
        if not self.sizes.listed:
            return state
        maxima, known = state
        return maxima, candidates.add(self._own_lists, maxima, self._origin(s - 1), known)

    def _add(self, maxima, s, before, state):
        """What is known after step s, which so many came before."""
        if self.sizes.listed:
            known = candidates.make_room(self._own_lists, before - 1, state[1], self.sizes.count)
            return maxima, known
        return lists.add(maxima, self._origin(s) + self._columns(maxima.shape), *state)

    def _numbers(self, stop, steps, state):
        """The best groups in ascending order, f32 [64, count]; then `NOTHING`."""
        if self.sizes.listed:
            _, known = self._meanwhile(stop, state)
            known = candidates.make_room(self._own_lists, steps - 1, known, self.sizes.count)
            return candidates.numbers(self._own_lists, known, self.sizes.count)
        waiting, best = state
        best = lists.take_best(waiting.score, waiting.number, 0.0, best)
        return lists.ascending(best.number)

    def _origin(self, s):
        """The number of a step's first group."""
        return (s * HALF).astype(jnp.float32)

    def _visit_whole(self, place, s, turn, state):
        """The best score of each group of a step, f32 [64, 64], and the state after `_meanwhile`.

        Args:
          place: of the queries.
          s: the step, of which they see all blocks.
          turn: of the first tile.
          state: what is known.
        """
        queries, blocks = self.at.u_tile.at[place, self.rows], self.sizes.products * HALF

        def visit(n, meanwhile=lambda: None):
            slot = self.c_ring.receive(turn + n)
            features = self.at.c_tile.at[slot]
            products = hopper_products.begin(queries, features)
            result = meanwhile()
            products = hopper_products.finish(products)
            self.c_ring.release(turn + n)
            parts = (products[:, j : j + HALF] for j in range(0, blocks, HALF))
            return functools.reduce(jnp.maximum, parts), result

        maxima, state = visit(0, lambda: self._meanwhile(s, state))
        maxima = lax.fori_loop(1, self.slots, lambda n, x: jnp.maximum(x, visit(n)[0]), maxima)
        return maxima, state

    def _visit_masked(self, place, s, turn, state):
        """As `_visit_whole`, of a step of which a query may not see all; with fewer registers."""
        queries, products = self.at.u_tile.at[place, self.rows], self.sizes.products
        state = self._meanwhile(s, state)

        def visit(n, maxima):
            slot = self.c_ring.receive(turn + n)

            def visit_part(j, maxima):
                part = pl.ds(pl.multiple_of(j * HALF, HALF), HALF)
                scores = hopper_products.begin(queries, self.at.c_tile.at[slot, part])
                scores = hopper_products.finish(scores)
                return jnp.maximum(maxima, self._mask(place, scores, s * STEP + n * products + j))

            maxima = lax.fori_loop(0, products, visit_part, maxima)
            self.c_ring.release(turn + n)
            return maxima

        nothing = hopper.full((HALF, HALF), -jnp.inf)
        return lax.fori_loop(0, self.slots, visit, nothing), state

    def _mask(self, place, scores, origin):
        """Hides every 8th block from `origin` on that a query may not select."""
        plan = self.at.plan_tile.at[place]
        bounds = (plgpu.load(plan.at[n, self.rows], layout=hopper.ROW) for n in (0, 1))
        # Rounded up; the shift rounds down negative numbers, too.
        bounds = (((x - origin + GROUP - 1) >> 3).astype(jnp.float32) for x in bounds)
        return hopper_lanes.hide(scores, *bounds)

    def _columns(self, shape):
        """The number of each column, f32; loaded each time, which takes no registers between."""
        columns = plgpu.load(self.at.columns, layout=hopper.COLUMN, optimized=False)
        return hopper.along_columns(columns, shape)

    def _store(self, i, group):
        """Starts the copy of this warpgroup's groups, of an item."""
        at, own = self.at, self.at.warpgroup
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
        plgpu.commit_smem()
        at.group_tile[own] = jnp.where(group < lists.NOTHING, group, -1.0).astype(jnp.int32)
        plgpu.commit_smem()
        b, tile, h = self.locate(i)
        token = pl.multiple_of(tile * ROWS + own * HALF, HALF)

        @pl.when(token < self.sizes.tokens)
        def _():
            plgpu.copy_smem_to_gmem(at.group_tile.at[own], at.group.at[b, pl.ds(token, HALF), h])


def scratch(sizes: Sizes, config: Config):
    """The scratch of the search."""
    places = _places(sizes)
    return {
        "u_tile": hopper.operand_tile((places, ROWS, sizes.dim)),
        "plan_tile": plgpu.SMEM((places, 3, ROWS), jnp.int32),
        "c_tile": hopper.operand_tile((config.stages, sizes.products * HALF, sizes.dim)),
        "group_tile": plgpu.SMEM((2, HALF, sizes.count), jnp.int32),
        "list_tile": thread_lists.tile(2) if sizes.listed else None,
        "tile_ring": Ring.barriers(places, copies=2),
        "c_ring": Ring.barriers(config.stages, 1),
    }


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def find_groups(u, c, limit, start, sizes: Sizes, config: Config):
    """The `count` best groups of each query in ascending order, int32 [B, T, Hkv, count], then -1.

    Arguments as of `select`.
    """
    shape = sizes.batch, sizes.tokens, sizes.heads, sizes.count
    columns = jnp.arange(HALF, dtype=jnp.float32)
    plan = _plan(start, limit)
    return hopper.launch(
        "find_groups",
        hopper.roles(functools.partial(_Walk, sizes, config), loader_registers=24),
        programs=min(config.programs, sizes.items),
        meets=False,
        operands={"u": u, "c": _by_step(c, sizes.products), "columns": columns, "plan": plan},
        outputs={"group": jax.ShapeDtypeStruct(shape, jnp.int32)},
        scratch=scratch(sizes, config),
    )["group"]  # fmt: skip
