"""Forward and dQ: tiles of queries that chose the same block, with results per entry."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu import packing
from pallas_kernels.block_sparse_attention.mosaic_gpu.loading import (
    Tile,
    for_tiles,
    load_block,
    load_entries,
    lookup_scratch,
    turn_of,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    BATCH,
    BLOCK,
    DESCRIPTION,
    HEAD,
    HEADER,
    SCALE,
    Chunk,
    Config,
    most_tiles,
)
from pallas_kernels.hopper import HALF, LOG2E, Ring


class EntryWalk:
    """A thread block that walks over its share of the tiles, which are sorted by block.

    A tile is 64 rows: the query heads of `HALF // groups` entries. The computing warpgroups take
    tiles in turns, and so overlap: one's softmax runs while others multiply. A block's keys stay in
    shared memory until all have passed its tiles. `at` has the references: q, k, v, tiles and span
    in device memory; q_tile, info_tile, k_tile and v_tile in shared memory; and the
    rings' barriers.

    Warps need not meet: what one writes to shared memory is read by itself, or by a copy that
    begins after `commit_smem`, where they do.
    """

    def __init__(self, sizes: Sizes, config: Config, at):
        self.sizes, self.config, self.at = sizes, config, at
        # A slot belongs to one warpgroup, as the stages are a multiple of their number.
        self.q_ring = Ring(config.stages, *at.q_ring)
        self.k_ring = Ring(config.key_stages, *at.k_ring)
        self.width = HALF // sizes.groups
        self.first, self.count = hopper.contiguous_share(at.span[1], at)
        self.begin = at.span[0] + self.first  # among all tiles

    @staticmethod
    def scratch(sizes: Sizes, config: Config, arrays: int):
        """What every walk needs, for tiles of so many arrays of rows, each with one of numbers."""
        width = HALF // sizes.groups
        operand = functools.partial(hopper.operand_tile, inner=sizes.block_size)
        keys = operand((config.key_stages, sizes.block_size, sizes.head_dim))
        return {
            "q_tile": operand((config.stages, HALF, sizes.head_dim)),
            "info_tile": plgpu.SMEM((config.stages, DESCRIPTION), jnp.int32),
            "k_tile": keys,
            "v_tile": keys,
            "q_ring": Ring.barriers(config.stages, arrays * (width + 1), consumers=1),
            "k_ring": Ring.barriers(config.key_stages, 2, consumers=config.computing),
            **lookup_scratch(),
        }

    def turn(self, i):
        """The number of own tile i's block, among those of this thread block."""
        return turn_of(self.at.tiles, self.begin, i)

    def load(self):
        """Fills the rings, tile after tile."""

        def load_tile(i, turns, tile):
            load_block(self.at, self.k_ring, turns, tile, self.sizes.block_size)
            slot = self.q_ring.claim(i)
            self.load_tile(slot, self.q_ring.ready.at[slot], i, tile)

        for_tiles(self.at, self.begin, self.count, self.width, load_tile)

    def load_tile(self, slot, ready, i, tile: Tile):
        """Starts the copies that make own tile i."""
        at = self.at
        plgpu.copy_gmem_to_smem(at.tiles.at[self.begin + i], at.info_tile.at[slot], ready)
        arrays = [(x, place.at[slot]) for x, place in self.rows()]
        load_entries(arrays, ready, tile, self.sizes.groups)

    def rows(self):
        """The arrays of rows that make tiles, and their places."""
        return [(self.at.q, self.at.q_tile)]

    def compute(self):
        """Computes tile after tile; results leave while the next tile is under way."""
        own, last = self.config.computing, self.count - 1

        def advance(held, turn):
            """Goes on to a block.

            A warpgroup waits for the blocks on the way, too, though it has no tile of them: each
            must see every phase of a barrier.
            """

            def next_block(turn, _):
                pl.when(turn > 0)(lambda: self.k_ring.release(turn - 1))
                self.k_ring.receive(turn)

            lax.fori_loop(held + 1, turn + 1, next_block, None)

        def compute_tile(n, turns):
            i = self.at.warpgroup + n * own
            held, turn = turns
            # Looked up early, for it is not in shared memory yet when it is needed.
            next_turn = self.turn(jnp.minimum(i + own, last))
            # First the keys: the loader cannot reach this tile before they are given back.
            advance(held, turn)
            slot = self.q_ring.receive(i)
            key_slot = lax.rem(turn, self.config.key_stages)
            meanwhile = functools.partial(pl.when(n > 0), lambda: self.finish_store(i - own))
            self.compute_tile(i, slot, key_slot, meanwhile)
            plgpu.commit_smem_to_gmem_group()
            return turn, next_turn

        @pl.when(self.count > 0)
        def _():
            tiles = lax.div(last - self.at.warpgroup + own, own)
            first_turn = self.turn(jnp.minimum(self.at.warpgroup, last))
            turns = jnp.int32(-1), first_turn
            held, _ = lax.fori_loop(0, tiles, compute_tile, turns)
            advance(held, self.turn(last))
            plgpu.wait_smem_to_gmem(0)

    def finish_store(self, i):
        """Waits until tile i's results have left, then gives its slot back."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.q_ring.release(i)

    def hide(self, slot):
        """What hides the keys past the end of an incomplete block; None if there is none."""
        if self.sizes.num_keys % self.sizes.block_size == 0:
            return None
        keys = self.sizes.num_keys - self.at.info_tile[slot, BLOCK] * self.sizes.block_size
        return functools.partial(hopper.keep, axis=1, below=keys)


class _Forward(EntryWalk):
    """Results are packed, and have a place for each computing warpgroup: `words_tile`, `lse_tile`.

    So a slot is given back as soon as its tile is computed. Warps send what they have written
    themselves; that a warp's copies have left, all its threads know when it multiplies next.
    """

    def compute_tile(self, i, slot, key_slot, meanwhile):
        """Attention within the block."""
        at, own = self.at, self.at.warpgroup
        queries = at.q_tile.at[slot]
        places = hopper_lanes.spread(at.info_tile.at[slot, pl.ds(HEADER + self.width, self.width)])
        logits = hopper.scores(
            queries,
            at.k_tile.at[key_slot],
            None,
            self.hide(slot),
            scale=self.sizes.scale,
            meanwhile=meanwhile,
        )
        # Weights are 2^-SHIFT of what they would be.
        top = logits.max(axis=1) + packing.SHIFT
        weights = jnp.exp2(logits - hopper.along_rows(top, logits.shape))
        total = weights.sum(axis=1)
        shape = (HALF, self.sizes.head_dim)
        acc = hopper.multiply(weights.astype(at.v.dtype), at.v_tile.at[key_slot], shape)
        bits = plgpu.layout_cast(jnp.full(HALF, at.info_tile[slot, SCALE]), hopper.ROW)
        factor = packing.packing_factor(lax.bitcast_convert_type(bits, jnp.float32), total)
        at.words_tile[own] = packing.pack(acc * hopper.along_rows(factor, shape))
        at.lse_tile[own] = top * (1 / LOG2E) + jnp.log(total)
        plgpu.commit_smem()
        hopper_lanes.send_entries(at.lse_tile.at[own], at.lse, places)
        hopper_lanes.send_entries(at.words_tile.at[own], at.words, places)
        self.q_ring.release(i)

    def finish_store(self, i):
        """Waits until tile i's results have left."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _QueryGradient(EntryWalk):
    def load_tile(self, slot, ready, i, tile):
        super().load_tile(slot, ready, i, tile)
        at = self.at
        plgpu.copy_gmem_to_smem(at.sums.at[self.begin + i], at.sums_tile.at[slot], ready)

    def rows(self):
        """The arrays of rows that make tiles, and their places."""
        return [*super().rows(), (self.at.out_bar, self.at.out_bar_tile)]

    def compute_tile(self, i, slot, key_slot, meanwhile):
        """What the block contributes to dQ, and to the gradient of each row's bias."""
        at, sums = self.at, self.at.sums_tile
        keys, values = at.k_tile.at[key_slot], at.v_tile.at[key_slot]
        lse, delta = (plgpu.load(sums.at[slot, n], layout=hopper.ROW) for n in (0, 1))
        queries, out_bar = (x.at[slot] for x in (at.q_tile, at.out_bar_tile))
        logits = hopper.scores(
            queries, keys, None, self.hide(slot), scale=self.sizes.scale, meanwhile=meanwhile
        )
        weights = jnp.exp2(logits - hopper.along_rows(lse, logits.shape))
        weights_bar = hopper.multiply(out_bar, hopper.transposed(values), logits.shape)
        logits_bar = weights * (weights_bar - hopper.along_rows(delta, logits.shape))
        at.bias_tile[slot] = logits_bar.sum(axis=1)
        narrow = (logits_bar * self.sizes.scale).astype(at.k.dtype)
        acc = hopper.multiply(narrow, keys, (HALF, self.sizes.head_dim))
        at.q_tile[slot] = acc.astype(at.q.dtype)
        plgpu.commit_smem()
        self._store(i, slot)

    def _store(self, i, slot):
        """Starts the copies of own tile i's results, which lie in its slot."""
        at, groups = self.at, self.sizes.groups
        target = at.bias_bar.at[self.first + i]
        plgpu.copy_smem_to_gmem(at.bias_tile.at[slot], target, commit_group=False)
        entries = [at.info_tile[slot, HEADER + self.width + n] for n in range(self.width)]

        def store(n):
            @pl.when(entries[n] >= 0)
            def _():
                source = at.q_tile.at[slot, pl.ds(n * groups, groups)]
                plgpu.copy_smem_to_gmem(source, at.q_bar.at[entries[n]], commit_group=False)

        hopper.by_warp(self.width, store)


