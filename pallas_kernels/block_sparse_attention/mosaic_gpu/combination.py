"""The results of a query's entries as one: a kernel that streams them once.

Rows of results are taken 64 at a time, those of a few tokens for one KV head. `plan.entry_place`
says how the results of such a tile lie in device memory: next to each other, a matrix of 64 rows
for each entry that a query may have. So what a thread block reads is contiguous, and copied by
whole matrices.

The kernel may also add further arrays of rows, those of other branches of attention, each times a
number per row: then nothing else has to read the results.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu import packing
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import Chunk
from pallas_kernels.hopper import HALF, LOG2E, Ring

TOGETHER = 8  # tokens of a chunk come in multiples, so that tiles are whole
_MOST_COPIED = 256  # numbers, of what TMA copies
_PLACES = 2  # tiles whose numbers are in shared memory, for each computing warpgroup


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """How the kernel is cut.

    Attributes:
      stages: copies of entries in shared memory at a time, for each computing warpgroup.
      matrices: of 64 rows in a copy, where the number of a query's entries is a multiple of it.
      added_stages: likewise of what is added.
      computing: warpgroups that add, a tile each.
      programs: thread blocks.
    """

    stages: int
    matrices: int = 1
    added_stages: int = 1
    computing: int = 2
    programs: int = hopper.MULTIPROCESSORS


_DEFAULTS = {64: CombineConfig(10, added_stages=2), 128: CombineConfig(5)}


def combine_config_for(sizes: Sizes) -> CombineConfig | None:
    """How the kernel is cut, to fit shared memory; None where a query has too many entries."""
    if _tile_entries(sizes) > _MOST_COPIED:
        return None
    config = _DEFAULTS[sizes.head_dim]
    if sizes.capacity % config.matrices:
        config = dataclasses.replace(config, matrices=1)
    most = (True, True, True)  # gates

    def fits(config):
        scratch = _Combination.scratch(sizes, config, most)
        return hopper.shared_memory(scratch, reduces=True) <= hopper.SHARED_MEMORY

    while config.stages > 2 and not fits(config):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config if fits(config) else None


def _tile_entries(sizes: Sizes) -> int:
    """Of a tile, rounded up to numbers of 128 bytes, to multiples of which TMA copies."""
    return -(-sizes.capacity * HALF // sizes.groups // 32) * 32


class Added(NamedTuple):
    """Rows to add to the result.

    Attributes:
      rows: bf16 [B, T', H * groups, D], of the tokens of the pattern and of all H KV heads.
      gate: f32 [B, H, T', groups], their factor; None for 1.
    """

    rows: jax.Array
    gate: jax.Array | None


class _Combination:
    """A thread block that takes every `programs`-th tile.

    Its computing warpgroups take tiles in turns, each with slots of its own, which the loader fills
    alternately. `at` has the references: words, sums (lse of entries), values, scales, span, out,
    lse and, by their number, rows0, gate0, ... in device memory; words_tile, sums_tile,
    values_tile, scales_tile, gates_tile, added_tile, out_tile and lse_tile in shared memory; and
    the rings' barriers.
    """

    def __init__(self, sizes: Sizes, config: CombineConfig, gates: tuple[bool, ...], at):
        self.sizes, self.config, self.gates, self.at = sizes, config, gates, at
        self.width = HALF // sizes.groups  # tokens of a tile
        self.across = sizes.chunk // self.width  # tiles of a sequence and KV head
        self.own = hopper.share(sizes.batch * sizes.heads * self.across, at)
        self.steps = sizes.capacity // config.matrices
        self.added = max(len(gates) - 1, 0)  # arrays
        self.gated = [n for n, gated in enumerate(gates) if gated]
        # The first token in the results, and in the pattern, as gates and what is added have it.
        self.token, self.pattern_token, self.first_head = (at.span[n] for n in (2, 3, 4))

    @staticmethod
    def scratch(sizes: Sizes, config: CombineConfig, gates: tuple[bool, ...]):
        """What it needs in shared memory."""
        computing, gated, adds = config.computing, sum(gates), len(gates) > 1
        slots, added_slots, places = (
            computing * each for each in (config.stages, config.added_stages, _PLACES)
        )
        rows = HALF, sizes.head_dim
        return {
            "words_tile": packing.tile(slots, config.matrices * HALF, sizes.head_dim),
            "sums_tile": plgpu.SMEM((places, sizes.capacity, HALF), jnp.float32),
            "values_tile": plgpu.SMEM((places, _tile_entries(sizes)), jnp.float32),
            "scales_tile": plgpu.SMEM((places, _tile_entries(sizes)), jnp.float32),
            "gates_tile": plgpu.SMEM((places, gated, HALF), jnp.float32) if gated else None,
            "added_tile": hopper.operand_tile((added_slots, *rows)) if adds else None,
            "out_tile": hopper.operand_tile((computing, *rows)),
            "lse_tile": None if gates else plgpu.SMEM((computing, HALF), jnp.float32),
            "words_ring": Ring.barriers(slots, 1, consumers=1),
            "added_ring": Ring.barriers(added_slots, HALF // sizes.groups, consumers=1),
            "number_ring": Ring.barriers(places, 3 + gated, consumers=1),
        }

    def ring(self, name: str, size: int, warpgroup):
        """The ring of that name that a computing warpgroup has."""
        return Ring(size, *getattr(self.at, name), first=warpgroup * size)

    def rings(self, warpgroup):
        """Of entries, of what is added, and of the tiles' numbers, of a computing warpgroup."""
        config = self.config
        return (
            self.ring("words_ring", config.stages, warpgroup),
            self.ring("added_ring", config.added_stages, warpgroup),
            self.ring("number_ring", _PLACES, warpgroup),
        )

    def tile(self, i):
        """(number, batch element, KV head, number within these) of this thread block's tile i."""
        tile = self.at.program + i * self.at.programs
        sequence, heads = lax.div(tile, self.across), self.sizes.heads
        return tile, lax.div(sequence, heads), lax.rem(sequence, heads), lax.rem(tile, self.across)

    def load(self):
        """Fills the rings, of all computing warpgroups in turns."""
        computing = self.config.computing

        def for_each(n, load):
            for warpgroup in range(computing):
                i = n * computing + warpgroup
                pl.when(i < self.own)(functools.partial(load, warpgroup, n, *self.tile(i)))

        @pl.loop(0, lax.div(self.own + computing - 1, computing))
        def _(n):
            for_each(n, self._load_numbers)

            @pl.loop(0, self.steps)
            def _(step):
                for_each(n, functools.partial(self._load_entries, step))

            for number in range(self.added):
                for_each(n, functools.partial(self._load_added, number))

    def _load_numbers(self, warpgroup, n, tile, b, h, row):
        at = self.at
        _, _, ring = self.rings(warpgroup)
        place = ring.claim(n)
        ready = ring.ready.at[place]
        for source, target in (
            (at.sums, at.sums_tile),
            (at.values, at.values_tile),
            (at.scales, at.scales_tile),
        ):
            plgpu.copy_gmem_to_smem(source.at[tile], target.at[place], ready)
        for number, gate in enumerate(self.gated):
            own = lax.div(self.pattern_token, self.width) + row
            source = getattr(at, f"gate{gate}").at[b, self.first_head + h, own]
            plgpu.copy_gmem_to_smem(source, at.gates_tile.at[place, number], ready)

    def _load_entries(self, step, warpgroup, n, tile, b, h, row):
        at, height = self.at, self.config.matrices * HALF
        ring, _, _ = self.rings(warpgroup)
        slot = ring.claim(n * self.steps + step)
        rows = pl.ds(pl.multiple_of(step * height, height), height)
        source, ready = at.words.at[tile, rows], ring.ready.at[slot]
        plgpu.copy_gmem_to_smem(source, at.words_tile.at[slot], ready)

    def _load_added(self, number, warpgroup, n, tile, b, h, row):
        at = self.at
        _, ring, _ = self.rings(warpgroup)
        slot = ring.claim(n * self.added + number)
        first, h = self.pattern_token + row * self.width, self.first_head + h

        def load(token):
            source = getattr(at, f"rows{number}").at[b, first + token, h]
            target = at.added_tile.at[slot, self._rows_of(token)]
            plgpu.copy_gmem_to_smem(source, target, ring.ready.at[slot])

        hopper.by_warp(self.width, load)

    def _rows_of(self, token: int):
        """Those of a tile that one of its tokens has."""
        return pl.ds(token * self.sizes.groups, self.sizes.groups)

    def compute(self):
        """Combines tile after tile; results leave while the next tile is under way."""
        computing = self.config.computing
        tiles = lax.div(self.own - self.at.warpgroup + computing - 1, computing)
        lax.fori_loop(0, tiles, self._combine, None)
        plgpu.wait_smem_to_gmem(0)

    def _combine(self, n, _):
        at, shape = self.at, (HALF, self.sizes.head_dim)
        ring, added_ring, number_ring = self.rings(at.warpgroup)
        place = number_ring.receive(n)
        begin = n * self.steps

        def logits(number):
            value = self._of_entries(at.values_tile, place, number)
            found = plgpu.load(at.sums_tile.at[place, number], layout=hopper.ROW) + value
            # An empty entry's place may hold anything.
            return jnp.where(value > -jnp.inf, found * LOG2E, -jnp.inf)

        top = lax.fori_loop(
            0, self.sizes.capacity, lambda number, top: jnp.maximum(top, logits(number)),
            hopper.full((HALF,), hopper.LOWEST, hopper.ROW),
        )  # fmt: skip

        def add(step, carry):
            acc, total = carry
            slot = ring.receive(begin + step)
            for matrix in range(self.config.matrices):
                number = step * self.config.matrices + matrix
                weights = jnp.exp2(logits(number) - top)
                scale = self._of_entries(at.scales_tile, place, number)
                factors = weights * packing.SHIFTED * scale
                words = at.words_tile.at[slot, pl.ds(matrix * HALF, HALF)]
                words = plgpu.load(words, layout=plgpu.Layout.WGMMA)
                # Whatever an empty entry's place holds, it is numbers when unpacked.
                acc = acc + packing.unpack(words) * hopper.along_rows(factors, shape)
                total = total + weights
            ring.release(begin + step)
            return acc, total

        zeros = hopper.full(shape, 0), hopper.full((HALF,), 0, hopper.ROW)
        acc, total = lax.fori_loop(0, self.steps, add, zeros)
        some = total != 0
        total = jnp.where(some, total, 1.0)
        factor = packing.UNPACKED / total
        if self.gates and self.gates[0]:
            factor = factor * self._gate(place, 0)
        acc = acc * hopper.along_rows(factor, shape)
        for number in range(self.added):
            turn = n * self.added + number
            rows = at.added_tile.at[added_ring.receive(turn)]
            rows = plgpu.load(rows, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            if self.gates[1 + number]:
                rows = rows * hopper.along_rows(self._gate(place, 1 + number), shape)
            acc = acc + rows
            added_ring.release(turn)
        number_ring.release(n)
        lse = None if self.gates else top * (1 / LOG2E) + jnp.log(total)
        self._store(n, acc, None if lse is None else jnp.where(some, lse, -jnp.inf))

    def _of_entries(self, numbers, place, matrix):
        """Of each row, the number of the entry that a matrix has for it."""
        width = HALF // self.sizes.groups
        own = pl.ds(pl.multiple_of(matrix * width, width), width)
        return hopper_lanes.spread(numbers.at[place, own])

    def _gate(self, place, number: int):
        tile = self.at.gates_tile.at[place, self.gated.index(number)]
        return plgpu.load(tile, layout=hopper.ROW)

    def _store(self, n, acc, lse):
        at, own = self.at, self.at.warpgroup
        _, b, h, row = self.tile(n * self.config.computing + own)
        h, first = self.first_head + h, self.token + row * self.width
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        at.out_tile[own] = acc.astype(at.out.dtype)
        if lse is not None:
            at.lse_tile[own] = lse
        plgpu.commit_smem()

        def store(token):
            source = at.out_tile.at[own, self._rows_of(token)]
            plgpu.copy_smem_to_gmem(source, at.out.at[b, first + token, h], commit_group=False)

        hopper.by_warp(self.width, store)
        if lse is not None:
            target = at.lse.at[b, h, lax.div(first, self.width)]
            plgpu.copy_smem_to_gmem(at.lse_tile.at[own], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


@functools.partial(jax.jit, static_argnames=("sizes", "config"))
def combine_entries(
    words,
    lse,
    chunk: Chunk,
    results: tuple[jax.Array, jax.Array | None],
    sizes: Sizes,
    config: CombineConfig,
    *,
    gate: jax.Array | None = None,
    added: Sequence[Added] = (),
) -> tuple[jax.Array, jax.Array | None]:
    """Combines the results of a chunk's entries, which replaces the chunk's rows in `results`.

    Args:
      words: results of entries, normalised and packed (`packing`), int32
        [entries, groups, 3 D / 8], each at its place; those of empty entries may be anything.
      lse: f32 [entries, groups], likewise, without the entries' values.
      chunk: the entries, planned with the scales that they are packed with.
      results: out [B, T, H * groups, D], and lse f32 [B, H, T, groups], or None where there is a
        gate or something is added; T and the chunk's first tokens are multiples of 8. Of the H KV
        heads, those of the chunk are written.
      sizes: of the call; the chunk is a multiple of 8.
      config: of the kernel.
      gate: f32 [B, H, T', groups], the factor of the combined results; None for 1.
      added: what is added to them.

    Returns:
      The results; 0 and -inf, before anything is added, where a query has no entries.
    """
    out, out_lse = results
    gates: tuple[bool, ...] = ()
    if out_lse is None:
        gates = (gate is not None, *(each.gate is not None for each in added))
    tiles = sizes.batch * sizes.chunk * sizes.heads * sizes.groups // HALF

    def entries_by_tile(x):
        x = x.reshape(tiles, -1)
        return jnp.pad(x, [(0, 0), (0, _tile_entries(sizes) - x.shape[1])])

    def by_head(x):
        """[B, tokens, heads, groups, D]."""
        return x.reshape(*x.shape[:2], -1, sizes.groups, sizes.head_dim)

    def by_tile(x):
        """[B, heads, tokens, groups] -> [B, heads, tiles, 64]."""
        return x if x is None else x.reshape(*x.shape[:2], -1, HALF)

    operands = {
        "words": words.reshape(tiles, sizes.capacity * HALF, -1),
        "sums": lse.reshape(tiles, sizes.capacity, HALF),
        "values": entries_by_tile(chunk.value),
        "scales": entries_by_tile(chunk.scale),
        "span": chunk.span,
        "gate0": by_tile(gate),
    }
    for number, each in enumerate(added):
        operands[f"rows{number}"] = by_head(each.rows)
        operands[f"gate{1 + number}"] = by_tile(each.gate)
    found = hopper.launch(
        "combine_entries",
        hopper.roles(
            functools.partial(_Combination, sizes, config, gates), computing=config.computing
        ),
        programs=config.programs,
        operands=operands,
        updated={"out": by_head(out), "lse": by_tile(out_lse)},
        outputs={},
        scratch=_Combination.scratch(sizes, config, gates),
        warpgroups=config.computing + 1,
    )
    lse = None if out_lse is None else found["lse"].reshape(out_lse.shape)
    return found["out"].reshape(out.shape), lse
