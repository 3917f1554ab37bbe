"""The best candidates of each of 64 queries, in registers.

Numbers are f32, which counts exactly up to 2^24: the compiler has no reductions of integers.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
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


def any_better(top, best: Best):
    """Whether any row's score is better than its worst. All warps meet here."""
    return jnp.max(jnp.where(top > best.worst, 1.0, 0.0)) > 0


def take_best(scores, numbers, origin, best: Best) -> Best:
    """The best of `best` and of scores [64, N].

    Args:
      scores: f32.
      numbers: of the columns, f32 [64, N], ascending.
      origin: what is added to a column's number.
      best: candidates with lower numbers.
    """

    def goes_on(state):
        _, top, best = state
        return any_better(top, best)

    def take(state):
        scores, top, best = state
        first = lowest(scores == along_rows(top, scores.shape), numbers)
        best = insert(best, top, origin + first)
        scores = jnp.where(numbers == along_rows(first, scores.shape), -jnp.inf, scores)
        return scores, scores.max(axis=1), best

    return lax.while_loop(goes_on, take, (scores, scores.max(axis=1), best))[2]


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
