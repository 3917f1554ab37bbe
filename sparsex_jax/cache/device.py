"""The remote past of a sparse layer with all keys and values in the device's memory.

Every array is append-only: what lies beyond the length is never read, and is overwritten by the
tokens that follow. So one copy serves any number of answers to the same context.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsex_jax.branches import Ranges, dynamic_branch, landmark_ranges
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.fusion import Branch
from sparsex_jax.landmarks import Nodes, leaf_nodes, merge_pairs, num_levels
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.scoring import BlockIndex, Blocks, node_features

# Kernels take keys in multiples of 8 and features in multiples of 8 blocks: padding the whole
# cache for them would be a copy of it.
_WHOLE_BLOCKS = 8


class DeviceRemote(NamedTuple):
    """The past of a sparse layer; N is the capacity, rounded up.

    Attributes:
      k: [B, N, Hkv, D], with RoPE exactly if the fusion is "softmax".
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      blocks: N / S of them, of which complete ones are used.
      nodes: features of nodes of blocks, [B, N / S / search_node_size, Hkv, d_s]; None where all
        blocks are searched.
      pyramid: aligned nodes of landmarks, level by level.
    """

    k: jax.Array
    v: jax.Array
    salience: jax.Array
    blocks: Blocks
    nodes: jax.Array | None
    pyramid: tuple[Nodes, ...]

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, capacity: int, chunk: int
    ) -> "DeviceRemote":
        """For up to `capacity` tokens a sequence, which come in chunks of up to `chunk`."""
        attention, heads, dtype = config.attention, config.num_kv_heads, jnp.dtype(config.dtype)
        tokens = room(capacity, chunk, attention)
        keys = batch_size, tokens, heads, config.head_dim
        blocks, nodes = empty_blocks(config, batch_size, tokens)
        return cls(
            k=jnp.zeros(keys, dtype),
            v=jnp.zeros(keys, dtype),
            salience=jnp.zeros(keys[:3], jnp.float32),
            blocks=blocks,
            nodes=nodes,
            pyramid=empty_pyramid(attention, batch_size, heads, capacity, chunk),
        )

    @property
    def block_index(self) -> BlockIndex:
        """What queries find blocks by."""
        return BlockIndex(self.blocks.features, self.nodes)

    def split(self) -> tuple[tuple, "DeviceRemote"]:
        """What an answer must not change, and what it only writes behind the context."""
        return (), self

    @staticmethod
    def join(kept: tuple, appended: "DeviceRemote") -> "DeviceRemote":
        """The inverse of `split`."""
        return appended

    def append(
        self,
        keys: KeySide,
        blocks: Blocks,
        length: jax.Array,
        valid: jax.Array,
        config: AttentionConfig,
        settle: bool,
    ) -> "DeviceRemote":
        """Remembers new tokens.

        Args:
          keys: of the tokens [B, C, ...], as they are stored.
          blocks: that they lie in.
          length: tokens before, int32 scalar.
          valid: of the new tokens, how many count, int32 scalar.
          config: of the attention.
          settle: whether landmarks are brought up to date; if not, `settle` does so later.
        """
        blocks, nodes = write_blocks(
            self.blocks, self.nodes, blocks, length // config.block_size, config
        )
        after = DeviceRemote(
            k=write(self.k, keys.k, length),
            v=write(self.v, keys.v, length),
            salience=write(self.salience, keys.salience, length),
            blocks=blocks,
            nodes=nodes,
            pyramid=self.pyramid,
        )
        if not settle:
            return after
        return after.settle(length + keys.k.shape[1], keys.k.shape[1], config)

    def settle(self, length: jax.Array, tokens: int, config: AttentionConfig) -> "DeviceRemote":
        """Brings the landmarks up to date.

        A query sees those of nodes that lie before its window, so up to a window of tokens may be
        remembered before.

        Args:
          length: tokens remembered, int32 scalar.
          tokens: how many of the last ones may be new.
          config: of the attention.
        """
        first = jnp.maximum(length - tokens, 0)
        leaves = touched_leaves(self.salience, first, tokens, config)
        return self._replace(pyramid=extend_pyramid(self.pyramid, leaves, first, tokens, config))

    def landmarks(
        self, first_position: jax.Array, tokens: int, config: AttentionConfig
    ) -> Ranges | None:
        """The landmarks of the remote past of neighbouring new tokens, None where there are none.

        Args:
          first_position: of the tokens, int32 scalar.
          tokens: how many.
          config: of the attention.
        """
        if not self.pyramid:
            return None
        return landmark_ranges(
            self.k, self.v, self.salience, list(self.pyramid), first_position, tokens, None, config
        )

    def attend(
        self,
        queries: QuerySide,
        first_position: jax.Array,
        local_start: jax.Array,
        config: AttentionConfig,
        implementation: str | None = None,
    ) -> tuple[Branch | None, Branch | None, "DeviceRemote"]:
        """Attention to what else the tier has than `landmarks`, and to selected blocks.

        Args:
          queries: of neighbouring tokens; q with RoPE exactly if the fusion is "softmax".
          first_position: of the first of them, int32 scalar.
          local_start: a(t), int32 [T].
          config: of the attention.
          implementation: of the primitives.

        Returns:
          (other, None where there is nothing; dynamic, None where the config has none; the cache,
          which a tier may change as it reads).
        """
        dynamic = None
        if config.top_k:
            dynamic = dynamic_branch(
                queries.q, self.k, self.v, queries.features, self.block_index, local_start, None,
                recency=queries.recency, config=config, implementation=implementation,
            )  # fmt: skip
        return None, dynamic, self


def room(capacity: int, chunk: int, config: AttentionConfig) -> int:
    """Tokens that the arrays of a cache hold: whole nodes, and a chunk beyond the capacity."""
    unit = config.block_size * (config.search_node_size or _WHOLE_BLOCKS)
    spare = 2 * max(config.segment_length, config.block_size * config.search_node_size)
    return -(-(capacity + chunk + spare) // unit) * unit


def write(old: jax.Array, new: jax.Array, place: jax.Array, axis: int = 1) -> jax.Array:
    """`old` with `new` from `place` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place, axis)


