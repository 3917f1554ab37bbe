"""What one token attends to, layer by layer: slow and exact, for finding out why a model errs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsex_jax.attention import select_remote
from sparsex_jax.baselines.pattern import Pattern, random_blocks
from sparsex_jax.cache.baselines import AllTokens, FirstTokens
from sparsex_jax.cache.device import DeviceRemote
from sparsex_jax.cache.layer import LayerCache, extend_layer
from sparsex_jax.config import AttentionConfig
from sparsex_jax.modules.attention import QuerySide
from sparsex_jax.modules.transformer import Transformer
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import remote_end


class Attended(NamedTuple):
    """What a token attends to, over all layers and heads.

    Attributes:
      selected: whether some head can attend to the place asked for: it is in the window, in a
        selected block, or in what the pattern of a baseline shows; bool scalar.
      weight: the largest share of a head's softmax that the span asked for gets, f32 scalar.
    """

    selected: jax.Array
    weight: jax.Array


class _Keys(NamedTuple):
    """Keys that a query may attend to in one softmax.

    Attributes:
      k: [M, Hkv, D], or [M, 1, D] shared by the heads; as the logits need them.
      place: positions, int32 [M, Hkv] or [M, 1]; -1 where there is none.
      bias: f32, likewise.
    """

    k: jax.Array
    place: jax.Array
    bias: jax.Array


@nnx.jit
def explain(
    model: Transformer,
    layers: tuple[LayerCache, ...],
    token: jax.Array,
    place: jax.Array,
    span: tuple[jax.Array, jax.Array],
    length: jax.Array,
) -> Attended:
    """Reads one more token and tells what of the past it attends to.

    Landmarks do not count. The dynamic branch and the window each have a softmax of their own with
    fusion="sum"; else, and in baselines, it is one.

    Args:
      model: whose caches these are.
      layers: of one sequence, in the tier "device"; they are not changed.
      token: int32 scalar.
      place: position of a token before it, int32 scalar.
      span: begin and end of the tokens around that one.
      length: tokens before, int32 scalar.
    """
    x: jax.Array | None = model.embed(token[None, None])
    found: list[Attended] = []
    for block, layer in zip(model.blocks, layers, strict=True):
        attention = block.attention
        normed = block.attention_norm(x)
        queries = attention.query_side(normed, attention.mix(normed, layer.recent.history))
        x, after = extend_layer(block, layer, x, length, jnp.int32(1), attends="all")
        config = attention.attention_config()
        found += [
            _measure(q, keys, place, span)
            for q, keys in _softmaxes(queries, after, length, config)
        ]  # fmt: skip
    return Attended(
        jnp.stack([each.selected for each in found]).any(),
        jnp.stack([each.weight for each in found]).max(),
    )


def _softmaxes(
    queries: QuerySide, cache: LayerCache, position: jax.Array, config: AttentionConfig
) -> list[tuple[jax.Array, _Keys]]:
    """The queries [Hq, D] and keys of each softmax of a layer, the landmarks' aside."""
    local_start = remote_end(position, 0, config)
    turned = apply_rotary(queries.q, position[None], config.rope_base)[0, 0]
    k = cache.recent.window_k[0]
    place = position + 1 - len(k) + jnp.arange(len(k), dtype=jnp.int32)
    window = _of_places(k, jnp.where(place >= local_start, place, -1))
    remote = _remote_keys(queries, cache.remote, position, local_start, config)
    if remote is None:
        return [(turned, window)]
    if config.fusion == "sum":
        return [(turned, window), (queries.q[0, 0], remote)]
    heads = window.k.shape[1]
    wide = (jnp.broadcast_to(x, (len(x), heads, *x.shape[2:])) for x in window), remote
    return [(turned, _Keys(*(jnp.concatenate(pair) for pair in zip(*wide, strict=True))))]


def _of_places(k: jax.Array, place: jax.Array) -> _Keys:
    """Keys [M, Hkv, D] at places [M], without bias."""
    shared = jnp.broadcast_to(place[:, None], k.shape[:2])
    return _Keys(k, shared, jnp.zeros(shared.shape, jnp.float32))


def _remote_keys(
    queries: QuerySide, remote, position: jax.Array, local_start: jax.Array, config: AttentionConfig
) -> _Keys | None:
    """What a layer's query can attend to before its window."""
    if isinstance(remote, DeviceRemote):
        if not config.top_k:
            return None
        index, bias = select_remote(
            queries.features, remote.features, local_start[None], None, config
        )
        return _of_blocks(remote.k[0], index[0, 0], bias[0, 0], config.block_size)
    if isinstance(remote, FirstTokens):
        place = jnp.arange(remote.k.shape[1], dtype=jnp.int32)
        return _of_places(remote.k[0], jnp.where(place < local_start, place, -1))
    if isinstance(remote, AllTokens):
        assert isinstance(config, Pattern)
        if config.kind == "dense":
            place = jnp.arange(remote.k.shape[1], dtype=jnp.int32)
            return _of_places(remote.k[0], jnp.where(place < local_start, place, -1))
        size, heads = config.block_size, remote.k.shape[2]
        first = jnp.arange(config.global_tokens // size, dtype=jnp.int32)
        first = jnp.where(first < local_start // size, first, -1)
        index = jnp.concatenate((first, random_blocks(position[None], 0, config)[0]))
        index = jnp.broadcast_to(index, (heads, len(index)))
        return _of_blocks(remote.k[0], index, jnp.zeros(index.shape, jnp.float32), size)
    return None


def _of_blocks(k: jax.Array, index: jax.Array, bias: jax.Array, size: int) -> _Keys:
    """Keys of blocks, numbers and biases [Hkv, K], of k [N, Hkv, D]."""
    place = index[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)
    place = jnp.where(index[:, :, None] < 0, -1, place).reshape(len(index), -1).T
    chosen = jnp.take_along_axis(k, jnp.maximum(place, 0)[..., None], axis=0)
    return _Keys(chosen, place, jnp.repeat(bias, size, axis=1).T)


def _measure(q: jax.Array, keys: _Keys, place: jax.Array, span) -> Attended:
    """Of one softmax, for q [Hq, D]."""
    heads = keys.k.shape[1]
    grouped = q.reshape(heads, -1, q.shape[-1]).astype(jnp.float32)
    logits = jnp.einsum("hgd,mhd->hgm", grouped, keys.k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    logits = logits + keys.bias.T[:, None]
    there = (keys.place >= 0).T[:, None]
    logits = jnp.where(there, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    shares = jnp.exp(logits - top)
    within = ((keys.place >= span[0]) & (keys.place < span[1])).T[:, None]
    total = shares.sum(-1)
    weight = jnp.where(within, shares, 0).sum(-1) / jnp.where(total > 0, total, 1)
    return Attended((keys.place == place).any(), weight.max())
