"""The best candidates of each of 64 queries, in registers.

Numbers are f32, which counts exactly up to 2^24: the compiler has no reductions of integers.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.hopper import HALF, along_rows

NOTHING = 2.0**25  # beyond every number


class Best(NamedTuple):
    """The best candidates so far, in no order: f32 [64, K], and the worst score, f32 [64]."""

    score: jax.Array
    number: jax.Array
    worst: jax.Array


def columns(width: int):
    """The number of each column, f32 [64, width]."""
    shape = HALF, width
    number = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    return number.astype(jnp.float32)


def nothing(count: int) -> Best:
    """Lists of empty places: numbers -1, -2, ..., so that one is replaced at a time."""
    score = hopper.full((HALF, count), -jnp.inf)
    return Best(score, -1 - columns(count), hopper.full((HALF,), -jnp.inf, hopper.ROW))


def lowest(marked, number):
    """The lowest of the marked numbers of each row, f32 [rows]; NOTHING if none is marked."""
    return jnp.where(marked, number, NOTHING).min(axis=1)


def insert(best: Best, top, number) -> Best:
    """Puts a candidate of each row, f32 [64], in the place of the worst, if it is better."""
    shape = best.score.shape
    # Of equal scores the one with the highest number gives way.
    worst = jnp.where(best.score == along_rows(best.worst, shape), best.number, -NOTHING)
    replaced = best.number == along_rows(worst.max(axis=1), shape)
    replaced &= along_rows(top > best.worst, shape)
    score = jnp.where(replaced, along_rows(top, shape), best.score)
    number = jnp.where(replaced, along_rows(number, shape), best.number)
    return Best(score, number, score.min(axis=1))


def take_best(scores, numbers, origin, best: Best) -> Best:
    """The best of `best` and of scores [64, N].

    Args:
      scores: f32.
      numbers: f32 [64, N], all different where a score is not -inf.
      origin: what is added to them.
      best: the lists; none of their candidates is as good as one of these with a lower number.
    """

    def goes_on(state):
        _, top, best = state
        return hopper_lanes.any_of_warp(top > best.worst)

    def take(state):
        scores, top, best = state
        first = lowest(scores == along_rows(top, scores.shape), numbers)
        best = insert(best, top, origin + first)
        scores = jnp.where(numbers == along_rows(first, scores.shape), -jnp.inf, scores)
        return scores, scores.max(axis=1), best

    return lax.while_loop(goes_on, take, (scores, scores.max(axis=1), best))[2]


class Waiting(NamedTuple):
    """Candidates that are not in a list yet, one in each column at most: f32 [64, N] both."""

    score: jax.Array
    number: jax.Array


def none_waiting(width: int) -> Waiting:
    """Of no candidates."""
    return Waiting(hopper.full((HALF, width), -jnp.inf), hopper.full((HALF, width), -1))


def add(scores, numbers, waiting: Waiting, best: Best) -> tuple[Waiting, Best]:
    """Lets candidates wait, and makes room for those that may not be forgotten.

    Of two candidates in a column the better one waits; the other is forgotten, unless it is better
    than the worst of its list: as long as there is such a one in any row, the best that waits in
    each row goes to its list. So fewer rounds are taken than if all went there at once: as many as
    the rows need on average, more or less, not as the one that needs most.

    Args:
      scores: f32 [64, N].
      numbers: f32 [64, N], higher than all before. So what goes to a list from a row is always the
        best that waits there, and of equal scores the lowest number: a list never has a candidate
        that is as good as a forgotten one, but has a higher number.
      waiting: candidates of before.
      best: the lists.
    """
    shape = scores.shape
    later = scores > waiting.score

    def goes_on(state):
        _, _, top, best = state
        return hopper_lanes.any_of_warp(top > best.worst)

    def take(state):
        (score, number), (other, other_number), _, best = state
        top = score.max(axis=1)
        first = lowest(score == along_rows(top, shape), number)
        taken = number == along_rows(first, shape)
        waiting = Waiting(jnp.where(taken, other, score), jnp.where(taken, other_number, number))
        other = jnp.where(taken, -jnp.inf, other)
        best = insert(best, top, first)
        return waiting, Waiting(other, other_number), other.max(axis=1), best

    others = Waiting(
        jnp.where(later, waiting.score, scores), jnp.where(later, waiting.number, numbers)
    )
    waiting = Waiting(
        jnp.where(later, scores, waiting.score), jnp.where(later, numbers, waiting.number)
    )
    state = waiting, others, others.score.max(axis=1), best
    waiting, _, _, best = lax.while_loop(goes_on, take, state)
    return waiting, best


def ascending(number):
    """The numbers of each row that are not negative, in ascending order; after them NOTHING."""
    shape = number.shape
    places = columns(shape[1])

    def place(n, state):
        last, to = state
        last = lowest(number > along_rows(last, shape), number)
        return last, jnp.where(places == n.astype(jnp.float32), along_rows(last, shape), to)

    state = hopper.full(shape[:1], -1, hopper.ROW), hopper.full(shape, 0)
    return lax.fori_loop(0, shape[1], place, state)[1]


def by_score(scores, numbers, count: int):
    """The best `count` of each row by descending score, then by ascending number: f32 [64, count].

    Args:
      scores: f32 [64, N].
      numbers: f32 [64, N], all different.
      count: at most N.
    """
    places, wide, narrow = columns(count), scores.shape, (HALF, count)

    def place(n, state):
        scores, to_score, to_number = state
        top = scores.max(axis=1)
        first = lowest(scores == along_rows(top, wide), numbers)
        here = places == n.astype(jnp.float32)
        to_score = jnp.where(here, along_rows(top, narrow), to_score)
        to_number = jnp.where(here, along_rows(first, narrow), to_number)
        scores = jnp.where(numbers == along_rows(first, wide), -jnp.inf, scores)
        return scores, to_score, to_number

    zeros = hopper.full(narrow, 0)
    return lax.fori_loop(0, count, place, (scores, zeros, zeros))[1:]
