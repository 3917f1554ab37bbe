"""dK and dV: tiles of queries that chose the same block, summed over the block's tiles.

Two warpgroups share a tile of 64 query rows: the first sums dV, the second dK. A thread block has
a contiguous share of the tiles, which are sorted by block. It alone writes the blocks that lie in
its share whole; of its first and last block, which others may share, it writes partial sums, as
pairs of bf16 (the sum rounded, and the remainder), that are added up afterwards in a fixed order.
"""

import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import gradient_operands
from pallas_kernels.block_sparse_attention.mosaic_gpu.loading import (
    for_tiles,
    load_block,
    load_entries,
    lookup_scratch,
    turn_of,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    BATCH,
    BLOCK,
    FIRST,
    HEAD,
    LAST,
    TURN,
    Chunk,
    Config,
)
from pallas_kernels.hopper import HALF, Ring


class BlockWalk:
    """A thread block that walks over its share of the tiles, block by block.

    Products are transposed: rows are the block's keys, columns the tile's queries. A product has 64
    rows; those past the keys of a smaller block mean nothing and go nowhere. `at` has the
    references: q, k, v, out_bar, tiles, span and sums in device memory; q_tile, out_bar_tile,
    sums_tile, k_tile, v_tile and bar_tile in shared memory; and the rings' barriers.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        self.q_ring = Ring(config.stages, *at.q_ring)
        self.k_ring = Ring(config.key_stages, *at.k_ring)
        self.width = HALF // sizes.groups
        self.first, self.count = hopper.contiguous_share(at.span[1], at)
        self.begin = at.span[0] + self.first  # among all tiles

    @staticmethod
    def scratch(sizes: Sizes, config: Config):
        """What the walk needs in shared memory."""
        queries = hopper.operand_tile((config.stages, HALF, sizes.head_dim))
        rows = _rows(sizes)
        keys = hopper.operand_tile((config.key_stages, rows, sizes.head_dim))
        return {
            "q_tile": queries,
            "out_bar_tile": queries,
            "sums_tile": plgpu.SMEM((config.stages, 2, HALF), jnp.float32),
            "k_tile": keys,
            "v_tile": keys,
            "bar_tile": hopper.operand_tile((2, rows, sizes.head_dim)),
            "q_ring": Ring.barriers(config.stages, 2 * HALF // sizes.groups + 1),
            "k_ring": Ring.barriers(config.key_stages, 2),
            **lookup_scratch(),
        }

    def turn(self, i):
        """The number of own tile i's block, among those of this thread block."""
        return turn_of(self.at.tiles, self.begin, i)

    def load(self):
        """Fills the rings, tile after tile."""
        at, groups = self.at, self.sizes.groups

        def load_tile(i, turns, tile):
            load_block(at, self.k_ring, turns, tile, self.sizes.block_size)
            slot = self.q_ring.claim(i)
            ready = self.q_ring.ready.at[slot]
            plgpu.copy_gmem_to_smem(at.sums.at[self.begin + i], at.sums_tile.at[slot], ready)
            arrays = (at.q, at.q_tile.at[slot]), (at.out_bar, at.out_bar_tile.at[slot])
            load_entries(arrays, ready, tile, groups)

        for_tiles(at, self.begin, self.count, self.width, load_tile)

    def keys(self, block):
        """The keys of a block."""
        size = self.sizes.block_size
        return pl.ds(pl.multiple_of(block * size, size), size)

    def compute(self):
        """Sums dV in the first warpgroup, dK in the second."""
        for warpgroup, step, target in (
            (0, self._value_step, self.at.v_bar),
            (1, self._key_step, self.at.k_bar),
        ):
            visit = functools.partial(self._visit_block, step, target)

            @pl.when(self.at.warpgroup == warpgroup)
            def _(visit=visit):
                lax.while_loop(lambda i: i < self.count, visit, jnp.int32(0))

    def _visit_block(self, step, target, i):
        """Sums over a block's tiles from own tile i on; returns the tile after the last."""
        turn = self.turn(i)
        stop = jnp.minimum(self.at.tiles[self.begin + i, LAST] + 1 - self.first, self.count)
        slot = self.k_ring.receive(turn)
        zeros = hopper.full((_rows(self.sizes), self.sizes.head_dim), 0)
        total = lax.fori_loop(i, stop, functools.partial(step, slot), zeros)
        self.k_ring.release(turn)
        self._store(i, target, total)
        return stop

    def _weights(self, key_slot, slot):
        logits = hopper.scores(
            self.at.k_tile.at[key_slot], self.at.q_tile.at[slot], None, None,
            scale=self.sizes.scale,
        )  # fmt: skip
        lse = plgpu.load(self.at.sums_tile.at[slot, 0], layout=hopper.COLUMN)
        return jnp.exp2(logits - hopper.along_columns(lse, logits.shape))

    def _value_step(self, key_slot, i, v_bar):
        slot = self.q_ring.receive(i)
        weights = self._weights(key_slot, slot).astype(self.at.v.dtype)
        v_bar = hopper.multiply_add(v_bar, weights, self.at.out_bar_tile.at[slot])
        self.q_ring.release(i)
        return v_bar

    def _key_step(self, key_slot, i, k_bar):
        at = self.at
        slot = self.q_ring.receive(i)
        weights = self._weights(key_slot, slot)
        out_bar = hopper.transposed(at.out_bar_tile.at[slot])
        weights_bar = hopper.multiply(at.v_tile.at[key_slot], out_bar, weights.shape)
        delta = plgpu.load(at.sums_tile.at[slot, 1], layout=hopper.COLUMN)
        logits_bar = weights * (weights_bar - hopper.along_columns(delta, weights.shape))
        logits_bar = (logits_bar * self.sizes.scale).astype(at.k.dtype)
        k_bar = hopper.multiply_add(k_bar, logits_bar, at.q_tile.at[slot])
        self.q_ring.release(i)
        return k_bar

    def _store(self, i, target, total):
        """Copies a block's sum to its place, or, if others may add to it, to the edges."""
        at, tile = self.at, self.begin + i
        whole = at.tiles[tile, FIRST] >= self.first
        whole &= at.tiles[tile, LAST] < self.first + self.count
        high = total.astype(target.dtype)

        def put(x, place):
            plgpu.wait_smem_to_gmem(0)  # of the copy before
            at.bar_tile[at.warpgroup] = x
            plgpu.commit_smem()
            own = at.bar_tile.at[at.warpgroup, pl.ds(0, self.sizes.block_size)]
            plgpu.copy_smem_to_gmem(own, place)

        @pl.when(whole)
        def _():
            b, h, block = (at.tiles[tile, n] for n in (BATCH, HEAD, BLOCK))
            put(high, target.at[b, self.keys(block), h])

        @pl.when(jnp.logical_not(whole))
        def _():
            edge = at.edges.at[at.program, (i > 0).astype(jnp.int32), at.warpgroup]
            put(high, edge.at[0])
            put((total - high.astype(jnp.float32)).astype(target.dtype), edge.at[1])

        plgpu.wait_smem_to_gmem(0)


