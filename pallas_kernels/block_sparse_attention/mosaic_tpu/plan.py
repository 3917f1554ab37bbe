"""How the entries of a chunk of queries are cut into pieces of one key block and one window."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.entries import Sizes, sort_entries
from pallas_kernels.segments import cut_at_multiples, most_pieces

# Rows of queries that a step works on. The products of 512 rows take less time than the step
# itself costs, and what they waste where a window has several blocks is far from the bound, which
# is memory.
_WINDOW_ROWS = 512
# bf16 rows come in tiles of 16, lanes in 128.
_SUBLANES, _LANES = 16, 128


def window_entries(groups: int) -> int:
    """Entries of a window: whole tiles of them, and whole rows of lanes with all their heads."""
    unit = max(_SUBLANES, _LANES // math.gcd(groups, _LANES))
    return max(unit, _WINDOW_ROWS // groups // unit * unit)


class Chunk(NamedTuple):
    """The entries of a chunk of queries, by token, sorted by block, and cut.

    Attributes:
      place: int32 [capacity, B, Hkv, chunk]: of each entry in the pattern; out of bounds if empty.
      value: likewise: the score bias; 0 if empty.
      filled: bool, likewise.
      sorted_place: int32, likewise: where the entry is when they are sorted.
      row: int32 [whole windows]: the row, in [B, chunk, Hkv], of each sorted entry; past the last
        one, the first one's, since what stands there must be harmless.
      sorted_value: [whole windows]: the score bias of each sorted entry.
      column: int32 [pieces]: the key block of each piece, in [B, Hkv, Nb].
      begin: int32 [pieces + 1]: the first sorted entry of each piece.
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    sorted_place: jax.Array
    row: jax.Array
    sorted_value: jax.Array
    column: jax.Array
    begin: jax.Array


@functools.partial(jax.named_call, name="plan_chunk")
def plan_chunk(first, indptr, indices, values, sizes: Sizes) -> Chunk:
    """Plans the chunk of queries that begins with token `first`.

    Args:
      first: int32 [].
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: [B, Hkv, E].
      sizes: of the call.
    """
    entries = sort_entries(first[None], indptr, indices, values, sizes)
    width = window_entries(sizes.groups)
    most = most_pieces(sizes.columns, sizes.entries, width)
    pieces = cut_at_multiples(entries.starts, width, most)
    order = jnp.pad(entries.order, (0, -sizes.entries % width))
    order = jnp.where(jnp.arange(len(order)) < entries.starts[-1], order, order[0])
    token = order // sizes.capacity
    sequence, token = token // sizes.chunk, token % sizes.chunk
    b, h = sequence // sizes.heads, sequence % sizes.heads
    row = (b * sizes.chunk + token) * sizes.heads + h
    # To sort again is to invert; a scatter would take the entries one by one.
    sorted_place = jnp.argsort(entries.order, stable=False).astype(jnp.int32)
    by_token = entries.place, entries.value, entries.filled, sorted_place
    return Chunk(
        *(x.reshape(entries.place.shape[1:]).transpose(3, 0, 1, 2) for x in by_token),
        row, entries.value.ravel()[order], pieces.run, pieces.begin,
    )  # fmt: skip
