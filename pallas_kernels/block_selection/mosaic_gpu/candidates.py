"""The best candidates of each of 64 queries, of many that come step by step.

What is worse than K others is soon known: of each column the best score so far is kept, and where
K columns have scores as good as some, worse ones can be forgotten. What is not goes to lists in
shared memory, and is looked at again only when one of them is full, and in the end.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.block_selection.mosaic_gpu import lists, thread_lists
from pallas_kernels.block_selection.mosaic_gpu.thread_lists import COUNTS, DEPTH, NOTHING
from pallas_kernels.hopper import HALF

_LANES = 4  # threads that share a row
_FULL = DEPTH - HALF // _LANES  # candidates of a list that leave room for those of a step
_EARLY, _SELDOM = 4, 4  # the first steps, and of the later ones every so many, look at all columns


class State(NamedTuple):
    """What is known after some steps.

    Attributes:
      best: f32 [64, 64], the best score of each column.
      filled: int32 `COUNTS`, how many candidates the lists have.
      enter: f32 [64], the lowest score with which a candidate may still be one of the K best.
      stay: f32 [64], the lowest score with which one of those in the lists may be.
    """

    best: jax.Array
    filled: jax.Array
    enter: jax.Array
    stay: jax.Array


def nothing() -> State:
    """Before the first step."""
    row = hopper.ROW
    return State(
        hopper.full((HALF, HALF), -jnp.inf),
        plgpu.layout_cast(jnp.zeros(COUNTS, jnp.int32), plgpu.Layout.WGMMA),
        hopper.full((HALF,), hopper.LOWEST, row),
        hopper.full((HALF,), -jnp.inf, row),
    )


def add(tile, scores, step, origin, state: State, count: int) -> State:
    """Adds the candidates of a step.

    Args:
      tile: of `thread_lists`, that of this warpgroup.
      scores: f32 [64, 64].
      step: how many there were before, int32.
      origin: f32, the number of column 0, higher than all before; the others follow.
      state: of before.
      count: K, how many are wanted, 8 or 16.
    """
    best = jnp.maximum(state.best, scores)

    def bound():
        """In K columns there are scores at least as good: K / 4 of each thread's."""
        return hopper_lanes.rank_of_lanes(best, count // _LANES)

    look = (step < _EARLY) | (lax.rem(step, _SELDOM) == 0)
    stay = lax.cond(look, lambda: jnp.maximum(state.stay, bound()), lambda: state.stay)
    enter = jnp.maximum(state.enter, stay)
    origin = hopper.full((HALF,), origin, hopper.ROW)
    filled = thread_lists.put(tile, scores, origin, enter, state.filled)
    return State(best, *_make_room(tile, filled, enter, stay, count))


def _make_room(tile, filled, enter, stay, count: int):
    """Forgets candidates where a list is full; returns filled, enter and stay."""

    def forget():
        found = thread_lists.drop(tile, stay, hopper.full((HALF,), NOTHING, hopper.ROW), filled)
        forget_all = functools.partial(_forget_all, tile, found, enter, stay, count)
        return _if_full(found, forget_all, found, enter, stay)

    return _if_full(filled, forget, filled, enter, stay)


def _if_full(filled, then, *otherwise):
    full = hopper_lanes.any_of_warp(filled > _FULL)
    return lax.cond(full, then, lambda: otherwise)


def _forget_all(tile, filled, enter, stay, count: int):
    """Keeps the K best. Of later ones only better ones come into question."""
    score, number = _ranked(tile, filled, count, 4)
    worst = score.min(axis=1)
    shape = score.shape
    last = jnp.where(score == hopper.along_rows(worst, shape), number, -NOTHING).max(axis=1)
    filled = thread_lists.drop(tile, worst, last, filled)
    return filled, jnp.maximum(enter, _next_above(worst)), jnp.maximum(stay, worst)


def _ranked(tile, filled, count: int, depth: int):
    """Scores and numbers of the K best, f32 [64, K]: -inf and anything where there are fewer."""

    def goes_on(state):
        return hopper_lanes.any_of_warp(filled > state[0])

    def rank(state):
        first, *best = state
        found = thread_lists.load(tile, filled, first, depth)
        together = (jnp.concatenate(x, axis=1) for x in zip(best, found, strict=True))
        return first + depth, *lists.by_score(*together, count)

    first = plgpu.layout_cast(jnp.zeros(COUNTS, jnp.int32), plgpu.Layout.WGMMA)
    empty = hopper.full((HALF, count), -jnp.inf), hopper.full((HALF, count), NOTHING)
    return lax.while_loop(goes_on, rank, (first, *empty))[1:]


def _next_above(x):
    """The lowest f32 above each number; -inf counts, too."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # no -0
    return lax.bitcast_convert_type(jnp.where(bits >= 0, bits + 1, bits - 1), jnp.float32)


def numbers(tile, state: State, count: int):
    """The numbers of the K best, of equal scores the lower one, f32 [64, K]; `NOTHING` for none."""
    last = hopper.full((HALF,), NOTHING, hopper.ROW)
    filled = thread_lists.drop(tile, state.stay, last, state.filled)
    score, number = _ranked(tile, filled, count, _FULL)
    return jnp.where(score > -jnp.inf, number, NOTHING)
