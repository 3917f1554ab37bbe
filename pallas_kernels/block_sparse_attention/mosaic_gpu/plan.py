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
BATCH, HEAD, BLOCK, TURN, FIRST, LAST, SCALE = range(7)  # their places


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


def entry_place(entry, sizes: Sizes):
    """Where the results of entries belong, an entry being numbered as in `Entries`.

    The results of a token are rows, one for each of the query heads of a KV head, and 64 rows, of
    neighbouring tokens, make a tile. Of a tile first come the results of the first entry of each
    row, then those of the second, and so on.
    """
    row, number = entry // sizes.capacity, entry % sizes.capacity
    width = HALF // sizes.groups
    return (row // width * sizes.capacity + number) * width + row % width


def at_places(x, sizes: Sizes):
    """Numbers of entries [C, B, Hkv, chunk, capacity] -> [C, entries], each at its place."""
    x = x.reshape(len(x), -1, HALF // sizes.groups, sizes.capacity)
    return x.swapaxes(2, 3).reshape(len(x), -1)


def by_token(x, sizes: Sizes):
    """What is at the places, [entries, ...] -> [B, chunk, Hkv, capacity, ...]."""
    rest = x.shape[1:]
    x = x.reshape(-1, sizes.capacity, HALF // sizes.groups, *rest).swapaxes(1, 2)
    x = x.reshape(sizes.batch, sizes.heads, sizes.chunk, sizes.capacity, *rest)
    return x.swapaxes(1, 2)


class Chunk(NamedTuple):
    """The entries of a chunk of queries, each at its place, and their tiles.

    Attributes:
      place: int32 [entries]: of each entry in the pattern; out of bounds if empty.
      value: f32 [entries]: the score bias; -inf if empty.
      filled: bool [entries]: whether an entry is not empty.
      scale: f32 [entries]: that of each entry's block (`packing`); 1 if empty. None where results
        are not packed.
      slot: int32 [entries]: where each entry is among those of all tiles, R a tile; -1 if empty.
      tiles: int32 [tiles, DESCRIPTION]: batch element, KV head, block, the block's number among
        those that have entries, the block's first and last tile, and the bits of the
        block's scale (`packing`); then the tokens of the tile's R = 64 / groups entries, then
        the entries' own places, or -1 for none.
      span: int32 [5]: of the tiles the first and how many there are; the first token, its number
        among those of the pattern, and the first KV head.
      used: bool [columns]: whether a block has entries.
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    scale: jax.Array | None
    slot: jax.Array
    tiles: jax.Array
    span: jax.Array
    used: jax.Array

    def alone(self, sizes: Sizes) -> "Chunk":
        """The chunk with few tiles but its own, where there are many."""
        most = most_tiles(sizes)
        if len(self.tiles) <= most:
            return self
        begin = jnp.minimum(self.span[0], len(self.tiles) - most)
        tiles = lax.dynamic_slice_in_dim(self.tiles, begin, most)
        return self._replace(tiles=tiles, span=self.span.at[0].add(-begin))


class Plan(NamedTuple):
    """All chunks: the attributes of `Chunk` with an axis of chunks before them, but for `tiles`.

    Attributes:
      tiles: of one chunk after the other; what it says of tiles is counted within a chunk.
      span: int32 [C, 5].
    """

    place: jax.Array
    value: jax.Array
    filled: jax.Array
    scale: jax.Array | None
    slot: jax.Array
    tiles: jax.Array
    span: jax.Array
    used: jax.Array

    def chunk(self, i) -> Chunk:
        """Chunk number i, which may be traced; its tiles lie among those of all chunks."""
        own = self._replace(tiles=None)._asdict()
        own = {name: None if x is None else x[i] for name, x in own.items()}
        return Chunk(**own | {"tiles": self.tiles})


def most_tiles(sizes: Sizes) -> int:
    """How many tiles a chunk may have."""
    return sizes.entries * sizes.groups // HALF + min(sizes.columns, sizes.entries)


@functools.partial(jax.named_call, name="plan_chunks")
def plan_chunks(
    first, indptr, indices, values, sizes: Sizes, origin=0, first_head=0, scales=None
) -> Plan:
    """Plans all chunks of queries at once, since a plan is many small launches.

    Args:
      first: the first token of each chunk, int32 [C], among those of the pattern.
      indptr: int32 [B, Hkv, T + 1].
      indices: int32 [B, Hkv, E].
      values: f32 [B, Hkv, E].
      sizes: of the call.
      origin: the token that is the pattern's first, int32.
      first_head: the KV head that is the pattern's first, int32.
      scales: f32 [B, Nb, Hkv], of the blocks (`packing`), where results are to be packed.
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
    token = entry // sizes.capacity % sizes.chunk + (origin + first)[chunk][:, None]
    row, block = tiles.run % sizes.columns // sizes.num_blocks, tiles.run % sizes.num_blocks
    batch, head = row // sizes.heads, first_head + row % sizes.heads
    numbers = [
        batch,
        head,
        block,
        turns[tiles.run],
        tiles.starts[tiles.run] - bounds[chunk],
        tiles.starts[tiles.run + 1] - 1 - bounds[chunk],
    ]
    if scales is not None:
        numbers.append(lax.bitcast_convert_type(scales[batch, block, head], jnp.int32))
    header = jnp.pad(jnp.stack(numbers, axis=1), [(0, 0), (0, HEADER - len(numbers))])
    own = entry_place(entry % sizes.entries, sizes)
    number = jnp.where(tiles.inside, own, -1)
    # Without a barrier the padding would compute them again for each of its numbers.
    parts = lax.optimization_barrier((header, token, number))
    described = jnp.concatenate(parts, axis=1).astype(jnp.int32)
    described = jnp.pad(described, [(0, 0), (0, DESCRIPTION - HEADER - 2 * width)])
    slot = jnp.full(chunks * sizes.entries, -1, jnp.int32)
    target = jnp.where(tiles.inside, entry // sizes.entries * sizes.entries + own, len(slot))
    slot = slot.at[target.ravel()].set(
        jnp.arange(entry.size, dtype=jnp.int32) - jnp.repeat(bounds[chunk] * width, width),
        mode="drop",
        unique_indices=True,
    )
    heads = jnp.full_like(first, first_head)
    span = jnp.stack([bounds[:-1], jnp.diff(bounds), origin + first, first, heads], axis=1)
    scale = None
    if scales is not None:
        _, b, h = (x[..., None, None] for x in jnp.ogrid[:1, : sizes.batch, : sizes.heads])
        block = jnp.clip(entries.block, 0, sizes.num_blocks - 1)
        scale = at_places(jnp.where(entries.filled, scales[b, block, first_head + h], 1), sizes)
    value = jnp.where(entries.filled, entries.value, -jnp.inf)
    place, value, filled = (at_places(x, sizes) for x in (entries.place, value, entries.filled))
    slot = slot.reshape(chunks, -1)
    return Plan(place, value, filled, scale, slot, described, span, used)
