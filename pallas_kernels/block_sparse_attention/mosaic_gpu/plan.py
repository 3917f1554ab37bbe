"""How the entries of a pattern are cut into tiles that share a key block."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention.entries import Entries, Sizes, sort_entries
from pallas_kernels.hopper import HALF
from pallas_kernels.segments import cut_runs

DESCRIPTION = 32  # numbers for each tile: TMA copies to multiples of 128 bytes in shared memory
HEADER = 8  # of them come before those of its entries
BATCH, HEAD, BLOCK, TURN, FIRST, LAST = range(6)  # their places


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
      stages: tiles of queries in shared memory at a time; in forward and dQ a multiple of
        `computing`.
      key_stages: key blocks in shared memory at a time.
      computing: warpgroups that compute; dK and dV always have two.
      programs: thread blocks.
    """

    stages: int
    key_stages: int = 2
    computing: int = 2
    programs: int = hopper.MULTIPROCESSORS


class Chunk(NamedTuple):
    """The entries of a chunk of queries, and their tiles.

    Attributes:
      entries: sorted by column.
      slot: int32 [entries]: the place of each entry among those of all tiles, R a tile; out of
        bounds if empty.
      tiles: int32 [tiles, DESCRIPTION]: batch element, KV head, block, the block's number
        among those that have entries, the block's first and last tile; then the tokens of the
        tile's R = 64 / groups entries, then the entries' numbers, or -1 for none.
      num_tiles: int32 [1]: how many tiles there are.
      used: bool [columns]: whether a block has entries.
    """

    entries: Entries
    slot: jax.Array
    tiles: jax.Array
    num_tiles: jax.Array
    used: jax.Array


@functools.partial(jax.named_call, name="plan_chunk")
def plan_chunk(first, indptr, indices, values, sizes: Sizes) -> Chunk:
    """Plans a chunk of queries.

    Args:
      first: token of the chunk.
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: f32 [B, Hkv, E].
      sizes: of the call.
    """
    width = HALF // sizes.groups
    entries = sort_entries(first, indptr, indices, values, sizes)
    tiles = cut_runs(entries.starts, sizes.entries, width)
    column, used = tiles.run, tiles.starts[1:] > tiles.starts[:-1]
    turns = jnp.cumsum(used, dtype=jnp.int32) - 1
    # A tile's first entry stands for the missing ones: what they load must be harmless.
    place = jnp.where(tiles.inside, tiles.place, tiles.place[:, :1])
    entry = entries.order.at[place].get(mode="clip")
    token = entry // sizes.capacity % sizes.chunk + first
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
    entry = jnp.where(tiles.inside, entry, -1)
    described = jnp.concatenate([header, token, entry], axis=1).astype(jnp.int32)
    described = jnp.pad(described, [(0, 0), (0, DESCRIPTION - HEADER - 2 * width)])
    nowhere = jnp.full(sizes.entries, entry.size, jnp.int32)
    numbers = jnp.arange(entry.size, dtype=jnp.int32)
    slot = nowhere.at[jnp.where(tiles.inside, entry, sizes.entries).ravel()].set(
        numbers, mode="drop", unique_indices=True
    )
    return Chunk(entries, slot, described, tiles.starts[-1:], used)
