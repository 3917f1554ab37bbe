"""The kernel: a tile of queries scores chunks of blocks, and descends to the best of each.

Per chunk, the K supergroups with the best maxima, the K best of their groups, the K best of the
blocks in those and of what earlier chunks left.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_selection.mosaic_tpu.configs import GROUP, LANES, STEP, Sizes

_SLOTS = 16  # of the selected, for which a descent keeps its 8 x 16 candidates in registers
_NEVER = float(2**25)  # above every block number; these are counted in f32, exact up to 2^24


def _members(x):
    """The 8 registers, of 8 rows each, of the members of 8 groups."""
    return [x[GROUP * m : GROUP * (m + 1)] for m in range(GROUP)]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of queries, which walks over its blocks; `at` has the references."""

    sizes: Sizes
    at: dict

    def walk(self):
        """Leaves the best in `best_id` and `best_score`."""
        at, chunk_steps = self.at, self.sizes.blocks // STEP
        first, stop = at["plan"][0, 0], at["plan"][0, 1]
        for name, nothing in (("best_score", -jnp.inf), ("best_id", -1.0), ("chosen", -1.0)):
            at[name][...] = jnp.full(at[name].shape, nothing, jnp.float32)

        @pl.when(first < stop)
        def _():
            self._copy(first).start()

        @pl.loop(0, pl.cdiv(stop - first, chunk_steps))
        def _(chunk):
            base = first + chunk * chunk_steps
            steps = jnp.minimum(stop - base, chunk_steps)
            self._score(base, steps)
            self._descend(base, steps)

    def _copy(self, step):
        """Of the features of a step's blocks, to one of two places."""
        at, slot = self.at, lax.rem(step, 2)
        rows = pl.ds(pl.multiple_of(step * STEP, STEP), STEP)
        features = at["c"].at[pl.program_id(0), pl.program_id(1), rows]
        return pltpu.make_async_copy(features, at["features"].at[slot], at["arrived"].at[slot])

    def _score(self, base, steps):
        """Fills `scores`, `group_maxima` and, with the supergroups' maxima, `candidate_score`."""
        at = self.at
        supergroups = self.sizes.blocks // GROUP**2
        shape = (supergroups, self.sizes.queries)
        at["candidate_score"][:supergroups] = jnp.full(shape, -jnp.inf, jnp.float32)
        stop, whole_first, whole_stop = (at["plan"][0, n] for n in (1, 2, 3))

        @pl.loop(0, steps)
        def _(n):
            step = base + n

            @pl.when(step + 1 < stop)
            def _():
                self._copy(step + 1).start()

            self._copy(step).wait()
            whole = (step >= whole_first) & (step < whole_stop)

            @pl.when(whole)
            def _():
                self._score_step(step, n, masked=False)

            @pl.when(jnp.logical_not(whole))
            def _():
                self._score_step(step, n, masked=True)

    def _score_step(self, step, n, masked):
        """Scores the step that is the n-th of the chunk."""
        at, queries = self.at, self.sizes.queries
        scores = jnp.dot(
            at["features"][lax.rem(step, 2)], at["u"][...], preferred_element_type=jnp.float32
        )
        if masked:
            row = lax.broadcasted_iota(jnp.int32, (STEP, queries), 0)
            block = step * STEP + row % GROUP * GROUP**2 + row // GROUP
            start, limit = at["bounds"][0:1], at["bounds"][1:2]
            scores = jnp.where((start <= block) & (block < limit), scores, -jnp.inf)
        at["scores"][pl.ds(pl.multiple_of(n * STEP, STEP), STEP)] = scores
        groups = STEP // GROUP
        maxima = [
            functools.reduce(jnp.maximum, _members(scores[groups * i : groups * (i + 1)]))
            for i in range(GROUP)
        ]
        rows = pl.ds(pl.multiple_of(n * groups, groups), groups)
        at["group_maxima"][rows] = jnp.concatenate(maxima)
        rows = pl.ds(pl.multiple_of(n * GROUP, GROUP), GROUP)
        at["candidate_score"][rows] = functools.reduce(jnp.maximum, maxima)

    def _descend(self, base, steps):
        """From the supergroups' maxima to the best blocks."""
        at, sizes = self.at, self.sizes
        supergroups = sizes.blocks // GROUP**2
        if supergroups > sizes.slots:
            row = lax.broadcasted_iota(jnp.int32, (GROUP, sizes.queries), 0)
            at["candidate_id"][:GROUP] = row.astype(jnp.float32)
            self._take_best(GROUP, supergroups // GROUP, GROUP, at["chosen"])
        else:
            row = lax.broadcasted_iota(jnp.int32, (sizes.slots, sizes.queries), 0)
            chosen = jnp.where(row < supergroups, row, -1)
            at["chosen"][...] = chosen.astype(jnp.float32)
        # A register of a step's maxima has a group of each of its 8 supergroups, a register of
        # its scores a block of one group of each.
        self._gather(at["group_maxima"], pl.cdiv(steps, GROUP), lambda x: (x >> 3, x & 7), 0)
        self._take_best(sizes.slots, GROUP, 1, at["chosen"])
        self._gather(
            at["scores"],
            steps,
            lambda x: ((x >> 6) * GROUP + (x & 7), x >> 3 & 7),
            base * STEP,
        )
        at["earlier_score"][...] = at["best_score"][...]
        at["earlier_id"][...] = at["best_id"][...]
        self._take_best(sizes.slots, GROUP, 1, at["best_id"], at["best_score"])

    def _take_best(self, rows, members, stride, ids, scores=None):
        """The K best candidates, in order; of equal ones, that of the lowest id.

        Args:
          rows: of the candidates that are the first members, whose ids are `candidate_id`.
          members: how many times so many rows are candidates.
          stride: what is added to the ids from one member to the next.
          ids: takes the K ids, -1 where candidates score -inf.
          scores: if given, takes the scores, and what earlier chunks left is candidate, too.
        """
        at, queries = self.at, self.sizes.queries
        width = _lanes_at_once(rows * members, queries)

        @pl.loop(0, queries // width)
        def _(tile):
            lanes = pl.ds(pl.multiple_of(tile * width, width), width)

            def take(k, taken):
                """Hides what the round before has taken in the same pass that finds the next."""
                number = at["candidate_id"][:rows, lanes]
                best = jnp.full((rows, width), -jnp.inf, jnp.float32)
                offset = jnp.zeros_like(best)
                for m in range(members):
                    here = slice(m * rows, (m + 1) * rows)
                    score = at["candidate_score"][here, lanes]
                    score = jnp.where(number == taken - m * stride, -jnp.inf, score)
                    at["candidate_score"][here, lanes] = score
                    offset = jnp.where(score > best, float(m * stride), offset)
                    best = jnp.maximum(best, score)
                number = number + offset
                if scores is not None:
                    earlier = at["earlier_id"][:, lanes]
                    score = jnp.where(earlier == taken, -jnp.inf, at["earlier_score"][:, lanes])
                    at["earlier_score"][:, lanes] = score
                    best, number = (jnp.concatenate(x) for x in ((best, score), (number, earlier)))
                top = jnp.max(best, axis=0, keepdims=True)
                first = jnp.where(best == top, number, _NEVER)
                first = jnp.min(first, axis=0, keepdims=True)
                first = jnp.where(top > -jnp.inf, first, -1.0)
                _store_row(ids.at[:, lanes], k, first)
                if scores is not None:
                    _store_row(scores.at[:, lanes], k, top)
                return first

            lax.fori_loop(0, self.sizes.count, take, jnp.full((1, width), _NEVER, jnp.float32))

    def _gather(self, source, rounds, locate, first_id):
        """The 8 members of each of the chosen become candidates; of none, they score -inf.

        Args:
          source: their scores: 8 rows of the first members of 8 groups, 8 of the second, and
            so on; then the next 8 groups.
          rounds: how often 64 groups are looked at.
          locate: from a chosen number to which 8 groups, and the sublane.
          first_id: added to the ids of the candidates.
        """
        at, slots = self.at, self.sizes.slots

        @pl.loop(0, self.sizes.queries // LANES)
        def _(tile):
            lanes = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
            for low in range(0, slots, _SLOTS):
                chosen = at["chosen"][low : min(low + _SLOTS, slots), lanes].astype(jnp.int32)
                place, sublane = locate(chosen)
                found = _gather_slots(source.at[:, lanes], rounds, place, sublane)
                for m, score in enumerate(found):
                    rows = pl.ds(m * slots + low, len(chosen))
                    at["candidate_score"][rows, lanes] = score
                number = (chosen * GROUP + first_id).astype(jnp.float32)
                at["candidate_id"][pl.ds(low, len(chosen)), lanes] = number


def _lanes_at_once(rows: int, queries: int) -> int:
    """Of how many queries candidates are compared in one go, so that code does not get long."""
    parts = queries // LANES
    fits = [n for n in range(1, parts + 1) if parts % n == 0 and n * LANES * rows <= 2**17]
    return LANES * max(fits, default=1)


def _store_row(ref, row, x):
    """Stores x [1, n]; by 8 rows, since Mosaic refuses an odd row of a single register."""
    rows = pl.ds(pl.multiple_of(row // GROUP * GROUP, GROUP), GROUP)
    old = ref[rows]
    here = lax.broadcasted_iota(jnp.int32, old.shape, 0) == row % GROUP
    ref[rows] = jnp.where(here, x, old)


def _gather_slots(source, rounds, place, sublane):
    """For each member its scores, an array like `place`."""
    size = GROUP * GROUP  # rows of 8 groups

    def look(r, found):
        for i in range(GROUP):
            here = place == r * GROUP + i
            low = pl.multiple_of((r * GROUP + i) * size, size)
            found = [
                jnp.where(here, _from_sublanes(member, sublane), score)
                for member, score in zip(_members(source[pl.ds(low, size)]), found, strict=True)
            ]
        return found

    nothing = jnp.full(place.shape, -jnp.inf, jnp.float32)
    return lax.fori_loop(0, rounds, look, [nothing] * GROUP)


def _from_sublanes(x, sublane):
    """x [8, 128] at the sublanes, [8 n, 128], of each lane."""
    parts = [
        jnp.take_along_axis(x, sublane[low : low + GROUP], axis=0, mode="promise_in_bounds")
        for low in range(0, len(sublane), GROUP)
    ]
    return jnp.concatenate(parts)


def search_tile(plan, u, bounds, c, index, score, *scratch, sizes: Sizes):
    """The body: of one batch element, KV head and tile of queries.

    Args:
      plan: int32 [1, 4] in SMEM, of the tile: first step of its blocks, the step after the last;
        the first, and the one after the last, that all of its queries see whole.
      u: bf16 [d, queries].
      bounds: int32 [2, queries]: start, limit.
      c: bf16 [B, H, Nb, d] in HBM, ordered by step.
      index: int32 [slots, queries], to be written.
      score: f32 [slots, queries], likewise.
      *scratch: the buffers that `sizes` names, and a semaphore for each place of `features`.
      sizes: of the call.
    """
    at = {"plan": plan, "u": u, "bounds": bounds, "c": c}
    at |= dict(zip([*sizes.buffers(), "arrived"], scratch, strict=True))
    _Tile(sizes, at).walk()
    index[...] = at["best_id"][...].astype(jnp.int32)
    best = at["best_score"][...]
    score[...] = jnp.where(best == 0, 0.0, best)  # never -0
