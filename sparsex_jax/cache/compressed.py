"""The remote past of a sparse layer in O(sqrt N) memory: what is old is pooled over time.

Of N old tokens ceil(sqrt(N)) latent slots are kept for each KV head. A slot is the average of the
keys, and of the values, of neighbouring blocks, weighted as in the block features: by a softmax of
the learned pooling logits over all its tokens. Slots that are merged are the average over both, so
pooling again as N grows loses nothing that pooling once would not. At any time there are slots of
one span and, before them, of twice that span, and at the end one that is filling up.

Landmarks survive: the nodes of the pyramid that queries may see are kept, O(log N) of them. Slots
are attended to beside them, in one softmax, with their tokens' average salience as bias. There is
no dynamic branch.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.range_attention import range_attention
from pallas_kernels.segments import choose_rows, first_places
from sparsex_jax.branches import landmark_groups
from sparsex_jax.cache.device import touched, write
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.fusion import Branch, merge_softmax
from sparsex_jax.landmarks import num_levels, visible_nodes
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.scoring import Blocks
from sparsex_jax.spans import remote_end

_LEVELS = 26  # of spans: 2^25 blocks
_SPARE = 6  # nodes of a level beyond those of a chunk's queries: pairs, and what is not complete


def most_slots(tokens: int) -> int:
    """Slots that so many old tokens may have."""
    return math.isqrt(max(tokens - 1, 0)) + 1


class Partition(NamedTuple):
    """How old blocks are shared among slots: slot i < wide has 2^(level + 1), others 2^level.

    Attributes:
      level: int32.
      wide: int32.
    """

    level: jax.Array
    wide: jax.Array

    def slot(self, block: jax.Array) -> jax.Array:
        """The slot of each block."""
        unit = block >> self.level
        return jnp.where(unit < 2 * self.wide, unit >> 1, unit - self.wide)

    def first_block(self, slot: jax.Array) -> jax.Array:
        """The first block of each slot."""
        unit = jnp.where(slot < self.wide, 2 * slot, slot + self.wide)
        return unit << self.level


def _slots_of(tokens: jax.Array) -> jax.Array:
    """ceil(sqrt(tokens)) for int32, exactly."""
    tokens = tokens.astype(jnp.uint32)
    root = jnp.sqrt(tokens.astype(jnp.float32)).astype(jnp.uint32)
    root = jnp.where(root * root > tokens, root - 1, root)
    root = jnp.where((root + 1) * (root + 1) <= tokens, root + 1, root)
    return (root + (root * root < tokens)).astype(jnp.int32)


def partition(blocks: jax.Array, block_size: int) -> Partition:
    """That of a number of old blocks; the one of fewer blocks is finer.

    It depends on nothing else, so neither on the chunks in which they came. With u whole units of
    2^level blocks, `wide` pairs of them are joined, the oldest first, as many as leave M - 2 slots,
    M = ceil(sqrt(u 2^level S)); an odd number of units may need one more, and what is behind the
    last whole unit fills up the last slot. The level is the lowest at which pairs suffice. Both
    follow from whole units, so that they never fall as blocks are added.

    Args:
      blocks: int32 scalar.
      block_size: S.
    """
    level = jnp.arange(_LEVELS, dtype=jnp.int32)
    units = blocks >> level
    even = units // 2 * 2
    enough = even // 2 <= _slots_of((even << level) * block_size) - 2
    lowest = jnp.argmax(enough | (even == 0)).astype(jnp.int32)
    units = blocks >> lowest
    budget = _slots_of((units << lowest) * block_size) - 2
    return Partition(lowest, jnp.clip(units - budget, 0, units // 2))


class Pooled(NamedTuple):
    """Averages over tokens, [..., H, D] or [..., H].

    Attributes:
      k: f32, of keys. v: f32, of values. bias: f32, of saliences.
      mass: f32, log of the sum of the weights; -inf of nothing.
    """

    k: jax.Array
    v: jax.Array
    bias: jax.Array
    mass: jax.Array

    @classmethod
    def of_blocks(cls, k, v, salience, logits, size: int) -> "Pooled":
        """Of blocks of tokens, [T, H, D] and [T, H] to [T / S, H, D] and [T / S, H]."""

        def split(x):
            return x.astype(jnp.float32).reshape(-1, size, *x.shape[1:])

        k, v, salience, logits = map(split, (k, v, salience, logits))
        weights = jax.nn.softmax(logits, axis=1)

        def mean(x):
            return jnp.sum(x * (weights if x.ndim == 3 else weights[..., None]), axis=1)

        return cls(mean(k), mean(v), mean(salience), jax.nn.logsumexp(logits, axis=1))

    def join(self, other: "Pooled") -> "Pooled":
        """The averages over the tokens of both."""
        mass = jnp.logaddexp(self.mass, other.mass)
        finite = jnp.where(mass > -jnp.inf, mass, 0)
        shares = [jnp.exp(x.mass - finite) for x in (self, other)]

        def mean(x, y):
            left, right = (s if x.ndim == s.ndim else s[..., None] for s in shares)
            return left * x + right * y

        pairs = zip(self[:3], other[:3], strict=True)
        return Pooled(*(mean(x, y) for x, y in pairs), mass)


def join_runs(keys: jax.Array, items: Pooled, count: int) -> Pooled:
    """Joins items [M, ...] of equal keys, non-decreasing, to [count, ...]; others are empty."""

    def add(earlier, later):
        same = earlier[0] == later[0]
        joined = earlier[1].join(later[1])
        return later[0], jax.tree.map(lambda x, y: choose_rows(same, x, y), joined, later[1])

    totals = jax.lax.associative_scan(add, (keys, items))[1]
    begin = first_places(keys, count)
    found = begin[1:] > begin[:-1]
    last = jnp.maximum(begin[1:] - 1, 0)
    empty = Pooled(0.0, 0.0, 0.0, -jnp.inf)
    return jax.tree.map(lambda x, e: choose_rows(found, x[last], e), totals, empty)


class Level(NamedTuple):
    """The newest nodes of a level of the pyramid: node i at place i mod P.

    Attributes:
      salience: f32 [B, Hkv, P, m], most salient first.
      k: [B, Hkv, P, m, D].
      v: likewise.
    """

    salience: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def best(cls, salience: jax.Array, k: jax.Array, v: jax.Array, count: int) -> "Level":
        """The `count` most salient of the tokens of each node; ties: the earlier one."""
        top, place = jax.lax.top_k(salience, count)
        return cls(top, *(jnp.take_along_axis(x, place[..., None], axis=3) for x in (k, v)))

    def nodes(self, first: jax.Array, count: int) -> "Level":
        """Nodes from a number on."""
        place = (first + jnp.arange(count, dtype=jnp.int32)) % self.salience.shape[2]
        return Level(*(x[:, :, place] for x in self))

    def write(self, new: "Level", first: jax.Array) -> "Level":
        """With new nodes from a number on, no more than there are places."""
        place = (first + jnp.arange(new.salience.shape[2], dtype=jnp.int32)) % (
            self.salience.shape[2]
        )
        return Level(*(old.at[:, :, place].set(x) for old, x in zip(self, new, strict=True)))


class CompressedRemote(NamedTuple):
    """The past of a sparse layer.

    Attributes:
      tail_k: keys of the last L tokens, [B, L, Hkv, D].
      tail_v: their values.
      tail_salience: f32 [B, L, Hkv].
      tail_logits: of the pooling, f32 [B, L, Hkv].
      slots: of the first `pooled` blocks, [B, M, Hkv, ...].
      staged: one for each later block, [B, R, Hkv, ...].
      pooled: how many blocks are in slots: those that every later token sees as remote; int32 [B].
      levels: of the pyramid.
    """

    tail_k: jax.Array
    tail_v: jax.Array
    tail_salience: jax.Array
    tail_logits: jax.Array
    slots: Pooled
    staged: Pooled
    pooled: jax.Array
    levels: tuple[Level, ...]

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, capacity: int, chunk: int
    ) -> "CompressedRemote":
        """As `DeviceRemote.empty`."""
        attention, heads, dim = config.attention, config.num_kv_heads, config.head_dim
        dtype = jnp.dtype(config.dtype)

        def zeros(*shape, dtype=dtype):
            return jnp.zeros((batch_size, *shape), dtype)

        def pooled(count):
            numbers = zeros(count, heads, dtype=jnp.float32)
            vectors = zeros(count, heads, dim, dtype=jnp.float32)
            return Pooled(vectors, vectors, numbers, jnp.full_like(numbers, -jnp.inf))

        def level(number):
            per_node, width = attention.landmarks_per_segment, attention.segment_length << number
            reach = chunk + attention.window + 2 * attention.block_size + attention.segment_length
            places = 2 * (attention.nodes_per_level + 1) + _SPARE + touched(reach, width)
            marks = heads, places, per_node
            return Level(zeros(*marks, dtype=jnp.float32), zeros(*marks, dim), zeros(*marks, dim))

        size, length = attention.block_size, attention.segment_length
        count = num_levels(capacity // length, attention) if attention.landmarks != "off" else 0
        return cls(
            zeros(length, heads, dim),
            zeros(length, heads, dim),
            zeros(length, heads, dtype=jnp.float32),
            zeros(length, heads, dtype=jnp.float32),
            slots=pooled(most_slots(capacity)),
            staged=pooled(attention.window // size + 2 + touched(chunk, size)),
            pooled=jnp.zeros(batch_size, jnp.int32),
            levels=tuple(map(level, range(count))),
        )

    def split(self) -> tuple["CompressedRemote", tuple]:
        """As `DeviceRemote.split`."""
        return self, ()

    @staticmethod
    def join(kept: "CompressedRemote", appended: tuple) -> "CompressedRemote":
        """As `DeviceRemote.join`."""
        return kept

    def append(
        self,
        keys: KeySide,
        blocks: Blocks,
        length: jax.Array,
        valid: jax.Array,
        config: AttentionConfig,
        settle: bool,
    ) -> "CompressedRemote":
        """As `DeviceRemote.append`; it always settles, and blocks' features are of no use."""
        width = config.segment_length
        new = keys.k, keys.v, keys.salience, keys.block_logits
        tokens = [jnp.concatenate(x, axis=1) for x in zip(self[:4], new, strict=True)]
        tail = (jax.lax.dynamic_slice_in_dim(x, valid, width, axis=1) for x in tokens)
        remote = remote_end(length, 0, config) // config.block_size
        slots, staged = self._pool(remote, config)
        count, first = keys.k.shape[1], length // config.block_size
        fresh = self._of_blocks(tokens, first * config.block_size - (length - width), count, config)
        staged = jax.tree.map(lambda old, x: write(old, x, first - remote), staged, fresh)
        levels = self._extend_levels(tokens, length, count, config)
        return CompressedRemote(
            *tail, slots, staged, jnp.broadcast_to(remote, self.pooled.shape), levels
        )

    def settle(self, length: jax.Array, tokens: int, config: AttentionConfig) -> "CompressedRemote":
        """As `DeviceRemote.settle`: nothing is left to do."""
        return self

    def _of_blocks(self, tokens, begin, count: int, config: AttentionConfig) -> Pooled:
        """The blocks that `count` new tokens lie in, the first of which begins at `begin`."""
        size = config.block_size
        length = touched(count, size) * size
        parts = [_slice_padded(x, begin, length) for x in tokens]
        return jax.vmap(lambda *x: Pooled.of_blocks(*x, size))(*parts)

    def _pool(self, remote: jax.Array, config: AttentionConfig) -> tuple[Pooled, Pooled]:
        """Slots of the first `remote` blocks, and what of `staged` is behind them."""
        before, size = self.pooled[0], config.block_size
        old, new = partition(before, size), partition(remote, size)
        slots, staged = (x.mass.shape[1] for x in (self.slots, self.staged))
        # What is not in use is empty: it changes nothing where it is joined.
        first = jnp.minimum(
            old.first_block(jnp.arange(slots, dtype=jnp.int32)), jnp.maximum(before - 1, 0)
        )
        block = before + jnp.arange(staged, dtype=jnp.int32)
        to = jnp.concatenate((new.slot(first), jnp.where(block < remote, new.slot(block), slots)))
        items = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), self.slots, self.staged)
        joined = jax.vmap(lambda x: join_runs(to, x, slots))(items)
        rest = jax.tree.map(lambda x: _slice_padded(x, remote - before, staged), self.staged)
        return joined, rest

    def _extend_levels(self, tokens, length, count: int, config: AttentionConfig):
        """The pyramid with the nodes that new tokens lie in; incomplete ones are never visible."""
        levels: list[Level] = []
        for number, level in enumerate(self.levels):
            width = config.segment_length << number
            first, nodes = length // width, touched(count, width)
            if number == 0:
                begin = first * width - (length - width)
                parts = (_slice_padded(x, begin, nodes * width) for x in tokens[:3])
                k, v, salience = (
                    jnp.moveaxis(x.reshape(len(x), nodes, width, *x.shape[2:]), 3, 1) for x in parts
                )
            else:
                children = levels[-1].nodes(2 * first, 2 * nodes)
                salience, k, v = (
                    x.reshape(*x.shape[:2], nodes, 2 * x.shape[3], *x.shape[4:]) for x in children
                )
            best = Level.best(salience, k, v, config.landmarks_per_segment)
            levels.append(level.write(best, first))
        return tuple(levels)

    def landmarks(self, first_position: jax.Array, tokens: int, config: AttentionConfig) -> None:
        """None: they are attended beside the slots."""

    def attend(
        self,
        queries: QuerySide,
        first_position: jax.Array,
        local_start: jax.Array,
        config: AttentionConfig,
        implementation: str | None = None,
    ) -> tuple[Branch | None, Branch | None, "CompressedRemote"]:
        """As `DeviceRemote.attend`."""
        branch = self._slots(queries.q, local_start, config, implementation)
        if self.levels:
            marks = self._landmarks(queries.q, first_position, config, implementation)
            branch = merge_softmax(marks, branch)
        return branch, None, self

    def _slots(self, q, local_start, config: AttentionConfig, implementation) -> Branch:
        items = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), self.slots, self.staged)
        bias = jnp.where(items.mass > -jnp.inf, items.bias, -jnp.inf)
        end = self.slots.mass.shape[1] + local_start // config.block_size - self.pooled[0]
        return range_attention(
            q, items.k.astype(q.dtype), items.v.astype(q.dtype), jnp.zeros_like(end), end, bias,
            implementation=implementation,
        )  # fmt: skip

    def _landmarks(self, q, first_position, config: AttentionConfig, implementation) -> Branch:
        """As `landmark_branch`, from the nodes that are kept."""
        leader, group = landmark_groups(first_position, q.shape[1], config.segment_length, config)
        segments = remote_end(leader, 0, config) // config.segment_length
        spans = visible_nodes(segments, len(self.levels), config.nodes_per_level)
        slots = jnp.arange(config.nodes_per_level + 1, dtype=jnp.int32)
        found = []
        for level, (first, count) in zip(self.levels, spans, strict=True):
            place = (first[:, None] + slots) % level.salience.shape[2]
            salience, k, v = (x[:, :, place] for x in level)  # [B, Hkv, groups, r + 1, m, ...]
            salience = jnp.where((slots < count[:, None])[..., None], salience, -jnp.inf)
            found.append([x.reshape(*x.shape[:3], -1, *x.shape[5:]) for x in (salience, k, v)])
        listed = [jnp.concatenate(x, axis=3) for x in zip(*found, strict=True)]
        length = listed[0].shape[3]
        bias, k, v = (jnp.moveaxis(x.reshape(*x.shape[:2], -1, *x.shape[4:]), 1, 2) for x in listed)
        begin = group * length
        return range_attention(q, k, v, begin, begin + length, bias, implementation=implementation)


def _slice_padded(x: jax.Array, begin: jax.Array, length: int) -> jax.Array:
    """x [B, T, ...] from `begin` in [0, T] on; behind the end zeros, which nobody uses."""
    padded = jnp.pad(x, [(0, 0), (0, length)] + [(0, 0)] * (x.ndim - 2))
    return jax.lax.dynamic_slice_in_dim(padded, begin, length, axis=1)
