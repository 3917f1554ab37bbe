"""Selection of the best blocks on Hopper GPUs (Pallas Mosaic GPU, sm_90): exact and streaming.

A tile of 64 queries walks over its blocks, 64 a step. A warpgroup keeps the best of each query in
registers, and as long as any query's best score of the step beats the worst of its
list, all queries take that score out of the step and, where it is better, into the list. Scores
never reach device memory. A thread block is one warpgroup, since the reduction that asks
whether any query goes on has one place in shared memory; four of them share a multiprocessor.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import hopper, tuning
from pallas_kernels.block_selection import xla
from pallas_kernels.block_selection.gradients import select_bwd
from pallas_kernels.hopper import HALF

_STEP = 64  # blocks
_MOST = 64  # blocks that a query selects
_NOTHING = 2.0**25  # beyond every block: f32 counts exactly up to 2^24


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is cut.

    Attributes:
      stages: steps in shared memory at a time.
      programs: thread blocks at most.
    """

    stages: int = 3
    programs: int = 4 * hopper.MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What is static about a call; `count` is a multiple of 8."""

    batch: int
    tokens: int
    heads: int
    dim: int
    count: int

    @property
    def tiles(self):
        return -(-self.tokens // HALF)

    @property
    def items(self):
        return self.batch * self.tiles * self.heads


def _plan(start, limit, sizes: _Sizes):
    """int32 [B, tiles, 3, 64]: the starts and the limits of a tile's queries, and its walk.

    The walk: its first block, its steps, and the first and last step that all queries see whole.
    """
    shape = sizes.batch, sizes.tiles, HALF
    start, limit = (hopper.pad(x, 1, HALF).reshape(shape) for x in (start, limit))
    first = jnp.min(jnp.where(start < limit, start, jnp.iinfo(jnp.int32).max), axis=2)
    last = jnp.max(jnp.where(start < limit, limit, 0), axis=2)
    first = jnp.minimum(first, last) // 8 * 8
    steps = (last - first + _STEP - 1) // _STEP
    whole_first = jnp.clip((jnp.max(start, axis=2) - first + _STEP - 1) // _STEP, 0, steps)
    whole_last = jnp.clip((jnp.min(limit, axis=2) - first) // _STEP, whole_first, steps)
    walk = jnp.stack([first, steps, whole_first, whole_last], axis=-1)
    walk = jnp.pad(walk, [(0, 0), (0, 0), (0, HALF - 4)])
    return jnp.stack([start, limit, walk], axis=2)


def _columns(shape):
    """The number of each column, as f32, which counts exactly up to 2^24."""
    number = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return number.astype(jnp.float32)


def _lowest_column(marked):
    """The first marked column of each row, f32 [rows]."""
    return -jnp.where(marked, -_columns(marked.shape), -_NOTHING).max(axis=1)


class _Walk:
    """A warpgroup that walks, for each of its tiles of queries, over their blocks.

    `at` has the references: u, c, plan, index and score in device memory; u_tile, plan_tile,
    c_tile, index_tile and score_tile in shared memory; and the barriers of what is copied there.
    """

    def __init__(self, sizes: _Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.own_items = hopper.share(sizes.items, at)

    def run(self):
        """Selects for item after item."""
        lax.fori_loop(0, self.own_items, self._select_item, jnp.int32(0))

    def _locate(self, i):
        """(batch element, tile, KV head) of this block's item i."""
        item = self.at.program + i * self.at.programs
        tile = lax.div(item, self.sizes.heads)
        b, tile = lax.div(tile, self.sizes.tiles), lax.rem(tile, self.sizes.tiles)
        return b, tile, lax.rem(item, self.sizes.heads)

    def _select_item(self, i, turn):
        at, copy, stages = self.at, plgpu.copy_gmem_to_smem, self.config.stages
        b, tile, h = self._locate(i)
        tokens = pl.ds(pl.multiple_of(tile * HALF, HALF), HALF)
        copy(at.plan.at[b, tile], at.plan_tile, at.u_ready)
        copy(at.u.at[b, tokens, h], at.u_tile, at.u_ready)
        plgpu.barrier_wait(at.u_ready)
        starts, limits = (plgpu.load(at.plan_tile.at[n], layout=hopper.ROW) for n in (0, 1))
        first, steps, whole_first, whole_last = (at.plan_tile[2, n] for n in range(4))

        def load(j):
            slot = lax.rem(turn + j, stages)
            blocks = pl.ds(pl.multiple_of(first + j * _STEP, 8), _STEP)
            copy(at.c.at[b, blocks, h], at.c_tile.at[slot], at.c_ready.at[slot])

        pl.loop(0, jnp.minimum(steps, stages))(load)

        def step(masked, j, best):
            origin = first + j * _STEP
            slot = lax.rem(turn + j, stages)
            plgpu.barrier_wait(at.c_ready.at[slot])
            features = hopper.transposed(at.c_tile.at[slot])
            scores = hopper.multiply(at.u_tile, features, (HALF, _STEP))
            if masked:
                scores = hopper.keep(scores, 1, starts - origin, limits - origin)
            best = _take_best(scores, origin.astype(jnp.float32), best)
            # All warps have met since they read this slot: to ask whether any query goes on.
            pl.when(j + stages < steps)(lambda: load(j + stages))
            return best

        best = lax.fori_loop(0, whole_first, functools.partial(step, True), self._nothing())
        best = lax.fori_loop(whole_first, whole_last, functools.partial(step, False), best)
        best = lax.fori_loop(whole_last, steps, functools.partial(step, True), best)
        score, index = _sorted(best.score, best.block)
        plgpu.wait_smem_to_gmem(0)  # of the item before
        at.score_tile[...] = score
        at.index_tile[...] = jnp.maximum(index, -1.0).astype(jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.score_tile, at.score.at[b, tokens, h])
        plgpu.copy_smem_to_gmem(at.index_tile, at.index.at[b, tokens, h])
        pl.when(i == self.own_items - 1)(lambda: plgpu.wait_smem_to_gmem(0))
        return turn + steps

    def _nothing(self):
        """Lists of empty places: blocks -1, -2, ..., so that one is replaced at a time."""
        shape = HALF, self.sizes.count
        score = hopper.full(shape, -jnp.inf)
        return _Best(score, -1 - _columns(shape), hopper.full((HALF,), -jnp.inf, hopper.ROW))


