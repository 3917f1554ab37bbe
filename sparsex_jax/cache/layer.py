"""What one layer remembers of the past, and attention of new tokens to it.

`length`, the number of tokens so far, is kept by the caller. A chunk of C new tokens may hold fewer
valid ones: what the others write lies beyond the length, is never read, and is overwritten by the
tokens that follow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.range_attention import range_attention
from sparsex_jax.baselines.pattern import Pattern, make_pattern
from sparsex_jax.branches import Ranges
from sparsex_jax.cache.baselines import Past, empty_past
from sparsex_jax.cache.device import touched
from sparsex_jax.cache.near import Near, reach
from sparsex_jax.cache.tiers import Remote, Tier, empty_remote
from sparsex_jax.config import BASELINES, AttentionConfig, ModelConfig
from sparsex_jax.fusion import Branch, fuse
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.modules.ngrams import NO_TOKEN
from sparsex_jax.modules.transformer import Block
from sparsex_jax.rotary import rotate_from
from sparsex_jax.scoring import Blocks, pool_blocks
from sparsex_jax.spans import remote_end
from sparsex_jax.token_chunks import map_chunks

CHUNK = 2**15  # tokens that attend at a time: temporaries are theirs


class Recent(NamedTuple):
    """What a layer keeps of its last tokens, of any number of them the same amount.

    Attributes:
      history: the last inputs of the convolution, [B, conv_reach, C].
      tokens: the last ones, int32 [B, the largest of the n-grams]; None in a layer without n-grams.
      window_k: keys of the last W + S tokens, and a few more, with RoPE, [B, `reach`, Hkv, D]; None
        while they are in `LayerCache.near`.
      window_v: their values, likewise.
      pool_inputs: of the last S tokens, [B, S, Hkv, d_s]; None in a local layer.
      pool_logits: of the last S tokens, f32 [B, S, Hkv]; likewise.
    """

    history: jax.Array
    tokens: jax.Array | None
    window_k: jax.Array | None
    window_v: jax.Array | None
    pool_inputs: jax.Array | None
    pool_logits: jax.Array | None


class LayerCache(NamedTuple):
    """The past of a layer.

    Attributes:
      recent: its last tokens; new arrays with each token.
      remote: in a sparse layer, all tokens; see `DeviceRemote`, `HostRemote` and
        `CompressedRemote`. In a baseline's, what it attends to before its window.
      near: while a block of tokens is generated, what each of them attends to (`open_block`).
    """

    recent: Recent
    remote: Remote | Past | None
    near: Near | None = None


def empty_layer(
    config: ModelConfig, number: int, *, batch_size: int, capacity: int, chunk: int, tier: Tier
) -> LayerCache:
    """A layer's cache without tokens, for up to `capacity` of them in chunks of up to `chunk`."""
    kind = config.layers[number]
    sparse, attention = kind == "s", config.attention
    if kind in BASELINES:
        attention = make_pattern(config, number)
    heads, dtype = config.num_kv_heads, jnp.dtype(config.dtype)

    def zeros(*shape, dtype=dtype):
        return jnp.zeros((batch_size, *shape), dtype)

    size = attention.block_size
    window = reach(attention), heads, config.head_dim
    ngrams = config.ngrams_of(kind)
    recent = Recent(
        history=zeros(config.conv_reach, config.model_dim),
        tokens=jnp.full((batch_size, max(ngrams)), NO_TOKEN, jnp.int32) if ngrams else None,
        window_k=zeros(*window),
        window_v=zeros(*window),
        pool_inputs=zeros(size, heads, attention.score_dim) if sparse else None,
        pool_logits=zeros(size, heads, dtype=jnp.float32) if sparse else None,
    )
    if isinstance(attention, Pattern):
        return LayerCache(recent, empty_past(attention, config, batch_size, capacity, chunk))
    if not sparse:
        return LayerCache(recent, None)
    return LayerCache(recent, empty_remote(tier, config, batch_size, capacity, chunk))


def empty_layers(
    config: ModelConfig, capacity: int, batch_size: int, chunk: int, tier: Tier = "device"
) -> tuple[LayerCache, ...]:
    """Caches of all layers for up to `capacity` tokens a sequence, in chunks of up to `chunk`."""
    return tuple(
        empty_layer(
            config, number, batch_size=batch_size, capacity=capacity, chunk=chunk, tier=tier
        )
        for number in range(len(config.layers))
    )  # fmt: skip


