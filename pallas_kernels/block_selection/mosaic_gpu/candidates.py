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

_FULL = DEPTH - HALF // 4  # candidates of a list that leave room for those of a step
_EARLY = 2  # steps after which much can be forgotten


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
    stay = lax.cond(
        step < _EARLY,
        lambda: jnp.maximum(state.stay, hopper_lanes.highest_of_rows(best, count)),
        lambda: state.stay,
    )
    enter = jnp.maximum(state.enter, stay)
    origin = hopper.full((HALF,), origin, hopper.ROW)
    filled = thread_lists.put(tile, scores, origin, enter, state.filled)
    forget = functools.partial(_forget, tile, best, filled, enter, stay, count)
    return State(best, *_if_full(filled, forget, filled, enter, stay))


def _if_full(filled, then, *otherwise):
    full = hopper_lanes.any_of_warp(filled > _FULL)
    return lax.cond(full, then, lambda: otherwise)


def _forget(tile, best, filled, enter, stay, count: int):
    """Forgets candidates, as many as necessary; returns filled, enter and stay."""
    stay = jnp.maximum(stay, hopper_lanes.highest_of_rows(best, count))
    enter = jnp.maximum(enter, stay)
    filled = thread_lists.drop(tile, stay, hopper.full((HALF,), NOTHING, hopper.ROW), filled)
    forget_all = functools.partial(_forget_all, tile, filled, enter, stay, count)
    return _if_full(filled, forget_all, filled, enter, stay)


def _forget_all(tile, filled, enter, stay, count: int):
    """Keeps the K best. Of later ones only better ones come into question."""
    score, number = _ranked(tile, filled, count, 4)
    worst = score.min(axis=1)
    shape = score.shape
    last = jnp.where(score == hopper.along_rows(worst, shape), number, -NOTHING).max(axis=1)
    filled = thread_lists.drop(tile, worst, last, filled)
    return filled, jnp.maximum(enter, _next_above(worst)), jnp.maximum(stay, worst)


def _ranked(tile, filled, count: int, depth: int):
    """Scores and numbers of the K best, f32 [64, K]: -inf and anything where there are fewer.

    Looks at `depth` candidates of each list at a time.
    """

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
    filled, *_ = _forget(tile, *state, count)
    score, number = _ranked(tile, filled, count, 12)
    return jnp.where(score > -jnp.inf, number, NOTHING)
