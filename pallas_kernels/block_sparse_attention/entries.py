"""The entries of a chunk of queries: sorted by key block, and combined per query.

What the key-major implementations share: they attend entry by entry, an entry being one query
token and one block that it chose.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import first_places


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static about a call, whose queries are taken `chunk` tokens at a time."""

    batch: int
    heads: int  # of keys and values
    groups: int
    head_dim: int
    num_keys: int
    block_size: int
    num_blocks: int
    capacity: int
    chunk: int
    scale: float
    # As of `BlockCSR`; False looks up what could be known, and is right, too.
    regular: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def entries(self):
        """Entries of a chunk, empty ones included."""
        return self.batch * self.heads * self.chunk * self.capacity

    @property
    def columns(self):
        """Key blocks in all."""
        return self.batch * self.heads * self.num_blocks


class Entries(NamedTuple):
    """The entries of chunks of queries, [C, B, Hkv, chunk, capacity], and their order by column.

    An entry is numbered by its place in that array, a column by its place in [C, B, Hkv, Nb].

    Attributes:
      place: int32: of each entry in the pattern; out of bounds if empty.
      block: int32: the key block of a filled entry; anything if empty.
      value: the score bias; 0 if empty.
      filled: bool.
      order: int32 [entries]: the entry of each sorted place; empty ones stand at the end.
      starts: int32 [columns + 1]: first sorted place of each column.
    """

    place: jax.Array
    block: jax.Array
    value: jax.Array
    filled: jax.Array
    order: jax.Array
    starts: jax.Array


def find_entries(first, indptr, indices, values, sizes: Sizes):
    """(place, block, value, filled) of `Entries`.

    Args:
      first: the first token of each chunk, int32 [C]; tokens past the last have no entries.
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: [B, Hkv, E].
      sizes: of the call.
    """
    chunks = len(first)
    row = first[:, None] + jnp.arange(sizes.chunk + 1, dtype=jnp.int32)
    bounds = jnp.moveaxis(indptr[:, :, jnp.minimum(row, indptr.shape[-1] - 1)], 2, 0)
    place = bounds[..., :-1, None] + jnp.arange(sizes.capacity, dtype=jnp.int32)
    place = jnp.where(place < bounds[..., 1:, None], place, indices.shape[-1])
    if sizes.regular and indices.shape[-1]:
        tokens = indptr.shape[-1] - 1
        token = jnp.minimum(row[:, :-1], tokens - 1)

        def rows(x):
            x = x.reshape(sizes.batch, sizes.heads, tokens, sizes.capacity)
            return jnp.moveaxis(x[:, :, token], 2, 0)

        inside = (row[:, :-1] < tokens)[:, None, None, :, None]
        block = jnp.where(inside, rows(indices), -1)
        value = jnp.where(inside, rows(values), -jnp.inf)
        place = row[:, None, None, :-1, None] * sizes.capacity
        place = place + jnp.arange(sizes.capacity, dtype=jnp.int32)
    else:
        c, b, h = (x[..., None, None] for x in jnp.ogrid[:chunks, : sizes.batch, : sizes.heads])
        block = indices.at[b, h, place].get(mode="fill", fill_value=-1)
        value = values.at[b, h, place].get(mode="fill", fill_value=-jnp.inf)
    filled = (block >= 0) & (block < sizes.num_blocks) & (value != -jnp.inf)
    place = jnp.where(filled, place, indices.shape[-1])
    return place, block, jnp.where(filled, value, 0), filled


def sort_entries(first, indptr, indices, values, sizes: Sizes) -> Entries:
    """The entries of chunks; the sort is stable, so of a column the earlier queries come first.

    Arguments as of `find_entries`.
    """
    place, block, value, filled = find_entries(first, indptr, indices, values, sizes)
    chunks = len(first)
    c, b, h = (x[..., None, None] for x in jnp.ogrid[:chunks, : sizes.batch, : sizes.heads])
    columns = chunks * sizes.columns
    column = ((c * sizes.batch + b) * sizes.heads + h) * sizes.num_blocks + block
    column = jnp.where(filled, column, columns).ravel()
    order = jnp.argsort(column, stable=True).astype(jnp.int32)
    starts = first_places(column[order], columns)
    return Entries(place, block, value, filled, order, starts)


def combine(value, filled, out, lse, sizes: Sizes):
    """Normalised results of the entries of a chunk -> those of its queries.

    Args:
      value: the entries' biases, [B, Hkv, chunk, capacity].
      filled: whether they are not empty, likewise.
      out: [entries, groups, D], anything where an entry is empty.
      lse: f32 [entries, groups], likewise, without the entry's value.
      sizes: of the call.

    Returns:
      [B, chunk, Hkv, groups, D] and [B, chunk, Hkv, groups], of lse's type.
    """
    out, lse = (by_token(x, sizes) for x in (out, lse))
    value, filled = (jnp.moveaxis(x, 1, 2)[..., None] for x in (value, filled))
    return combine_by_token(value, filled, out, lse)


def combine_by_token(value, filled, out, lse):
    """As `combine`, of arrays [B, chunk, Hkv, capacity, ...]: value and filled [..., 1]."""
    weights, total, lse = weigh(lse + value, filled, axis=3)
    weighted = jnp.where(filled[..., None], weights[..., None] * out.astype(lse.dtype), 0)
    out = jnp.sum(weighted, axis=3) / total[..., None]
    return out, lse


def weigh(lse, filled, axis: int):
    """What normalised results weigh together; an axis goes over those that go together.

    Returns:
      The weights, like lse, 0 where not filled; and without the axis, what to divide them by, which
      is not 0, and the lse of all, -inf where none is filled.
    """
    lse = jnp.where(filled, lse, -jnp.inf)
    top = jnp.max(lse, axis=axis)
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(lse - jnp.expand_dims(top, axis))
    total = jnp.sum(weights, axis=axis)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return weights, total, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def by_token(x, sizes: Sizes):
    """[entries, groups, ...] -> [B, chunk, Hkv, capacity, groups, ...]."""
    shape = sizes.batch, sizes.heads, sizes.chunk, sizes.capacity
    return jnp.moveaxis(x.reshape(*shape, *x.shape[1:]), 1, 2)


def join_chunks(x, tokens: int):
    """Scanned [chunks, B, chunk, Hkv, groups, ...] -> [B, tokens, Hkv * groups, ...]."""
    chunks, batch, chunk, heads, groups = x.shape[:5]
    x = jnp.moveaxis(x, 0, 1).reshape(batch, chunks * chunk, heads * groups, *x.shape[5:])
    return x[:, :tokens]


def loop(count: int, step, state):
    """The state after `step(i, state)` for i < count; one step is taken without a loop."""
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)
