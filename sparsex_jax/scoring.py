"""Features by which blocks are scored and selected.

s_{t,b} = exp(tau) * <u_t, c_b> / sqrt(d_s): u_t is a projection of the query token's hidden state,
c_b an attention pooling (learned logits) over the tokens of block b; both are RMS-normalised.
"""

import jax
import jax.numpy as jnp


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


def block_features(projected: jax.Array, logits: jax.Array, block_size: int) -> jax.Array:
    """c_b of every complete block.

    Args:
      projected: [B, T, Hkv, d_s].
      logits: of the pooling, f32 [B, T, Hkv].
      block_size: S.

    Returns:
      [B, T // S, Hkv, d_s] in the type of `projected`.
    """
    batch, tokens, heads, width = projected.shape
    blocks = tokens // block_size
    shape = (batch, blocks, block_size, heads)
    weights = jax.nn.softmax(logits[:, : blocks * block_size].reshape(shape), axis=2)
    inputs = projected[:, : blocks * block_size].reshape(*shape, width)
    pooled = jnp.einsum("bnsh,bnshd->bnhd", weights, inputs.astype(weights.dtype))
    return rms_normalize(pooled.astype(projected.dtype))
