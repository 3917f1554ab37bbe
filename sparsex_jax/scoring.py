"""Features by which blocks are scored and selected.

s_{t,b} = exp(tau) * <u_t, c_b> / sqrt(d_s): u_t is a projection of the query token's hidden state,
c_b an attention pooling (learned logits) over the tokens of block b; both are RMS-normalised. Where
blocks are searched in two levels, a node of neighbouring blocks is pooled in the same way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsex_jax.config import AttentionConfig


def rms_normalize(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, in f32, returned in the type of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def query_features(projected: jax.Array, log_scale: jax.Array) -> jax.Array:
    """u_t with exp(tau) / sqrt(d_s) multiplied in.

    Args:
      projected: [B, T, Hkv, d_s].
      log_scale: tau, f32 [Hkv].
    """
    scale = jnp.exp(log_scale)[:, None] * projected.shape[-1] ** -0.5
    return rms_normalize(projected) * scale.astype(projected.dtype)


class Blocks(NamedTuple):
    """What is pooled of the tokens of blocks.

    Attributes:
      features: c, [B, blocks, Hkv, d_s].
      mass: of the pooling, the logarithm of the sum of its logits' exponentials, f32
        [B, blocks, Hkv]; None where all blocks are searched.
    """

    features: jax.Array
    mass: jax.Array | None


class BlockIndex(NamedTuple):
    """What queries find blocks by.

    Attributes:
      features: c, [B, blocks, Hkv, d_s].
      nodes: features of every whole node, [B, blocks // search_node_size, Hkv, d_s]; None where all
        blocks are searched.
    """

    features: jax.Array
    nodes: jax.Array | None

    @classmethod
    def of(cls, blocks: Blocks, config: AttentionConfig) -> "BlockIndex":
        """Of all blocks of a sequence."""
        return cls(blocks.features, node_features(blocks, config))


def pool_blocks(projected: jax.Array, logits: jax.Array, config: AttentionConfig) -> Blocks:
    """Pools every complete block of tokens.

    Args:
      projected: [B, T, Hkv, d_s].
      logits: of the pooling, f32 [B, T, Hkv].
      config: block size, and how blocks are searched.

    Returns:
      T // S blocks, features in the type of `projected`.
    """
    batch, tokens, heads, width = projected.shape
    blocks = tokens // config.block_size
    shape = (batch, blocks, config.block_size, heads)
    logits = logits[:, : blocks * config.block_size].reshape(shape)
    inputs = projected[:, : blocks * config.block_size].reshape(*shape, width)
    mass = jax.nn.logsumexp(logits, axis=2) if config.search_node_size else None
    return Blocks(_pool(inputs, logits), mass)


def node_features(blocks: Blocks, config: AttentionConfig) -> jax.Array | None:
    """Features of every whole node: what pooling all its tokens at once gives, but for norms.

    A block has the share of its mass, as its tokens would have together.

    Returns:
      [B, blocks // search_node_size, Hkv, d_s] in the type of the blocks' features; None where all
      blocks are searched.
    """
    if blocks.mass is None:
        return None
    batch, count, heads, width = blocks.features.shape
    size = config.search_node_size
    nodes = count // size
    features = blocks.features[:, : nodes * size].reshape(batch, nodes, size, heads, width)
    return _pool(features, blocks.mass[:, : nodes * size].reshape(batch, nodes, size, heads))


def _pool(inputs: jax.Array, logits: jax.Array) -> jax.Array:
    """The mean of inputs [B, N, M, Hkv, d] by the softmax of logits [B, N, M, Hkv], normalised."""
    weights = jax.nn.softmax(logits, axis=2)
    pooled = jnp.einsum("bnsh,bnshd->bnhd", weights, inputs.astype(weights.dtype))
    return rms_normalize(pooled.astype(inputs.dtype))
