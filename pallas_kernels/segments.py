"""Runs of equal keys in sorted arrays, without a loop: a binary search is one of many launches."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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
    return lax.cummin(first, reverse=True)


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