def forward_scratch(sizes: Sizes, config: Config):
    """What `forward` needs in shared memory."""
    return EntryWalk.scratch(sizes, config, arrays=1) | {
        "words_tile": packing.tile(config.computing, HALF, sizes.head_dim),
        "lse_tile": plgpu.SMEM((config.computing, HALF), jnp.float32),
    }


def query_gradient_scratch(sizes: Sizes, config: Config):
    """What `query_gradient` needs in shared memory."""
    scratch = EntryWalk.scratch(sizes, config, arrays=2)
    return scratch | {
        "out_bar_tile": scratch["q_tile"],
        "sums_tile": plgpu.SMEM((config.stages, 2, HALF), jnp.float32),
        "bias_tile": plgpu.SMEM((config.stages, HALF), jnp.float32),
    }


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def forward(q, k, v, chunk: Chunk, sizes: Sizes, config: Config):
    """(words, lse) of each entry on its own: [entries, groups, 3 D / 8], f32 [entries, groups].

    Each entry has its place in them, which holds anything where it is empty. Words are those of
    `packing`, int32, with the scales that the chunk was planned with.
    """
    words = sizes.entries, sizes.groups, packing.width(sizes.head_dim)
    results = hopper.launch(
        "block_sparse_forward",
        **_team(_Forward, sizes, config),
        operands={"q": q, "k": k, "v": v, "tiles": chunk.tiles, "span": chunk.span},
        outputs={
            "words": jax.ShapeDtypeStruct(words, jnp.int32),
            "lse": jax.ShapeDtypeStruct((sizes.entries, sizes.groups), jnp.float32),
        },
        scratch=forward_scratch(sizes, config),
    )
    return results["words"], results["lse"]


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def query_gradient(q, k, v, out_bar, lse, delta, chunk: Chunk, sizes: Sizes, config: Config):
    """(dQ, d bias) of each entry on its own: [entries, groups, D], f32 [entries, groups].

    Args:
      q: [B, T, Hkv * groups, D].
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      out_bar: [B, T, Hkv * groups, D].
      lse: f32 [B, T, Hkv * groups], finite.
      delta: f32 [B, T, Hkv * groups].
      chunk: the entries.
      sizes: of the call.
      config: of the kernel.
    """
    chunk = chunk.alone(sizes)
    results = hopper.launch(
        "block_sparse_query_gradient",
        **_team(_QueryGradient, sizes, config),
        operands=gradient_operands(q, k, v, out_bar, lse, delta, chunk, sizes),
        outputs={
            "q_bar": jax.ShapeDtypeStruct((sizes.entries, sizes.groups, sizes.head_dim), q.dtype),
            "bias_bar": jax.ShapeDtypeStruct((most_tiles(sizes), HALF), jnp.float32),
        },
        scratch=query_gradient_scratch(sizes, config),
    )
    return results["q_bar"], _by_place(results["bias_bar"], chunk, sizes)