def _rows(sizes: Sizes) -> int:
    """Rows of a product, at least those of one wgmma."""
    return max(HALF, sizes.block_size)


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def key_gradients(q, k, v, out_bar, lse, delta, chunk: Chunk, sizes: Sizes, config: Config):
    """dK and dV, [B, blocks, S, Hkv, D], of a chunk of queries.

    Arguments as in `entry_walk.query_gradient`.
    """
    chunk = chunk.alone(sizes)
    block = sizes.block_size, sizes.head_dim
    padded = sizes.batch, sizes.num_blocks * sizes.block_size, sizes.heads, sizes.head_dim
    results = hopper.launch(
        "block_sparse_key_gradients",
        hopper.roles(functools.partial(BlockWalk, sizes, config), loader_registers=56),
        programs=config.programs,
        meets=False,
        operands=gradient_operands(q, k, v, out_bar, lse, delta, chunk, sizes),
        outputs={
            "k_bar": jax.ShapeDtypeStruct(padded, k.dtype),
            "v_bar": jax.ShapeDtypeStruct(padded, v.dtype),
            "edges": jax.ShapeDtypeStruct((config.programs, 2, 2, 2, *block), k.dtype),
        },
        scratch=BlockWalk.scratch(sizes, config),
    )
    place, sums = _add_edges(results["edges"], chunk, sizes, config.programs)
    used = chunk.used.reshape(sizes.batch, sizes.heads, sizes.num_blocks)
    used = used.swapaxes(1, 2)[:, :, None, :, None]

    def finish(x, sums):
        x = x.reshape(sizes.batch, sizes.num_blocks, block[0], sizes.heads, block[1])
        b, h, n = place
        # In this order the sums are written in place, and the choice can be part of what follows.
        return jnp.where(used, x.at[b, n, :, h].set(sums.astype(x.dtype), mode="drop"), 0)

    return finish(results["k_bar"], sums[:, 1]), finish(results["v_bar"], sums[:, 0])


def _add_edges(edges, chunk: Chunk, sizes: Sizes, programs: int):
    """Adds the partial sums of blocks that several thread blocks share, always in one order.

    Args:
      edges: [programs, 2, 2, 2, S, D]: of a program's first and another last block, dV and dK,
        rounded and remainder; anything where there is none.
      chunk: the entries.
      sizes: of the call.
      programs: thread blocks.

    Returns:
      (batch element, KV head, block) of each sum, out of bounds if there is none, int32
      [2 programs]; and the sums, f32 [2 programs, 2, S, D].
    """
    at = types.SimpleNamespace(program=jnp.arange(programs, dtype=jnp.int32), programs=programs)
    first, count = hopper.contiguous_share(chunk.span[1], at)
    last = first + count - 1
    tiles = chunk.tiles[chunk.span[0] + jnp.stack([first, jnp.maximum(last, first)])]
    own = tiles.swapaxes(0, 1)
    # A last block that is also the first was written as the first.
    some = (count > 0)[:, None] & jnp.stack(
        [jnp.ones_like(first, bool), own[:, 1, TURN] != own[:, 0, TURN]], axis=1
    )
    shared = some & ((own[..., FIRST] < first[:, None]) | (own[..., LAST] > last[:, None]))
    own, shared = own.reshape(-1, own.shape[2]), shared.ravel()
    edges = jnp.where(shared[:, None], edges.reshape(len(shared), -1), 0).astype(jnp.float32)
    edges = edges.reshape(len(shared), 2, 2, -1).sum(axis=2)
    same = (own[:, None, TURN] == own[None, :, TURN]) & shared[:, None] & shared[None]
    sums = jnp.einsum("ij,jax->iax", same.astype(jnp.float32), edges, precision="highest")
    leads = shared & (jnp.argmax(same, axis=1) == jnp.arange(len(shared)))
    place = jnp.where(leads, own[:, BATCH], sizes.batch), own[:, HEAD], own[:, BLOCK]
    return place, sums.reshape(*sums.shape[:2], sizes.block_size, sizes.head_dim)
