"""What the loaders of all walks share: a thread block's tiles, and the copies that fill them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    BATCH,
    BLOCK,
    DESCRIPTION,
    HEAD,
    HEADER,
    TURN,
)
from pallas_kernels.hopper import Ring

_LOOKED_UP = 8  # tiles whose descriptions are copied at a time


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


def lookup_scratch():
    """What `for_tiles` needs in shared memory."""
    return {
        "lookup_tile": plgpu.SMEM((2, _LOOKED_UP, DESCRIPTION), jnp.int32),
        "lookup_ready": plgpu.Barrier(num_arrivals=1, num_barriers=2),
    }


def for_tiles(at, first, count, width, visit: Callable):
    """Calls `visit(i, turns, tile)` for `count` tiles.

    Descriptions come from device memory some tiles at a time, while those before are visited.

    Args:
      at: has the references `tiles`, in device memory, and those of `lookup_scratch`.
      first: tile.
      count: of tiles.
      width: entries of a tile.
      visit: `turns` is how many blocks have been visited before.
    """
    most = at.tiles.shape[0]
    together = min(_LOOKED_UP, most)
    first_turn = at.tiles[jnp.minimum(first, most - 1), TURN]

    def begin(group):
        """A group's first tile, or one before: no copy may reach past the last."""
        return jnp.minimum(first + group * together, most - together)

    def copy(group):
        slot = lax.rem(group, 2)
        source = at.tiles.at[pl.ds(begin(group), together)]
        target = at.lookup_tile.at[slot, pl.ds(0, together)]
        plgpu.copy_gmem_to_smem(source, target, at.lookup_ready.at[slot])

    def visit_group(group, turns):
        # All warps have read the group before, in whose place the next one goes.
        plgpu.commit_smem()
        pl.when((group + 1) * together < count)(functools.partial(copy, group + 1))
        slot = lax.rem(group, 2)
        plgpu.barrier_wait(at.lookup_ready.at[slot])

        def visit_tile(i, turns):
            def number(n):
                return at.lookup_tile[slot, first + i - begin(group), n]

            turn = number(TURN) - first_turn
            places = (number(n) for n in (BATCH, HEAD, BLOCK))
            tokens = tuple(number(HEADER + n) for n in range(width))
            visit(i, turns, Tile(*places, turn, tokens))
            return turn + 1

        return lax.fori_loop(
            group * together, jnp.minimum((group + 1) * together, count), visit_tile, turns
        )

    @pl.when(count > 0)
    def _():
        copy(0)
        lax.fori_loop(0, lax.div(count + together - 1, together), visit_group, jnp.int32(0))


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


def load_entries(arrays, ready, tile: Tile, groups: int):
    """Starts the copies of a tile's rows, entry by entry.

    Args:
      arrays: pairs of x [B, T, Hkv * groups, D] and its place.
      ready: the barrier at which the copies arrive.
      tile: whose rows.
      groups: rows of an entry.
    """
    heads = pl.ds(pl.multiple_of(tile.head * groups, groups), groups)

    def load(n):
        rows = pl.ds(n * groups, groups)
        for x, place in arrays:
            source = x.at[tile.batch, tile.tokens[n], heads]
            plgpu.copy_gmem_to_smem(source, place.at[rows], ready)

    hopper.by_warp(len(tile.tokens), load)