def extend_layer(
    block: Block,
    cache: LayerCache,
    x: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    valid: jax.Array,
    *,
    attending: int,
) -> tuple[jax.Array | None, LayerCache]:
    """Applies a block to new tokens and remembers them.

    Args:
      block: of the Transformer.
      cache: of this layer; if a block is open, C = 1, and landmarks wait until it is closed.
      x: [B, C, channels].
      tokens: int32 [B, C].
      length: tokens so far, int32 scalar.
      valid: of the new tokens, how many count, int32 scalar.
      attending: how many of them do, the last valid ones: those whose output somebody reads. All
        are remembered.

    Returns:
      ([B, attending, channels], from `first_attending` on, or None if none attends; the new cache).
    """
    layer, recent, remote = block.attention, cache.recent, cache.remote
    config = layer.attention_config()
    normed = block.attention_norm(x)
    mixed = layer.mix(normed, recent.history)
    hashes = layer.hash(tokens, recent.tokens)
    keys = layer.key_side(normed, mixed, hashes)
    turned_k = rotate_from(keys.k, length, config.rope_base)
    if remote is not None:
        stored = keys._replace(k=turned_k) if config.turns_remote else keys
        blocks = None if keys.block_inputs is None else _blocks(recent, keys, length, config)
        settle = cache.near is None
        remote = remote.append(stored, blocks, length, valid, config, settle)
    window = recent.window_k, recent.window_v
    recent = Recent(
        _newest(recent.history, normed, valid),
        _newest(recent.tokens, tokens, valid),
        _newest(recent.window_k, turned_k, valid),
        _newest(recent.window_v, keys.v, valid),
        _newest(recent.pool_inputs, keys.block_inputs, valid),
        _newest(recent.pool_logits, keys.block_logits, valid),
    )
    if cache.near is not None:
        near = cache.near.write(turned_k, keys.v, length, config)
        queries = layer.query_side(normed, mixed, hashes)
        attended, remote = attend_one(queries, length, near, remote, config)
        out = block.feed_forward(x + layer.project_out(attended))
        return out, LayerCache(recent, remote, near)
    if not attending:
        return None, LayerCache(recent, remote)
    assert window[0] is not None and window[1] is not None
    near_keys = _joined(window[0], turned_k), _joined(window[1], keys.v)
    first = first_attending(attending, x.shape[1], valid)
    if attending < x.shape[1]:

        def part(y: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(y, first, attending, axis=1)

        x, normed, mixed, hashes = jax.tree.map(part, (x, normed, mixed, hashes))
    queries = layer.query_side(normed, mixed, hashes)
    attended, remote = attend(queries, first, length, near_keys, remote, config)
    return block.feed_forward(x + layer.project_out(attended)), LayerCache(recent, remote)


def first_attending(attending: int, tokens: int, valid: jax.Array) -> jax.Array:
    """Number of the first of the new tokens that attend, int32; they end with the last valid one.

    Where fewer than `attending` are valid, others beyond them attend, too.
    """
    return jnp.clip(valid - attending, 0, tokens - attending)


def inputs_of_local(attending: int, config: ModelConfig) -> int:
    """How many of the last tokens a local layer needs, of which `attending` attend.

    Their windows lie among these tokens, whatever the layer kept of those before, and so do the
    windows of tokens to come; the first few only complete the convolution.
    """
    return attending + reach(config.attention) + config.conv_reach


def attend(
    queries: QuerySide,
    first: jax.Array,
    length: jax.Array,
    near: tuple[jax.Array, jax.Array],
    remote: Remote | Past | None,
    config: AttentionConfig,
    implementation: str | None = None,
) -> tuple[jax.Array, Remote | Past | None]:
    """Attention of new tokens to their window and to the remote past.

    Args:
      queries: of T neighbouring ones of the new tokens.
      first: number of the first of them among the new tokens, int32 scalar.
      length: tokens before the new ones, int32 scalar.
      near: keys, with RoPE, and values of the `reach` tokens before and of the C new ones,
        [B, `reach` + C, Hkv, D].
      remote: of all tokens, the new ones included; None in a local layer.
      config: of the attention.
      implementation: of the primitives.

    Returns:
      ([B, T, Hq, D], the remote past, which a tier may change as it reads).
    """

    def of_part(begin, part: QuerySide, _):
        begin = first + begin
        position = length + begin
        tokens = part.q.shape[1]
        positions = position + jnp.arange(tokens, dtype=jnp.int32)
        local_start = remote_end(positions, 0, config)
        turned_q = rotate_from(part.q, position, config.rope_base)
        window = _window(near, begin, length, local_start, config)
        local = range_attention(turned_q, *window[:4], implementation=implementation)
        marks = None if remote is None else remote.landmarks(position, tokens, config)
        landmarks = None
        if marks is not None:
            landmarks = range_attention(part.q, *marks, implementation=implementation)
        return _attend_remote(
            part, turned_q, local, landmarks, position, local_start, remote, config, implementation
        )

    if queries.q.shape[1] == 1:
        return of_part(0, queries, ())
    out = map_chunks(lambda *x: of_part(*x)[0], queries, (), size=CHUNK, saved=())
    return out, remote


def attend_one(
    queries: QuerySide,
    position: jax.Array,
    near: Near,
    remote: Remote | Past | None,
    config: AttentionConfig,
    implementation: str | None = None,
) -> tuple[jax.Array, Remote | Past | None]:
    """Attention of a token of an open block, which is in `near` already; otherwise as `attend`."""
    local_start = remote_end(position, 0, config)
    turned_q = rotate_from(queries.q, position, config.rope_base)
    local, landmarks = near.attend(
        turned_q, queries.q, position, local_start, config, implementation
    )
    return _attend_remote(
        queries, turned_q, local, landmarks, position, local_start[None], remote, config,
        implementation,
    )  # fmt: skip


def _attend_remote(
    queries, turned_q, local: Branch, landmarks: Branch | None, position, local_start, remote,
    config: AttentionConfig, implementation,
):  # fmt: skip
    """The branches together with those that the remote past has, and the latter."""
    dynamic = None
    if remote is not None:
        far = queries._replace(q=turned_q) if config.turns_remote else queries
        other, dynamic, remote = remote.attend(far, position, local_start, config, implementation)
        landmarks = other if landmarks is None else landmarks
    gates = queries.landmark_gate, queries.dynamic_gate
    return fuse(local, landmarks, dynamic, *gates, config), remote


def open_block(cache: LayerCache, position: jax.Array, config: AttentionConfig) -> LayerCache:
    """Makes ready for tokens one by one, from a position on, as many as `left_in_block`.

    Args:
      cache: of a layer.
      position: of the first of them, int32 scalar.
      config: of the layer's attention.
    """
    recent, remote = cache.recent, cache.remote
    marks = None if remote is None else remote.landmarks(position, 1, config)
    near = Near.open((recent.window_k, recent.window_v), marks, position, config)
    return LayerCache(recent._replace(window_k=None, window_v=None), remote, near)


def close_block(cache: LayerCache, length: jax.Array, config: AttentionConfig) -> LayerCache:
    """Takes in the tokens of an open block; arguments as there, `length` being all tokens."""
    assert cache.near is not None
    window_k, window_v = cache.near.window(length, config)
    remote = cache.remote
    if remote is not None:
        remote = remote.settle(length, config.block_size, config)
    return LayerCache(cache.recent._replace(window_k=window_k, window_v=window_v), remote)


def _window(near, begin, length, local_start, config: AttentionConfig) -> Ranges:
    """The window of queries that are the new tokens `begin` and on."""
    tokens, kept = len(local_start), reach(config)
    end = length + begin + 1 + jnp.arange(tokens, dtype=jnp.int32)
    begin = jnp.clip(begin, 0, near[0].shape[1] - kept - tokens)
    k, v = (jax.lax.dynamic_slice_in_dim(x, begin, tokens + kept, axis=1) for x in near)
    first_key = length - kept + begin
    bias = jnp.zeros(k.shape[:3], jnp.float32)
    return Ranges(k, v, local_start - first_key, end - first_key, bias)


def _joined(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate((old, new), axis=1)


def _newest(old: jax.Array | None, new: jax.Array | None, valid: jax.Array) -> jax.Array | None:
    """The newest tokens of `old` and the valid ones of `new`, as many as `old` holds."""
    if old is None or new is None:
        return None
    return jax.lax.dynamic_slice_in_dim(_joined(old, new), valid, old.shape[1], axis=1)


def _blocks(recent: Recent, keys: KeySide, length: jax.Array, config: AttentionConfig) -> Blocks:
    """The blocks that new tokens lie in.

    Those of blocks that are not yet complete are never used, and made again later.
    """
    size, tokens = config.block_size, keys.k.shape[1]
    blocks = touched(tokens, size)
    begin = length // size * size - (length - size)
    parts = []
    for old, new in (
        (recent.pool_inputs, keys.block_inputs),
        (recent.pool_logits, keys.block_logits),
    ):
        both = _joined(old, new)
        padded = jnp.pad(both, ((0, 0), (0, 2 * size)) + ((0, 0),) * (both.ndim - 2))
        parts.append(jax.lax.dynamic_slice_in_dim(padded, begin, blocks * size, axis=1))
    return pool_blocks(*parts, config)
