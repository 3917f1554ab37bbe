"""What `thread_lists` of the selection does thread by thread, done for all threads at once."""

import jax.numpy as jnp

from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.block_selection.mosaic_gpu.thread_lists import COUNTS, DEPTH
from pallas_kernels.hopper import HALF

_LANES = 4  # threads that share a row


def highest_of_rows(x, rank):
    """See `hopper_lanes.highest_of_rows`."""
    return jnp.sort(x, axis=1)[:, -rank]


def put(tile, scores, origin, enter, filled):
    """See `thread_lists.put`."""
    numbers = origin[:, None] + jnp.arange(scores.shape[1], dtype=jnp.float32)
    added = _by_lane(scores) >= enter[:, None, None]
    entries = jnp.stack([_by_lane(scores), _by_lane(numbers)], axis=-1)
    found = jnp.concatenate([_lists(tile), entries], axis=2)
    kept = jnp.concatenate([_is_filled(filled), added], axis=2)
    return _write(tile, found, kept)


def drop(tile, stay, last, filled):
    """See `thread_lists.drop`."""
    found = _lists(tile)
    score, number = found[..., 0], found[..., 1]
    stay, last = stay[:, None, None], last[:, None, None]
    kept = (score > stay) | (score == stay) & (number <= last)
    return _write(tile, found, kept & _is_filled(filled))


def load(tile, filled, first, depth):
    """See `thread_lists.load`."""
    place = first[0, 0] + jnp.arange(depth)
    found = jnp.take(_lists(tile), jnp.minimum(place, DEPTH - 1), axis=2)
    there = place < filled[:, ::2, None]
    results = (jnp.where(there, found[..., i], x) for i, x in enumerate((-jnp.inf, NOTHING)))
    return tuple(
        x.reshape(HALF, _LANES, -1, 2).transpose(0, 2, 1, 3).reshape(HALF, -1) for x in results
    )


def merge(tile, filled, count):
    """See `thread_lists.merge`."""
    numbers = jnp.where(_is_filled(filled), _lists(tile)[..., 1], NOTHING)
    return jnp.sort(numbers.reshape(HALF, -1), axis=1)[:, :count]


def _by_lane(x):
    """What the four threads of each row have of a matrix: [64, N] -> [64, 4, N / 4]."""
    return x.reshape(HALF, -1, _LANES, 2).transpose(0, 2, 1, 3).reshape(HALF, _LANES, -1)


def _lists(tile):
    """Scores and numbers of the lists, f32 [64, 4, DEPTH, 2]."""
    x = tile[...].reshape(2, 2, DEPTH, 4, 8, _LANES)  # half, kind, entry, warp, row, thread
    return x.transpose(3, 0, 4, 5, 2, 1).reshape(HALF, _LANES, DEPTH, 2)


def _is_filled(filled):
    return jnp.arange(DEPTH) < filled[:, ::2, None]


def _write(tile, found, kept):
    """Writes what is kept [64, 4, n] of entries [64, 4, n, 2], and returns how many there are."""
    order = jnp.argsort(~kept, axis=2, stable=True)[:, :, :DEPTH]
    lists = jnp.take_along_axis(found, order[..., None], axis=2)
    x = lists.reshape(4, 2, 8, _LANES, DEPTH, 2).transpose(1, 5, 4, 0, 2, 3)
    tile[...] = x.reshape(tile.shape)
    count = kept.sum(axis=2, dtype=jnp.int32)
    return jnp.stack([count, jnp.zeros_like(count)], axis=-1).reshape(COUNTS)