def _team(walk: type[EntryWalk], sizes: Sizes, config: Config):
    """Who runs the kernel, for `hopper.launch`."""
    make = functools.partial(walk, sizes, config)
    return {
        "run": hopper.roles(make, loader_registers=40, computing=config.computing),
        "programs": config.programs,
        "warpgroups": config.computing + 1,
        "meets": False,
    }


def _by_place(x, chunk: Chunk, sizes: Sizes):
    """f32 [tiles, 64], a number for each row of a tile, -> [entries, groups], at their places.

    Anything where an entry is empty.
    """
    x = x.reshape(-1, sizes.groups)
    return x.at[chunk.slot].get(mode="clip", wrap_negative_indices=False)


def gradient_operands(q, k, v, out_bar, lse, delta, chunk: Chunk, sizes: Sizes):
    """What the kernels for gradients take, of a chunk alone; arguments as in `query_gradient`."""
    return {
        "q": q, "k": k, "v": v, "out_bar": out_bar, "tiles": chunk.tiles,
        "span": chunk.span, "sums": _sums_by_tile(lse, delta, chunk, sizes),
    }  # fmt: skip


def _sums_by_tile(lse, delta, chunk: Chunk, sizes: Sizes):
    """f32 [tiles, 2, R * groups]: of the tiles' rows lse - bias in units of log 2, and delta.

    For a missing entry lse is so high that its weights are 0.
    """
    width = HALF // sizes.groups
    b, h = chunk.tiles[:, BATCH, None], chunk.tiles[:, HEAD, None]
    token = chunk.tiles[:, HEADER : HEADER + width]
    place = chunk.tiles[:, HEADER + width : HEADER + 2 * width, None]
    shape = *lse.shape[:2], sizes.heads, sizes.groups
    lse, delta = (x.reshape(shape)[b, token, h] for x in (lse, delta))  # [tiles, R, groups]
    value = chunk.value[jnp.maximum(place, 0)]
    shift = (lse - value) * LOG2E
    sums = jnp.stack([jnp.where(place >= 0, shift, -hopper.LOWEST), delta], axis=1)
    return sums.reshape(len(sums), 2, width * sizes.groups)
