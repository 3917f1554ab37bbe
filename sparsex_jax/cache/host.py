"""The remote past of a sparse layer with keys and values in the host's memory: exact.

On the device are block features, landmarks with their keys and values, and some blocks that were
used lately. A decoding step fetches the selected blocks that are not there; a chunk of a prefill,
whose tokens select nearly everything, takes keys and values page by page.

Programs reach the host's memory by callbacks, in order. XLA's own way, arrays of memory kind
"pinned_host" that a program slices, could not be shown to work on GPUs (docs/log.md).
"""

import itertools
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from sparsex_jax.branches import Ranges, landmark_ranges, select_remote
from sparsex_jax.cache.device import (
    empty_blocks,
    empty_pyramid,
    extend_pyramid,
    room,
    touched,
    touched_leaves,
    write,
    write_blocks,
)
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.fusion import Branch, SoftmaxSum
from sparsex_jax.landmarks import Nodes
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.scoring import BlockIndex, Blocks

SLOTS = 512  # blocks of each KV head that are kept on the device
PAGE = 2**18  # tokens of a page


class HostStore:
    """Keys and values of one layer in the host's memory; what is not written takes none.

    Attributes:
      k: [N, Hkv, D]. v: likewise.
      number: names the store in programs.
    """

    _all: "weakref.WeakValueDictionary[int, HostStore]" = weakref.WeakValueDictionary()
    _numbers = itertools.count(1)

    def __init__(self, tokens: int, heads: int, dim: int, dtype, block_size: int):
        self.k, self.v = (np.zeros((tokens, heads, dim), dtype) for _ in range(2))
        self.number, self._block_size = next(self._numbers), block_size
        self._all[self.number] = self

    @classmethod
    def find(cls, number) -> "HostStore":
        """The store of a number."""
        return cls._all[int(number)]

    def write(self, first: int, k: np.ndarray, v: np.ndarray) -> None:
        """Keys and values [C, Hkv, D] of the tokens from `first` on."""
        for old, new in ((self.k, k), (self.v, v)):
            old[first : first + len(new)] = new

    def read(self, first: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [tokens, Hkv, D] from a token on."""
        return self.k[first : first + tokens], self.v[first : first + tokens]

    def blocks(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [Hkv, K, S, D] of blocks int [Hkv, K]; zeros for -1."""
        heads, dim = self.k.shape[1:]
        head, place = np.nonzero(wanted >= 0)
        found = []
        for x in (self.k, self.v):
            out = np.zeros((*wanted.shape, self._block_size, dim), x.dtype)
            by_block = x.reshape(-1, self._block_size, heads, dim)
            out[head, place] = by_block[wanted[head, place], :, head]
            found.append(out)
        return found[0], found[1]


def _write(number, first, k, v) -> None:
    HostStore.find(number).write(int(first), np.asarray(k)[0], np.asarray(v)[0])


class HostRemote(NamedTuple):
    """The past of a sparse layer; one sequence (B = 1).

    Attributes:
      tail_k: keys of the last L + S tokens as they are stored, [1, L + S, Hkv, D].
      tail_v: their values.
      number: of the HostStore, int32 scalar.
      salience: f32 [1, N, Hkv].
      blocks: as in `DeviceRemote`.
      nodes: likewise.
      pyramid: aligned nodes; their tokens are numbers of landmarks.
      mark_k: keys of the landmarks of all segments, [1, M, Hkv, D].
      mark_v: their values.
      mark_salience: f32 [1, M, Hkv].
      slot_k: keys of blocks that were used lately, [1, SLOTS S, Hkv, D].
      slot_v: their values.
      block_of: the block in each slot, or -1, int32 [Hkv, SLOTS].
      slot_of: the slot of each block, or -1, int32 [Hkv, N / S].
      used: when a slot was used last, int32 [Hkv, SLOTS].
      clock: decoding steps so far, int32 scalar.
      hits: blocks that were selected and there, int32 scalar.
      misses: blocks that were fetched, int32 scalar.
    """

    tail_k: jax.Array
    tail_v: jax.Array
    number: jax.Array
    salience: jax.Array
    blocks: Blocks
    nodes: jax.Array | None
    pyramid: tuple[Nodes, ...]
    mark_k: jax.Array
    mark_v: jax.Array
    mark_salience: jax.Array
    slot_k: jax.Array
    slot_v: jax.Array
    block_of: jax.Array
    slot_of: jax.Array
    used: jax.Array
    clock: jax.Array
    hits: jax.Array
    misses: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, capacity: int, chunk: int) -> "HostRemote":
        """As `DeviceRemote.empty`; the caller makes the store and sets its number."""
        attention, heads, dtype = config.attention, config.num_kv_heads, jnp.dtype(config.dtype)
        tokens, size = room(capacity, chunk, attention), attention.block_size
        segments = capacity // attention.segment_length + touched(chunk, attention.segment_length)
        marks = (segments + 1) * attention.landmarks_per_segment
        slots = max(SLOTS, 2 * attention.top_k)

        blocks, nodes = empty_blocks(config, 1, tokens)

        def keys(count):
            return jnp.zeros((1, count, heads, config.head_dim), dtype)

        tail = attention.segment_length + size
        return cls(
            keys(tail), keys(tail),
            number=jnp.int32(0),
            salience=jnp.zeros((1, tokens, heads), jnp.float32),
            blocks=blocks, nodes=nodes,
            pyramid=empty_pyramid(attention, 1, heads, capacity, chunk),
            mark_k=keys(marks), mark_v=keys(marks),
            mark_salience=jnp.zeros((1, marks, heads), jnp.float32),
            slot_k=keys(slots * size), slot_v=keys(slots * size),
            block_of=jnp.full((heads, slots), -1, jnp.int32),
            slot_of=jnp.full((heads, tokens // size), -1, jnp.int32),
            used=jnp.zeros((heads, slots), jnp.int32),
            clock=jnp.int32(0), hits=jnp.int32(0), misses=jnp.int32(0),
        )  # fmt: skip

    @property
    def block_index(self) -> BlockIndex:
        """As `DeviceRemote.block_index`."""
        return BlockIndex(self.blocks.features, self.nodes)

    def split(self) -> tuple[tuple, tuple]:
        """As `DeviceRemote.split`."""
        return self[:2], self[2:]

    @staticmethod
    def join(kept: tuple, appended: tuple) -> "HostRemote":
        """As `DeviceRemote.join`."""
        return HostRemote(*kept, *appended)

    def append(
        self,
        keys: KeySide,
        blocks: Blocks,
        length: jax.Array,
        valid: jax.Array,
        config: AttentionConfig,
        settle: bool,
    ) -> "HostRemote":
        """As `DeviceRemote.append`; it settles if there are more than a block of tokens."""
        io_callback(_write, None, self.number, length, keys.k, keys.v, ordered=True)
        kept, tokens = self.tail_k.shape[1], keys.k.shape[1]
        joined = [
            jnp.concatenate(x, axis=1) for x in ((self.tail_k, keys.k), (self.tail_v, keys.v))
        ]
        tail = (jax.lax.dynamic_slice_in_dim(x, valid, kept, axis=1) for x in joined)
        blocks, nodes = write_blocks(
            self.blocks, self.nodes, blocks, length // config.block_size, config
        )
        salience = write(self.salience, keys.salience, length)
        after = self._replace(salience=salience, blocks=blocks, nodes=nodes)
        if settle:
            after = after._settle(length, tokens, joined, length - kept, config)
        after = after._replace(**dict(zip(("tail_k", "tail_v"), tail, strict=True)))
        return after._forget(length // config.block_size, touched(tokens, config.block_size))

    def settle(self, length: jax.Array, tokens: int, config: AttentionConfig) -> "HostRemote":
        """As `DeviceRemote.settle`, of no more than a block of tokens."""
        tail, first = [self.tail_k, self.tail_v], jnp.maximum(length - tokens, 0)
        return self._settle(first, tokens, tail, length - self.tail_k.shape[1], config)

    def _settle(self, first, tokens: int, keys, first_key, config) -> "HostRemote":
        """`settle` with keys and values of all tokens of the leaves, from `first_key` on."""
        leaves = touched_leaves(self.salience, first, tokens, config)
        place = leaves.token.reshape(1, leaves.token.shape[1], -1).swapaxes(1, 2)
        local = jnp.clip(place - first_key, 0, keys[0].shape[1] - 1)[..., None]
        mark = first // config.segment_length * config.landmarks_per_segment
        number = mark + jnp.arange(place.shape[1], dtype=jnp.int32).reshape(leaves.token.shape[2:])
        numbered = leaves._replace(token=jnp.broadcast_to(number, leaves.token.shape))
        marked = leaves.salience.reshape(1, leaves.token.shape[1], -1).swapaxes(1, 2)
        mark_k, mark_v = (jnp.take_along_axis(x, local, axis=1, mode="clip") for x in keys)
        return self._replace(
            pyramid=extend_pyramid(self.pyramid, numbered, first, tokens, config),
            mark_k=write(self.mark_k, mark_k, mark),
            mark_v=write(self.mark_v, mark_v, mark),
            mark_salience=write(self.mark_salience, marked, mark),
        )

    def _forget(self, first: jax.Array, count: int) -> "HostRemote":
        """Takes blocks that were written to out of the slots."""
        heads, slots = self.block_of.shape
        head = jnp.arange(heads)[:, None]
        block = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32), (heads, count))
        slot = self.slot_of.at[head, block].get(mode="fill", fill_value=-1)
        slot = jnp.where(slot < 0, slots, slot)
        return self._replace(
            slot_of=self.slot_of.at[head, block].set(-1, mode="drop"),
            block_of=self.block_of.at[head, slot].set(-1, mode="drop"),
            used=self.used.at[head, slot].set(0, mode="drop"),
        )

    def landmarks(
        self, first_position: jax.Array, tokens: int, config: AttentionConfig
    ) -> Ranges | None:
        """As `DeviceRemote.landmarks`."""
        if not self.pyramid:
            return None
        return landmark_ranges(
            self.mark_k,
            self.mark_v,
            self.mark_salience,
            list(self.pyramid),
            first_position,
            tokens,
            None,
            config,
        )

    def attend(
        self,
        queries: QuerySide,
        first_position: jax.Array,
        local_start: jax.Array,
        config: AttentionConfig,
        implementation: str | None = None,
    ) -> tuple[Branch | None, Branch | None, "HostRemote"]:
        """As `DeviceRemote.attend`."""
        dynamic, after = None, self
        if config.top_k:
            size = config.block_size
            index, bias = select_remote(
                queries.features, self.block_index, local_start, None, config, implementation,
                queries.recency,
            )  # fmt: skip
            if queries.q.shape[1] == 1:
                slots, after = self._fetch(index[0, 0], size)
                blocks = BlockCSR.from_selection(slots[None, None], bias, self.used.shape[1])
                dynamic = block_sparse_attention(
                    queries.q, after.slot_k, after.slot_v, blocks, block_size=size,
                    implementation=implementation,
                )  # fmt: skip
            else:
                end = jnp.max(local_start)
                dynamic = self._paged(queries.q, index, bias, end, size, implementation)
        return None, dynamic, after

    def _fetch(self, wanted: jax.Array, size: int) -> tuple[jax.Array, "HostRemote"]:
        """Slots of blocks [Hkv, K], -1 for -1, and the cache in which the blocks are there."""
        heads, slots = self.used.shape
        head, clock = jnp.arange(heads)[:, None], self.clock + 1
        found = jnp.where(wanted < 0, -1, self.slot_of[head, jnp.maximum(wanted, 0)])
        missing = (wanted >= 0) & (found < 0)

        def only(condition, x, nowhere):
            return jnp.where(condition, x, nowhere)

        used = self.used.at[head, only(found >= 0, found, slots)].set(clock, mode="drop")
        oldest = jax.lax.top_k(-used, wanted.shape[1])[1]
        rank = jnp.cumsum(missing, axis=1) - 1
        slot = only(missing, jnp.take_along_axis(oldest, jnp.maximum(rank, 0), axis=1), found)
        place = only(missing, slot, slots)
        evicted = self.block_of.at[head, place].get(mode="fill", fill_value=-1)
        blocks = self.slot_of.shape[1]
        slot_of = self.slot_of.at[head, only(evicted >= 0, evicted, blocks)].set(-1, mode="drop")
        slot_of = slot_of.at[head, only(missing, wanted, blocks)].set(slot, mode="drop")
        shape = *wanted.shape, size, self.slot_k.shape[3]
        kinds = [jax.ShapeDtypeStruct(shape, x.dtype) for x in (self.slot_k, self.slot_v)]

        def fetch():
            asked = only(missing, wanted, -1)
            return tuple(io_callback(_blocks, kinds, self.number, asked, ordered=True))

        def nothing():
            return tuple(jnp.zeros(x.shape, x.dtype) for x in kinds)

        fresh = jax.lax.cond(missing.any(), fetch, nothing)

        def put(old, new):
            by_slot = old.reshape(slots, size, heads, -1)
            return by_slot.at[place, :, head].set(new, mode="drop").reshape(old.shape)

        return slot, self._replace(
            slot_k=put(self.slot_k, fresh[0]),
            slot_v=put(self.slot_v, fresh[1]),
            block_of=self.block_of.at[head, place].set(wanted, mode="drop"),
            slot_of=slot_of,
            used=used.at[head, place].set(clock, mode="drop"),
            clock=clock,
            hits=self.hits + jnp.sum(found >= 0, dtype=jnp.int32),
            misses=self.misses + jnp.sum(missing, dtype=jnp.int32),
        )

    def _paged(self, q, index, bias, end, size: int, implementation) -> Branch:
        """Attention to the selected blocks, page after page of those before token `end`."""
        tokens = min(PAGE, self.salience.shape[1])
        heads, dim = self.slot_k.shape[2:]
        page_blocks = tokens // size
        kinds = [jax.ShapeDtypeStruct((1, tokens, heads, dim), self.slot_k.dtype)] * 2

        def add(page, total):
            first = page * page_blocks
            k, v = io_callback(_page(tokens), kinds, self.number, first * size, ordered=True)
            inside = (index >= first) & (index < first + page_blocks)
            blocks = BlockCSR.from_selection(
                jnp.where(inside, index - first, -1), bias, page_blocks
            )
            return total.add(
                block_sparse_attention(
                    q, k, v, blocks, block_size=size, implementation=implementation
                )
            )

        pages = (end + tokens - 1) // tokens
        return jax.lax.fori_loop(0, pages, add, SoftmaxSum.empty(q)).branch(q.dtype)


def _blocks(number, wanted):
    return HostStore.find(number).blocks(np.asarray(wanted))


def _page(tokens: int):
    """A callback that reads a page; the last one is filled up with zeros."""

    def read(number, first):
        found = []
        for x in HostStore.find(number).read(int(first), tokens):
            missing = [(0, tokens - len(x))] + [(0, 0)] * 2
            found.append((x if len(x) == tokens else np.pad(x, missing))[None])
        return found

    return read
