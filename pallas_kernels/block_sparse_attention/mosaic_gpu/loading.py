"""What the loaders of all walks share: a thread block's tiles, and the copies that fill them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    BATCH,
    BLOCK,
    HEAD,
    HEADER,
    TURN,
)
from pallas_kernels.hopper import Ring


class Tile(NamedTuple):
    """What a loader needs to know of a tile, int32; `turn` is as of `turn_of`."""

    batch: jax.Array
    head: jax.Array
    block: jax.Array
    turn: jax.Array
    tokens: tuple[jax.Array, ...]


def turn_of(tiles, first, i):
    """The number of a tile's block, among those of a thread block whose tiles begin at `first`."""
    return tiles[first + i, TURN] - tiles[first, TURN]


def for_tiles(tiles, first, count, width, visit: Callable):
    """Calls `visit(i, turns, tile)` for `count` tiles.

    A tile is looked up in device memory while the one before is visited, for that takes long.

    Args:
      tiles: reference to the descriptions.
      first: tile.
      count: of tiles.
      width: entries of a tile.
      visit: `turns` is how many blocks have been visited before.
    """

    def look_up(i):
        i = jnp.minimum(i, count - 1)
        batch, head, block = (tiles[first + i, n] for n in (BATCH, HEAD, BLOCK))
        tokens = tuple(tiles[first + i, HEADER + n] for n in range(width))
        return Tile(batch, head, block, turn_of(tiles, first, i), tokens)

    def step(i, state):
        turns, tile = state
        following = look_up(i + 1)
        visit(i, turns, tile)
        return tile.turn + 1, following

    @pl.when(count > 0)
    def _():
        lax.fori_loop(0, count, step, (jnp.int32(0), look_up(0)))


def load_block(at, ring: Ring, turns, tile: Tile, block_size: int):
    """Starts the copies of a tile's keys and values, unless the tile before had the same."""

    @pl.when(tile.turn >= turns)
    def _():
        keys = pl.ds(pl.multiple_of(tile.block * block_size, block_size), block_size)
        slot = ring.claim(tile.turn)
        for x, place in ((at.k, at.k_tile), (at.v, at.v_tile)):
            source = x.at[tile.batch, keys, tile.head]
            target = place.at[slot, pl.ds(0, block_size)]
            plgpu.copy_gmem_to_smem(source, target, ring.ready.at[slot])


def load_entries(x, place, ready, tile: Tile, groups: int):
    """Starts the copies of a tile's rows of x [B, T, Hkv * groups, D], entry by entry."""
    heads = pl.ds(pl.multiple_of(tile.head * groups, groups), groups)
    for n, token in enumerate(tile.tokens):
        rows = pl.ds(n * groups, groups)
        plgpu.copy_gmem_to_smem(x.at[tile.batch, token, heads], place.at[rows], ready)
