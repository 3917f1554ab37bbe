"""The best candidates of each of 64 queries, of many that come step by step.

What is worse than K others is soon known: of each column the best score so far is kept, and what is
worse than the best of K columns can be forgotten. The others are in lists in shared memory, which
are looked at again when they may have grown by half, and in the end.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.block_selection.mosaic_gpu import lists, thread_lists
from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.block_selection.mosaic_gpu.thread_lists import COUNTS, DEPTH
from pallas_kernels.hopper import HALF

_FULL = DEPTH - HALF // 4  # candidates of a list that leave room for those of a step
_TOGETHER = 4  # candidates of a list that are ranked at a time


class State(NamedTuple):
    """What is known after some steps.

    Attributes:
      due: int32, the step from which on the lists are to be shortened again. They are at the same
        time in all warps, since one that does it alone holds up the others.
      best: f32 [64, 64], the best score of each column.
      filled: int32 `COUNTS`, how many candidates the lists have: at most `_FULL`.
      enter: f32 [64], the lowest score with which a candidate may still be one of the K best.
      stay: f32 [64], the lowest score with which one of those in the lists may be.
    """

    due: jax.Array
    best: jax.Array
    filled: jax.Array
    enter: jax.Array
    stay: jax.Array


def _no_counts():
    return plgpu.layout_cast(jnp.zeros(COUNTS, jnp.int32), plgpu.Layout.WGMMA)


def nothing() -> State:
    """Before the first step."""
    row = hopper.ROW
    return State(
        jnp.int32(0),
        hopper.full((HALF, HALF), -jnp.inf),
        _no_counts(),
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
    due = step >= state.due
    origin = hopper.full((HALF,), origin, hopper.ROW)
    filled = thread_lists.put(tile, scores, origin, state.enter, state.filled)
    known = filled, state.enter, state.stay
    make_room = functools.partial(_make_room, tile, best, *known, count)
    known = lax.cond(due | _is_full(filled), make_room, lambda: known)
    # Steps 0, 1, 2, 4, 7, 12, 20 and so on.
    return State(jnp.where(due, step + 1 + ((step * 5) >> 3), state.due), best, *known)


def _is_full(filled):
    return hopper_lanes.any_of_warp(filled > _FULL)


def _make_room(tile, best, filled, enter, stay, count: int):
    """Forgets what is worse than the best of K columns, or if that is not enough, than K others.

    Returns:
      filled, enter and stay.
    """
    stay = jnp.maximum(stay, hopper_lanes.highest_of_rows(best, count))
    known = _shorten(tile, filled, stay), jnp.maximum(enter, stay), stay
    forget_all = functools.partial(_forget_all, tile, *known, count)
    return lax.cond(_is_full(known[0]), forget_all, lambda: known)


def _shorten(tile, filled, stay):
    return thread_lists.drop(tile, stay, hopper.full((HALF,), NOTHING, hopper.ROW), filled)


def _forget_all(tile, filled, enter, stay, count: int):
    """Keeps the K best. Of later ones only better ones come into question."""
    score, number = _ranked(tile, filled, count)
    worst = score.min(axis=1)
    shape = score.shape
    last = jnp.where(score == hopper.along_rows(worst, shape), number, -NOTHING).max(axis=1)
    filled = thread_lists.drop(tile, worst, last, filled)
    return filled, jnp.maximum(enter, _next_above(worst)), jnp.maximum(stay, worst)


def _ranked(tile, filled, count: int):
    """Scores and numbers of the K best, f32 [64, K]: -inf and anything where there are fewer."""

    def goes_on(state):
        return hopper_lanes.any_of_warp(filled > state[0])

    def rank(state):
        first, *best = state
        found = thread_lists.load(tile, filled, first, _TOGETHER)
        together = (jnp.concatenate(x, axis=1) for x in zip(best, found, strict=True))
        return first + _TOGETHER, *lists.by_score(*together, count)

    empty = hopper.full((HALF, count), -jnp.inf), hopper.full((HALF, count), NOTHING)
    return lax.while_loop(goes_on, rank, (_no_counts(), *empty))[1:]


def _next_above(x):
    """The lowest f32 above each number; -inf counts, too."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # no -0
    return lax.bitcast_convert_type(jnp.where(bits >= 0, bits + 1, bits - 1), jnp.float32)


def numbers(tile, state: State, count: int):
    """The numbers of the K best in ascending order, f32 [64, K]; `NOTHING` where there are fewer.

    Of equal scores the lower number is better.
    """
    scores, _ = thread_lists.load(tile, state.filled, _no_counts(), _FULL)
    filled = _shorten(tile, state.filled, hopper_lanes.highest_of_rows(scores, count))
    # Without ties that is all.
    too_many = hopper_lanes.any_of_warp(filled.astype(jnp.float32).sum(axis=1) > count)
    known = filled, state.enter, state.stay
    forget_all = functools.partial(_forget_all, tile, *known, count)
    known = lax.cond(too_many, forget_all, lambda: known)
    return thread_lists.merge(tile, known[0], count)
