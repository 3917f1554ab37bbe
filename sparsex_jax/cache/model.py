"""All layers of a model that reads new tokens, and what they remember."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsex_jax.cache.layer import (
    LayerCache,
    extend_layer,
    first_attending,
    inputs_of_local,
)
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.modules.attending import count_attending
from sparsex_jax.modules.transformer import Transformer

Layers = tuple[LayerCache, ...]


def extend(
    model: Transformer,
    layers: Layers,
    tokens: jax.Array,
    length: jax.Array,
    valid: jax.Array,
    logits: bool = True,
    goes_on: bool = False,
) -> tuple[jax.Array | None, Layers]:
    """Reads new tokens.

    Where nobody reads a token's output it does not attend: see `attending_tokens`.

    Args:
      model: whose caches these are.
      layers: of the tokens before.
      tokens: int32 [B, C].
      length: tokens before, int32: a scalar, or [B] where sequences differ.
      valid: how many of the C count, likewise; of a sequence with none nothing changes, and its
        logits mean nothing.
      logits: whether they are wanted.
      goes_on: without logits, that the next call brings each sequence `tokens_to_go_on` or more.

    Returns:
      (logits after the last valid token, f32 [B, vocab], or None; the new caches).
    """
    if jnp.ndim(length) or jnp.ndim(valid):
        length, valid = (jnp.broadcast_to(x, tokens.shape[:1]) for x in (length, valid))

        def alone(*operands):
            layers, tokens, length, valid = operands
            layers, tokens = jax.tree.map(lambda x: x[None], (layers, tokens))
            found = extend(model, layers, tokens, length, valid, logits, goes_on)
            return jax.tree.map(lambda x: x[0], found)

        return jax.vmap(alone)(layers, tokens, length, valid)
    attending = attending_tokens(model.config, tokens.shape[1], logits, goes_on)
    x, after = _read(model, layers, tokens, length, valid, attending)
    return None if x is None else model.logits(model.final_norm(x[:, 0])), after


def read_all(
    model: Transformer, layers: Layers, tokens: jax.Array, length: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Layers]:
    """Reads new tokens, all of which attend in all layers.

    Args:
      model, layers, tokens: as in `extend`.
      length, valid: int32 scalars, the same for all sequences.

    Returns:
      (logits after each token, f32 [B, C, vocab]; the new caches).
    """
    everyone = [tokens.shape[1]] * len(layers)
    x, after = _read(model, layers, tokens, length, valid, everyone)
    assert x is not None
    return model.logits(model.final_norm(x)), after


def _read(
    model: Transformer,
    layers: Layers,
    tokens: jax.Array,
    length: jax.Array,
    valid: jax.Array,
    attending: Sequence[int],
) -> tuple[jax.Array | None, Layers]:
    """The last layer's output for the tokens that attend in it, None for none; the new caches."""
    x: jax.Array | None = model.embed(tokens)
    after: list[LayerCache] = []
    for block, layer, count in zip(model.blocks, layers, attending, strict=True):
        if x is not None:
            first = first_attending(count, x.shape[1], valid)
            x, layer = extend_layer(block, layer, x, tokens, length, valid, attending=count)
            tokens = jax.lax.dynamic_slice_in_dim(tokens, first, count, axis=1)
            length, valid = length + first, valid - first
        after.append(layer)
    return x, tuple(after)


def attending_tokens(
    config: ModelConfig, tokens: int, logits: bool, goes_on: bool = False
) -> list[int]:
    """How many of so many new tokens attend in each layer, the last ones, in `extend`.

    In the last layer only the last token does, or none where logits are not wanted. Before a local
    layer those do that fill its window; none where the tokens that follow will fill it, and then
    the layers behind that one have nothing to do.
    """

    def before(attending: int) -> int:
        return 0 if goes_on and not attending else inputs_of_local(attending, config)

    return count_attending(config, tokens, int(logits), before)


def tokens_to_go_on(config: ModelConfig) -> int:
    """The fewest tokens of a call of `extend` after one that goes on; 0 if that skips nothing."""
    many = 2**30
    first = attending_tokens(config, many, logits=False, goes_on=True).index(0)
    return attending_tokens(config, many, logits=False)[first]


def map_layers(
    function: Callable[[LayerCache, jax.Array, AttentionConfig], LayerCache],
    model: Transformer,
    layers: Layers,
    position: jax.Array,
) -> Layers:
    """`open_block` or `close_block` of all layers; the position is int32, a scalar or [B]."""
    if jnp.ndim(position):

        def alone(layers, position):
            layers = jax.tree.map(lambda x: x[None], layers)
            found = map_layers(function, model, layers, position)
            return jax.tree.map(lambda x: x[0], found)

        return jax.vmap(alone)(layers, position)
    return tuple(
        function(layer, position, block.attention.attention_config())
        for block, layer in zip(model.blocks, layers, strict=True)
    )


def split_layers(layers: Layers) -> tuple[tuple, tuple]:
    """What an answer must not change, layer by layer, and what it only adds to behind the end."""
    parts = [((), ()) if x.remote is None else x.remote.split() for x in layers]
    kept = tuple((x.recent, part[0]) for x, part in zip(layers, parts, strict=True))
    return kept, tuple(part[1] for part in parts)


def join_layers(kinds: tuple[Any, ...], kept: tuple, appended: tuple) -> Layers:
    """The inverse of `split_layers`; `kinds` are the classes of the remote caches."""
    return tuple(
        LayerCache(recent, None if kind is type(None) else kind.join(part, rest))
        for kind, (recent, part), rest in zip(kinds, kept, appended, strict=True)
    )


def kinds_of(layers: Layers) -> tuple[Any, ...]:
    """The classes of the remote caches."""
    return tuple(type(layer.remote) for layer in layers)