def touched(tokens: int, unit: int) -> int:
    """Most units of `unit` tokens that `tokens` tokens in a row can lie in."""
    return (tokens + unit - 2) // unit + 1


def empty_blocks(
    config: ModelConfig, batch_size: int, tokens: int
) -> tuple[Blocks, jax.Array | None]:
    """Blocks of so many tokens, as `room` counts them, and their nodes."""
    attention, node = config.attention, config.attention.search_node_size
    shape = batch_size, tokens // attention.block_size, config.num_kv_heads
    features = jnp.zeros((*shape, attention.score_dim), config.dtype)
    mass = jnp.zeros(shape, jnp.float32) if node else None
    return Blocks(features, mass), features[:, : shape[1] // node] if node else None


def write_blocks(
    blocks: Blocks,
    nodes: jax.Array | None,
    new: Blocks,
    first: jax.Array,
    config: AttentionConfig,
) -> tuple[Blocks, jax.Array | None]:
    """Writes new blocks from the `first` on, and the nodes that they lie in.

    Nodes with blocks that are not complete are never used, and made again later.
    """
    blocks = jax.tree.map(lambda old, x: write(old, x, first), blocks, new)
    if nodes is None:
        return blocks, None
    size = config.search_node_size
    node, count = first // size, touched(new.features.shape[1], size)
    around = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, node * size, count * size, axis=1), blocks
    )
    return blocks, write(nodes, node_features(around, config), node)


def empty_pyramid(
    config: AttentionConfig, batch_size: int, heads: int, capacity: int, chunk: int
) -> tuple[Nodes, ...]:
    """Nodes of all levels that `capacity` tokens need."""
    if config.landmarks == "off":
        return ()
    levels = []
    for level in range(num_levels(capacity // config.segment_length, config)):
        width = config.segment_length << level
        # Slices of whole pairs are read and written; room behind the end keeps them in place.
        nodes = capacity // width + touched(chunk, width) + 6
        shape = (batch_size, heads, nodes, config.landmarks_per_segment)
        levels.append(Nodes(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)))
    return tuple(levels)


def touched_leaves(
    salience: jax.Array, length: jax.Array, tokens: int, config: AttentionConfig
) -> Nodes:
    """Nodes of level 0 that `tokens` new tokens lie in, from salience f32 [B, N, Hkv] of all."""
    width = config.segment_length
    begin, size = length // width * width, touched(tokens, width) * width
    part = jax.lax.dynamic_slice_in_dim(salience, begin, size, axis=1)
    return leaf_nodes(part, begin, width, config.landmarks_per_segment)


def extend_pyramid(
    pyramid: tuple[Nodes, ...],
    leaves: Nodes,
    length: jax.Array,
    tokens: int,
    config: AttentionConfig,
) -> tuple[Nodes, ...]:
    """Rebuilds the nodes that new tokens lie in; those not yet complete are never visible."""
    levels: list[Nodes] = []
    for level, nodes in enumerate(pyramid):
        width = config.segment_length << level
        first, count = length // width, touched(tokens, width)
        new = leaves
        if level:
            children = (
                jax.lax.dynamic_slice_in_dim(x, 2 * first, 2 * count, axis=2) for x in levels[-1]
            )
            new = merge_pairs(Nodes(*children))
        levels.append(Nodes(*(write(*x, first, axis=2) for x in zip(nodes, new, strict=True))))
    return tuple(levels)
