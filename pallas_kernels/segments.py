"""Runs of equal keys in sorted arrays, without a loop: a binary search is one of many launches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_LONG, _WIDTH = 2**17, 2**10


def first_places(keys: jax.Array, count: int) -> jax.Array:
    """Where the keys from each number on begin: `searchsorted(keys, arange(count + 1))`.

    Args:
      keys: integer [M], non-decreasing.
      count: at least 0.

    Returns:
      int32 [count + 1]: how many keys are less than 0, 1, ..., count.
    """
    place = jnp.arange(keys.shape[0], dtype=jnp.int32)
    begins = jnp.pad(keys[1:] != keys[:-1], (1, 0), constant_values=True)[: keys.shape[0]]
    first = jnp.full(count + 1, keys.shape[0], jnp.int32)
    key = jnp.where(begins & (keys >= 0), jnp.minimum(keys, count), count + 1)
    first = first.at[key].min(place, mode="drop")
    return _least_from(first)


def _least_from(x: jax.Array) -> jax.Array:
    """The minimum of each element of int32 [M] and those after it."""
    if len(x) <= _LONG:
        return lax.cummin(x, reverse=True)
    # At once, XLA makes so much code of it for a TPU that a million take minutes to compile.
    rows = jnp.pad(x, (0, -len(x) % _WIDTH), constant_values=jnp.iinfo(x.dtype).max)
    rows = lax.cummin(rows.reshape(-1, _WIDTH), axis=1, reverse=True)
    after = jnp.append(lax.cummin(rows[:, 0], reverse=True)[1:], rows[-1, -1])
    return jnp.minimum(rows, after[:, None]).ravel()[: len(x)]


class Tiles(NamedTuple):
    """Runs of a sorted array, cut into tiles.

    Attributes:
      run: int32 [tiles]: the run of each tile; some run for those past the last tile in use.
      place: int32 [tiles, width]: the places of a tile, past the run's end where it is shorter.
      inside: bool [tiles, width]: where they are not.
      starts: int32 [runs + 1]: the first tile of each run.
    """

    run: jax.Array
    place: jax.Array
    inside: jax.Array
    starts: jax.Array


def cut_runs(starts: jax.Array, size: int, width: int) -> Tiles:
    """Cuts runs into tiles of one run each.

    Args:
      starts: int32 [runs + 1], as `first_places` finds them.
      size: of the sorted array.
      width: places of a tile.

    Returns:
      As many tiles as there may be.
    """
    runs = len(starts) - 1
    tiles = size // width + min(runs, size)
    counts = -(-jnp.diff(starts) // width)
    tile_starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    run = jnp.repeat(jnp.arange(runs, dtype=jnp.int32), counts, total_repeat_length=tiles)
    tile = jnp.arange(tiles, dtype=jnp.int32) - tile_starts[run]
    place = (starts[run] + tile * width)[:, None] + jnp.arange(width, dtype=jnp.int32)
    return Tiles(run, place, place < starts[run + 1][:, None], tile_starts)


class Pieces(NamedTuple):
    """Runs of a sorted array, cut at multiples of a width.

    Attributes:
      run: int32 [pieces]: the run of each piece; past the last piece, that of the last.
      begin: int32 [pieces + 1]: the first place of each piece, where the one before it ends;
        past the last piece, where the runs end.
    """

    run: jax.Array
    begin: jax.Array


def most_pieces(runs: int, size: int, width: int) -> int:
    """How many pieces there may be of a sorted array."""
    return -(-size // width) - 1 + min(runs, size)


def cut_at_multiples(starts: jax.Array, width: int, most: int) -> Pieces:
    """Cuts runs into pieces of one run and one multiple of a width each, in ascending order.

    Args:
      starts: int32 [runs + 1], as `first_places` finds them.
      width: places between multiples.
      most: pieces to return, `most_pieces`.
    """
    runs = len(starts) - 1
    first = starts[:-1] // width
    counts = jnp.where(starts[1:] > starts[:-1], (starts[1:] - 1) // width - first + 1, 0)
    piece_starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    run = jnp.repeat(jnp.arange(runs, dtype=jnp.int32), counts, total_repeat_length=most)
    piece = jnp.arange(most, dtype=jnp.int32)
    begin = jnp.maximum(starts[run], (first[run] + piece - piece_starts[run]) * width)
    number = piece_starts[-1]
    run = jnp.where(piece < number, run, run[jnp.maximum(number - 1, 0)])
    begin = jnp.where(piece < number, begin, starts[-1])
    return Pieces(run, jnp.append(begin, starts[-1]))


def sum_runs(keys: jax.Array, rows: Any) -> Any:
    """Running sums that start anew where the key changes; the last of a run is the run's sum.

    The sums are always taken in the same order, in log2 M steps.

    Args:
      keys: integer [M], equal ones side by side.
      rows: a pytree of arrays [M, ...].

    Returns:
      The same tree.
    """

    def add(earlier, later):
        same = earlier[0] == later[0]
        total = jax.tree.map(lambda x, y: choose_rows(same, x + y, y), earlier[1], later[1])
        return later[0], total

    return lax.associative_scan(add, (keys, rows))[1]


def choose_rows(condition: jax.Array, x: jax.Array, y: jax.Array | float) -> jax.Array:
    """`where` for a condition [M] and arrays [M, ...]."""
    return jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)