class _Best(NamedTuple):
    """The best blocks of each query so far, in no order: f32 [64, K], and the worst score [64]."""

    score: jax.Array
    block: jax.Array
    worst: jax.Array


def _take_best(scores, origin, best: _Best) -> _Best:
    """The best of `best` and of scores [64, 64], of blocks that begin at `origin`."""

    def goes_on(state):
        _, top, best = state
        return jnp.max(jnp.where(top > best.worst, 1.0, 0.0)) > 0

    def take(state):
        scores, top, (score, block, worst) = state
        wide, narrow = scores.shape, score.shape
        column = _lowest_column(scores == hopper.along_rows(top, wide))
        # Of equal scores the one with the highest index gives way.
        candidates = jnp.where(score == hopper.along_rows(worst, narrow), block, -_NOTHING)
        replaced = block == hopper.along_rows(candidates.max(axis=1), narrow)
        replaced = replaced & hopper.along_rows(top > worst, narrow)
        score = jnp.where(replaced, hopper.along_rows(top, narrow), score)
        block = jnp.where(replaced, hopper.along_rows(origin + column, narrow), block)
        taken = _columns(wide) == hopper.along_rows(column, wide)
        scores = jnp.where(taken, -jnp.inf, scores)
        return scores, scores.max(axis=1), _Best(score, block, -(-score).max(axis=1))

    return lax.while_loop(goes_on, take, (scores, scores.max(axis=1), best))[2]


def _sorted(score, index):
    """The columns of a list by descending score, then by ascending index."""
    shape = score.shape

    def place(n, state):
        score, index, to_score, to_index = state
        top = score.max(axis=1)
        ties = jnp.where(score == hopper.along_rows(top, shape), index, _NOTHING)
        first = hopper.along_rows(-(-ties).max(axis=1), shape)
        here = _columns(shape) == n.astype(jnp.float32)
        to_score = jnp.where(here, hopper.along_rows(top, shape), to_score)
        to_index = jnp.where(here, first, to_index)
        taken = index == first
        score, index = jnp.where(taken, -jnp.inf, score), jnp.where(taken, _NOTHING, index)
        return score, index, to_score, to_index

    zeros = hopper.full(shape, 0)
    return lax.fori_loop(0, shape[1], place, (score, index, zeros, zeros))[2:]


def _scratch(sizes: _Sizes, config: Config):
    return {
        "u_tile": hopper.operand_tile((HALF, sizes.dim)),
        "plan_tile": plgpu.SMEM((3, HALF), jnp.int32),
        "c_tile": hopper.operand_tile((config.stages, _STEP, sizes.dim)),
        "index_tile": plgpu.SMEM((HALF, sizes.count), jnp.int32),
        "score_tile": plgpu.SMEM((HALF, sizes.count), jnp.float32),
        "u_ready": plgpu.Barrier(num_arrivals=2),
        "c_ready": plgpu.Barrier(num_barriers=config.stages),
    }


def _grid(dim: int) -> Iterator[Config]:
    for stages, share in itertools.product((2, 3, 4, 6), (1, 2, 4)):
        yield Config(stages, share * hopper.MULTIPROCESSORS)


KERNELS = {
    "select": tuning.Kernel(
        "block_selection",
        "select",
        (64, 128),
        default=lambda dim: Config(),
        grid=_grid,
        scratch=lambda dim, config: _scratch(_Sizes(1, 8, 1, dim, _MOST), config),
        reduces=True,
    )
}


def config_for(dim: int) -> Config:
    """How the kernel is cut for features of a width."""
    return tuning.choose(KERNELS["select"], dim)


def select(u, c, limit, start, *, count: int, config: Config):
    """index int32 and score f32 [B, T, Hkv, count] of a count that is a multiple of 8.

    Args:
      u: [B, T, Hkv, d].
      c: [B, Nb, Hkv, d].
      limit: int32 [B, T], at most Nb; T and Nb are multiples of 8.
      start: int32 [B, T], at least 0.
      count: K.
      config: of the kernel.
    """
    sizes = _Sizes(*u.shape, count)
    best = sizes.batch, sizes.tokens, sizes.heads, count
    results = hopper.launch(
        "select_blocks",
        lambda at: _Walk(sizes, config, at).run(),
        programs=min(config.programs, sizes.items),
        warpgroups=1,
        operands={"u": u, "c": c, "plan": _plan(start, limit, sizes)},
        outputs={
            "index": jax.ShapeDtypeStruct(best, jnp.int32),
            "score": jax.ShapeDtypeStruct(best, jnp.float32),
        },
        scratch=_scratch(sizes, config),
    )
    return results["index"], results["score"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _select(u, c, limit, start, count):
    tokens, width = u.shape[1], -(-count // 8) * 8
    padded = [hopper.pad(x, 1, 8) for x in (u, c, limit, start)]
    config = config_for(u.shape[3])
    find = hopper.batchable(functools.partial(select, count=width, config=config))
    index, score = find(*padded)
    return index[:, :tokens, :, :count], score[:, :tokens, :, :count]


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
