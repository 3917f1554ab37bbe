"""How the entries of a pattern are cut into tiles that share a key block."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention.entries import Entries, Sizes, sort_entries
from pallas_kernels.segments import cut_runs

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
    programs: int = hopper.MULTIPROCESSORS


class Chunk(NamedTuple):
    """The entries of a chunk of queries, and their tiles.

    Attributes:
      entries: sorted by column.
      tiles: int32 [tiles, HEADER + 2 R]: batch element, KV head, block, the block's number among
        those that have entries, the block's first and last tile; then the tokens of the tile's R
        entries, then the entries' numbers, or -1 for none.
      num_tiles: int32 [1]: how many tiles there are.
      used: bool [columns]: whether a block has entries.
    """

    entries: Entries
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
    entries = sort_entries(index, indptr, indices, values, sizes)
    tiles = cut_runs(entries.starts, sizes.entries, width)
    column, used = tiles.run, tiles.starts[1:] > tiles.starts[:-1]
    turns = jnp.cumsum(used, dtype=jnp.int32) - 1
    # A tile's first entry stands for the missing ones: what they load must be harmless.
    place = jnp.where(tiles.inside, tiles.place, tiles.place[:, :1])
    entry = entries.order.at[place].get(mode="clip")
    token = entry // sizes.capacity % sizes.chunk + index * sizes.chunk
    row, block = column // sizes.num_blocks, column % sizes.num_blocks
    numbers = [
        row // sizes.heads,
        row % sizes.heads,
        block,
        turns[column],
        tiles.starts[column],
        tiles.starts[column + 1] - 1,
    ]
    header = jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, HEADER - len(numbers))])
    described = jnp.concatenate([header, token, jnp.where(tiles.inside, entry, -1)], axis=1)
    described = described.astype(jnp.int32)
    return Chunk(entries, described, tiles.starts[-1:], used)
