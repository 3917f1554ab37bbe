"""What one layer remembers of the past, and attention of new tokens to it.

Every array has a fixed capacity; `length`, the number of tokens so far, is kept by the caller.
A chunk of C new tokens may hold fewer valid ones: what the others write lies beyond the length,
is never read, and is overwritten by the tokens that follow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.range_attention import range_attention
from sparsex_jax.attention import dynamic_branch, landmark_branch
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.fusion import fuse
from sparsex_jax.landmarks import Nodes, leaf_nodes, merge_pairs, num_levels
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.modules.transformer import Block
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.scoring import block_features
from sparsex_jax.spans import remote_end


class RemoteCache(NamedTuple):
    """The past of a sparse layer; N is the capacity.

    Attributes:
      k: [B, N, Hkv, D], with RoPE exactly if the fusion is "softmax".
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      pool_inputs: of the last S tokens, [B, S, Hkv, d_s].
      pool_logits: of the last S tokens, f32 [B, S, Hkv].
      features: of complete blocks, [B, N / S, Hkv, d_s].
      pyramid: aligned nodes, level by level.
    """

    k: jax.Array
    v: jax.Array
    salience: jax.Array
    pool_inputs: jax.Array
    pool_logits: jax.Array
    features: jax.Array
    pyramid: tuple[Nodes, ...]


class LayerCache(NamedTuple):
    """The past of a layer.

    Attributes:
      history: the last inputs of the convolution, [B, conv_width - 1, C].
      window_k: keys of the last W + S tokens, with RoPE, [B, W + S, Hkv, D].
      window_v: their values, [B, W + S, Hkv, D].
      remote: in a sparse layer.
    """

    history: jax.Array
    window_k: jax.Array
    window_v: jax.Array
    remote: RemoteCache | None


def empty_layer(
    config: ModelConfig, *, sparse: bool, batch_size: int, capacity: int, chunk: int
) -> LayerCache:
    """A cache without tokens, for up to `capacity` of them in chunks of up to `chunk`."""
    attention, dtype = config.attention, jnp.dtype(config.dtype)
    heads, dim = config.num_kv_heads, config.head_dim

    def zeros(*shape, dtype=dtype):
        return jnp.zeros((batch_size, *shape), dtype)

    window = attention.window + attention.block_size
    remote = None
    if sparse:
        tokens = capacity + chunk + 2 * attention.segment_length
        remote = RemoteCache(
            k=zeros(tokens, heads, dim),
            v=zeros(tokens, heads, dim),
            salience=zeros(tokens, heads, dtype=jnp.float32),
            pool_inputs=zeros(attention.block_size, heads, attention.score_dim),
            pool_logits=zeros(attention.block_size, heads, dtype=jnp.float32),
            features=zeros(tokens // attention.block_size + 2, heads, attention.score_dim),
            pyramid=tuple(_empty_pyramid(attention, batch_size, heads, capacity, chunk)),
        )
    history = zeros(max(config.conv_width - 1, 0), config.model_dim)
    return LayerCache(history, zeros(window, heads, dim), zeros(window, heads, dim), remote)


def extend_layer(
    block: Block,
    cache: LayerCache,
    x: jax.Array,
    length: jax.Array,
    valid: jax.Array,
    *,
    last_only: bool,
) -> tuple[jax.Array, LayerCache]:
    """Applies a block to new tokens and remembers them.

    Args:
      block: of the Transformer.
      cache: of this layer.
      x: [B, C, channels].
      length: tokens so far, int32 scalar.
      valid: of the new tokens, how many count, int32 scalar.
      last_only: only the last valid token attends (the others are remembered all the same):
        enough in the last layer of a prefill.

    Returns:
      ([B, 1 or C, channels], the new cache).
    """
    layer = block.attention
    config = layer.attention_config()
    normed = block.attention_norm(x)
    mixed = layer.mix(normed, cache.history)
    keys = layer.key_side(normed, mixed)
    positions = length + jnp.arange(x.shape[1], dtype=jnp.int32)
    turned_k = apply_rotary(keys.k, positions, config.rope_base)
    remote = cache.remote
    if remote is not None:
        stored = keys._replace(k=turned_k) if config.fusion == "softmax" else keys
        remote = _append_remote(remote, stored, length, valid, config)
    after = LayerCache(
        _newest(cache.history, normed, valid),
        _newest(cache.window_k, turned_k, valid),
        _newest(cache.window_v, keys.v, valid),
        remote,
    )
    if last_only:
        positions = (length + valid - 1)[None]
        x, normed, mixed = (
            jax.lax.dynamic_slice_in_dim(y, valid - 1, 1, axis=1) for y in (x, normed, mixed)
        )
    near = (
        jnp.concatenate((cache.window_k, turned_k), axis=1),
        jnp.concatenate((cache.window_v, keys.v), axis=1),
    )
    first = length - cache.window_k.shape[1]
    attended = _attend(layer.query_side(normed, mixed), positions, near, first, remote, config)
    return block.feed_forward(x + layer.project_out(attended)), after


def _attend(
    queries: QuerySide,
    positions: jax.Array,
    near: tuple[jax.Array, jax.Array],
    first: jax.Array,
    remote: RemoteCache | None,
    config: AttentionConfig,
) -> jax.Array:
    """Attention of queries at `positions` to a window of keys and values, and to the remote past.

    Key n of the window, which has RoPE, stands at position `first` + n.
    """
    turned_q = apply_rotary(queries.q, positions, config.rope_base)
    local_start = remote_end(positions, 0, config)
    local = range_attention(turned_q, *near, local_start - first, positions + 1 - first)
    landmarks = dynamic = None
    if remote is not None and config.landmarks != "off":
        landmarks = landmark_branch(
            queries.q, remote.k, remote.v, remote.salience, list(remote.pyramid), positions[0],
            None, config=config,
        )  # fmt: skip
    if remote is not None and config.top_k:
        dynamic = dynamic_branch(
            turned_q if config.fusion == "softmax" else queries.q, remote.k, remote.v,
            queries.features, remote.features, local_start, None, config=config,
        )  # fmt: skip
    return fuse(local, landmarks, dynamic, queries.landmark_gate, queries.dynamic_gate, config)


def _newest(old: jax.Array, new: jax.Array, valid: jax.Array) -> jax.Array:
    """The newest tokens of `old` and the valid ones of `new`, as many as `old` holds."""
    both = jnp.concatenate((old, new), axis=1)
    return jax.lax.dynamic_slice_in_dim(both, valid, old.shape[1], axis=1)


def _touched(tokens: int, unit: int) -> int:
    """Most units of `unit` tokens that `tokens` tokens in a row can lie in."""
    return (tokens + unit - 2) // unit + 1


def _empty_pyramid(config: AttentionConfig, batch_size, heads, capacity, chunk):
    if config.landmarks == "off":
        return
    for level in range(num_levels(capacity // config.segment_length, config)):
        width = config.segment_length << level
        # Slices of whole pairs are read and written; room behind the end keeps them in place.
        nodes = capacity // width + _touched(chunk, width) + 6
        shape = (batch_size, heads, nodes, config.landmarks_per_segment)
        yield Nodes(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))


def _append_remote(
    cache: RemoteCache, keys: KeySide, length: jax.Array, valid: jax.Array, config: AttentionConfig
) -> RemoteCache:
    def write(old, new, place, axis=1):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place, axis)

    size, tokens = config.block_size, keys.k.shape[1]
    blocks = _touched(tokens, size)
    first = length // size
    recent = []
    for old, new in (
        (cache.pool_inputs, keys.block_inputs),
        (cache.pool_logits, keys.block_logits),
    ):
        both = jnp.concatenate((old, new), axis=1)
        padded = jnp.pad(both, ((0, 0), (0, 2 * size)) + ((0, 0),) * (both.ndim - 2))
        begin = first * size - (length - size)
        recent.append(jax.lax.dynamic_slice_in_dim(padded, begin, blocks * size, axis=1))
    salience = write(cache.salience, keys.salience, length)
    return RemoteCache(
        k=write(cache.k, keys.k, length),
        v=write(cache.v, keys.v, length),
        salience=salience,
        pool_inputs=_newest(cache.pool_inputs, keys.block_inputs, valid),
        pool_logits=_newest(cache.pool_logits, keys.block_logits, valid),
        features=write(cache.features, block_features(*recent, size), first),
        pyramid=_extend_pyramid(cache.pyramid, salience, length, tokens, config),
    )


def _extend_pyramid(
    pyramid: tuple[Nodes, ...],
    salience: jax.Array,
    length: jax.Array,
    tokens: int,
    config: AttentionConfig,
) -> tuple[Nodes, ...]:
    """Rebuilds the nodes that new tokens lie in; those not yet complete are never visible."""
    levels = []
    for level, nodes in enumerate(pyramid):
        width = config.segment_length << level
        first, count = length // width, _touched(tokens, width)
        if level == 0:
            begin, size = first * width, count * width
            part = jax.lax.dynamic_slice_in_dim(salience, begin, size, axis=1)
            new = leaf_nodes(part, begin, width, config.landmarks_per_segment)
        else:
            children = (
                jax.lax.dynamic_slice_in_dim(x, 2 * first, 2 * count, axis=2) for x in levels[-1]
            )
            new = merge_pairs(Nodes(*children))
        levels.append(
            Nodes(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, update, first, axis=2)
                    for old, update in zip(nodes, new, strict=True)
                )
            )
        )
    return tuple(levels)
