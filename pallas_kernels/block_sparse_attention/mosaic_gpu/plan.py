"""How the entries of a pattern are cut into tiles that share a key block."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.csr import BlockCSR

HEADER = 8  # numbers of a tile's description before those of its entries
BATCH, HEAD, BLOCK, TURN, FIRST, LAST = range(6)  # their places


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
      stages: tiles of queries in shared memory at a time.
      key_stages: key blocks in shared memory at a time.
      programs: thread blocks.
    """

    stages: int
    key_stages: int = 2
    programs: int = 132


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static about a call; `groups` are query heads of a KV head, padding included."""

    batch: int
    tokens: int
    num_kv_heads: int
    groups: int
    head_dim: int
    num_keys: int
    block_size: int
    num_blocks: int
    capacity: int
    chunk: int
    scale: float

    @property
    def entries(self):
        """Entries of a chunk of queries, empty ones included."""
        return self.batch * self.num_kv_heads * self.chunk * self.capacity

    @property
    def columns(self):
        """Key blocks in all."""
        return self.batch * self.num_kv_heads * self.num_blocks


class Chunk(NamedTuple):
    """The entries of a chunk of queries, and their tiles.

    Attributes:
      place: int32 [B, Hkv, chunk, capacity]: of each entry in the pattern; out of bounds if empty.
      value: f32, likewise: the score bias; 0 if empty.
      filled: bool, likewise.
      tiles: int32 [tiles, HEADER + 2 R]: batch element, KV head, block, the block's number among
        those that have entries, the block's first and last tile; then the tokens of the tile's R
        entries, then their numbers in [B, Hkv, chunk, capacity], or -1 for none.
      num_tiles: int32 [1]: how many tiles there are.
      used: bool [B * Hkv * blocks]: whether a block has entries.
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    tiles: jax.Array
    num_tiles: jax.Array
    used: jax.Array


@functools.partial(jax.named_call, name="plan_chunk")
def plan_chunk(index, indptr, indices, values, sizes: Sizes, width: int) -> Chunk:
    """Plans a chunk of queries.

    Args:
      index: of the chunk.
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: f32 [B, Hkv, E].
      sizes: of the call.
      width: R, entries of a tile.
    """
    place, value, filled, block = _entries(index, indptr, indices, values, sizes)
    b, h = jnp.ogrid[: sizes.batch, : sizes.num_kv_heads]
    row = (b * sizes.num_kv_heads + h)[..., None, None]
    column = jnp.where(filled, row * sizes.num_blocks + block, sizes.columns).ravel()
    order = jnp.argsort(column, stable=True).astype(jnp.int32)
    boundaries = jnp.arange(sizes.columns + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(column[order], boundaries).astype(jnp.int32)
    counts = -(-jnp.diff(starts) // width)
    tile_starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    turns = jnp.cumsum(counts > 0, dtype=jnp.int32) - 1

    tiles = sizes.entries // width + min(sizes.columns, sizes.entries)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    column = jnp.searchsorted(tile_starts, tile, side="right").astype(jnp.int32) - 1
    column = jnp.minimum(column, sizes.columns - 1)  # of tiles past the last, which nobody reads
    member = jnp.arange(width, dtype=jnp.int32)
    sorted_place = (starts[column] + (tile - tile_starts[column]) * width)[:, None] + member
    some = sorted_place < starts[column + 1][:, None]
    # A tile's first entry stands for the missing ones: what they load must be harmless.
    entry = order.at[jnp.where(some, sorted_place, sorted_place[:, :1])].get(mode="clip")
    token = entry // sizes.capacity % sizes.chunk + index * sizes.chunk
    row, block = column // sizes.num_blocks, column % sizes.num_blocks
    numbers = [
        row // sizes.num_kv_heads,
        row % sizes.num_kv_heads,
        block,
        turns[column],
        tile_starts[column],
        tile_starts[column + 1] - 1,
    ]
    header = jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, HEADER - len(numbers))])
    described = jnp.concatenate([header, token, jnp.where(some, entry, -1)], axis=1)
    described = described.astype(jnp.int32)
    return Chunk(place, value, filled, described, tile_starts[-1:], counts > 0)


def _entries(index, indptr, indices, values, sizes: Sizes):
    """(place, value, filled, block) of a chunk's entries, [B, Hkv, chunk, capacity]."""
    row = index * sizes.chunk + jnp.arange(sizes.chunk + 1, dtype=jnp.int32)
    bounds = indptr[:, :, jnp.minimum(row, sizes.tokens)]
    place = bounds[..., :-1, None] + jnp.arange(sizes.capacity, dtype=jnp.int32)
    place = jnp.where(place < bounds[..., 1:, None], place, indices.shape[-1])
    b, h = (x[..., None, None] for x in jnp.ogrid[: sizes.batch, : sizes.num_kv_heads])
    block = indices.at[b, h, place].get(mode="fill", fill_value=-1)
    value = values.at[b, h, place].get(mode="fill", fill_value=-jnp.inf)
    filled = (block >= 0) & (block < sizes.num_blocks) & (value != -jnp.inf)
    place = jnp.where(filled, place, indices.shape[-1])
    return place, jnp.where(filled, value, 0), filled, block


def sizes_of(q, k, blocks: BlockCSR, block_size: int, scale: float, partials: int) -> Sizes:
    """Sizes of a call whose chunks have at most `partials` numbers of partial results.

    Args:
      q: [B, T, Hkv * groups, D].
      k: [B, N, Hkv, D].
      blocks: the pattern.
      block_size: S.
      scale: of the logits.
      partials: a bound, but that a chunk has at least one query.
    """
    batch, tokens, num_heads, head_dim = q.shape
    most = max(1, partials // (batch * num_heads * head_dim * blocks.row_capacity))
    chunks = -(-tokens // most)
    return Sizes(
        batch, tokens, k.shape[2], num_heads // k.shape[2], head_dim, k.shape[1], block_size,
        blocks.num_columns, blocks.row_capacity, -(-tokens // chunks), scale,
    )  # fmt: skip
