"""How the entries of a pattern are cut into tiles that share a key block."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention.entries import Sizes, sort_entries
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
      place: int32 [B, Hkv, chunk, capacity]: of each entry in the pattern; out of bounds if empty.
      value: f32, likewise: the score bias; 0 if empty.
      filled: bool, likewise.
      slot: int32 [entries]: the place of each entry among those of all tiles, R a tile; out of
        bounds if empty.
      tiles: int32 [tiles, DESCRIPTION]: batch element, KV head, block, the block's number among
        those that have entries, the block's first and last tile; then the tokens of the
        tile's R = 64 / groups entries, then the entries' numbers, or -1 for none.
      num_tiles: int32 [1]: how many tiles there are.
      used: bool [columns]: whether a block has entries.
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    slot: jax.Array
    tiles: jax.Array
    num_tiles: jax.Array
    used: jax.Array


class Plan(NamedTuple):
    """All chunks: the attributes of `Chunk` with an axis of chunks before them, but for `tiles`.

    Attributes:
      tiles: of one chunk after the other; what it says of tiles is counted within a chunk.
      bounds: int32 [C + 1]: first tile of each chunk, and the number of all tiles.
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    slot: jax.Array
    tiles: jax.Array
    bounds: jax.Array
    used: jax.Array

    def chunk(self, i, sizes: Sizes) -> Chunk:
        """Chunk number i, which may be traced."""
        tiles = self.tiles
        if len(self.used) > 1:
            tiles = lax.dynamic_slice_in_dim(tiles, self.bounds[i], _most_tiles(sizes))
        num_tiles = (self.bounds[i + 1] - self.bounds[i])[None]
        of_chunk = (x[i] for x in (self.place, self.value, self.filled, self.slot))
        return Chunk(*of_chunk, tiles, num_tiles, self.used[i])


def _most_tiles(sizes: Sizes) -> int:
    return sizes.entries * sizes.groups // HALF + min(sizes.columns, sizes.entries)


@functools.partial(jax.named_call, name="plan_chunks")
def plan_chunks(first, indptr, indices, values, sizes: Sizes) -> Plan:
    """Plans all chunks of queries at once, since a plan is many small launches.

    Args:
      first: the first token of each chunk, int32 [C].
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: f32 [B, Hkv, E].
      sizes: of the call.
    """
    chunks, width = len(first), HALF // sizes.groups
    entries = sort_entries(first, indptr, indices, values, sizes)
    tiles = cut_runs(entries.starts, chunks * sizes.entries, width)
    bounds = tiles.starts[:: sizes.columns]
    used = (tiles.starts[1:] > tiles.starts[:-1]).reshape(chunks, sizes.columns)
    turns = jnp.cumsum(used.ravel(), dtype=jnp.int32) - 1
    # A tile's first entry stands for the missing ones: what they load must be harmless.
    place = jnp.where(tiles.inside, tiles.place, tiles.place[:, :1])
    entry = entries.order.at[place].get(mode="clip")
    chunk = tiles.run // sizes.columns
    token = entry // sizes.capacity % sizes.chunk + first[chunk][:, None]
    row, block = tiles.run % sizes.columns // sizes.num_blocks, tiles.run % sizes.num_blocks
    numbers = [
        row // sizes.heads,
        row % sizes.heads,
        block,
        turns[tiles.run],
        tiles.starts[tiles.run] - bounds[chunk],
        tiles.starts[tiles.run + 1] - 1 - bounds[chunk],
    ]
    header = jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, HEADER - len(numbers))])
    number = jnp.where(tiles.inside, entry % sizes.entries, -1)
    # Without a barrier the padding would compute them again for each of its numbers.
    parts = lax.optimization_barrier((header, token, number))
    described = jnp.concatenate(parts, axis=1).astype(jnp.int32)
    # Slices of a chunk's tiles must not reach over the end.
    missing = _most_tiles(sizes) if chunks > 1 else 0
    described = jnp.pad(described, [(0, missing), (0, DESCRIPTION - HEADER - 2 * width)])
    nowhere = jnp.full(chunks * sizes.entries, entry.size, jnp.int32)
    slot = nowhere.at[jnp.where(tiles.inside, entry, len(nowhere)).ravel()].set(
        jnp.arange(entry.size, dtype=jnp.int32) - jnp.repeat(bounds[chunk] * width, width),
        mode="drop",
        unique_indices=True,
    )
    slot = slot.reshape(chunks, -1)
    return Plan(entries.place, entries.value, entries.filled, slot, described, bounds, used)
