"""The best candidates of each of 64 queries, of many that come step by step.

What is worse than K others is soon known: of every two columns the best score so far is kept, and
what is worse than the best of K such pairs can be forgotten. The others are in lists in shared
memory, which are looked at again when they may have grown by half, and in the end.
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
_AT_ONCE = HALF // 4  # candidates of a list that the last ranking takes: K or more
_TOGETHER = 4  # candidates of a list that are ranked at a time, when there are too many


class State(NamedTuple):
    """What is known after some steps.

    Attributes:
      due: int32, the step from which on the lists are to be shortened again. They are at the same
        time in all warps, since one that does it alone holds up the others.
      best: f32 [64, 32], the best score of columns n and n + 32.
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
        hopper.full((HALF, HALF // 2), -jnp.inf),
        _no_counts(),
        hopper.full((HALF,), hopper.LOWEST, row),
        hopper.full((HALF,), -jnp.inf, row),
    )


def add(tile, scores, origin, state: State) -> State:
    """Adds the candidates of a step, for which there must be room. There are no branches in it.

    Args:
      tile: of `thread_lists`, that of this warpgroup.
      scores: f32 [64, 64].
      origin: f32, the number of column 0, higher than all before; the others follow.
      state: of before.
    """
    origin = hopper.full((HALF,), origin, hopper.ROW)
    filled = thread_lists.put(tile, scores, origin, state.enter, state.filled)
    pairs = jnp.maximum(scores[:, : HALF // 2], scores[:, HALF // 2 :])
    return state._replace(best=jnp.maximum(state.best, pairs), filled=filled)


def make_room(tile, step, state: State, count: int) -> State:
    """Makes room for the candidates of a further step.

    Args:
      tile: likewise.
      step: how many steps there were before the last one, int32.
      state: of before.
      count: K, how many are wanted, 8 or 16.
    """
    due = step >= state.due
    state = _shorten_if(due, tile, _FULL, state, count)
    # Steps 0, 1, 2, 4, 7, 12, 20 and so on.
    return state._replace(due=jnp.where(due, step + 1 + ((step * 5) >> 3), state.due))


def _shorten_if(forced, tile, most: int, state: State, count: int) -> State:
    """Shortens the lists if it must be, or if one is longer than it may be."""
    needed = forced | _any_longer(state.filled, most)
    shorten = functools.partial(_shorten, tile, most, state, count)
    return lax.cond(needed, shorten, lambda: state)


def _any_longer(filled, most: int):
    return hopper_lanes.any_of_warp(filled > most)


def _shorten(tile, most: int, state: State, count: int) -> State:
    """Forgets what is worse than the best of K pairs, or if that is not enough, than K others."""
    stay = jnp.maximum(state.stay, hopper_lanes.highest_of_rows(state.best, count))
    filled = _drop(tile, state.filled, stay)
    state = state._replace(filled=filled, enter=jnp.maximum(state.enter, stay), stay=stay)
    forget_all = functools.partial(_forget_all, tile, state, count)
    return lax.cond(_any_longer(filled, most), forget_all, lambda: state)


def _drop(tile, filled, stay):
    return thread_lists.drop(tile, stay, hopper.full((HALF,), NOTHING, hopper.ROW), filled)


def _forget_all(tile, state: State, count: int) -> State:
    """Keeps the K best. Of later ones only better ones come into question."""
    score, number = _ranked(tile, state.filled, count)
    worst = score.min(axis=1)
    shape = score.shape
    last = jnp.where(score == hopper.along_rows(worst, shape), number, -NOTHING).max(axis=1)
    return state._replace(
        filled=thread_lists.drop(tile, worst, last, state.filled),
        enter=jnp.maximum(state.enter, _next_above(worst)),
        stay=jnp.maximum(state.stay, worst),
    )


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
    state = _shorten_if(False, tile, _AT_ONCE, state, count)
    scores, _ = thread_lists.load(tile, state.filled, _no_counts(), _AT_ONCE)
    filled = _drop(tile, state.filled, hopper_lanes.highest_of_rows(scores, count))
    state = state._replace(filled=filled)
    # Without ties that is all.
    too_many = hopper_lanes.any_of_warp(filled.astype(jnp.float32).sum(axis=1) > count)
    forget_all = functools.partial(_forget_all, tile, state, count)
    state = lax.cond(too_many, forget_all, lambda: state)
    return thread_lists.merge(tile, state.filled, count)
