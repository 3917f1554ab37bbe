"""Attention to a range of keys per query, written plainly: the whole [T, N] score array."""

import jax
import jax.numpy as jnp


def range_attention(q, k, v, start, end, key_bias, scale, _all_finite=False):
    """See `pallas_kernels.range_attention.range_attention`; start and end are int32 [B, T]."""
    batch, tokens, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    groups = num_heads // num_kv_heads
    grouped = q.reshape(batch, tokens, num_kv_heads, groups, head_dim).astype(dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    key = jnp.arange(num_keys)
    chosen = (start[..., None] <= key) & (key < end[..., None])  # [B, T, N]
    chosen = chosen[:, None, None]  # [B, Hkv, G, T, N]
    if key_bias is not None:
        bias = jnp.moveaxis(key_bias, 1, 2)[:, :, None, None]
        chosen = chosen & (bias > -jnp.inf)
    # Keys that nobody sees may hold anything: 0 * NaN must not reach the result.
    used = jnp.moveaxis(jnp.any(chosen, axis=(2, 3)), 1, 2)[..., None]
    used = jnp.broadcast_to(used, k.shape)
    k, v = jnp.where(used, k, 0), jnp.where(used, v, 0)
    logits = jnp.einsum("bthgd,bnhd->bhgtn", grouped, k, precision="highest") * scale
    if key_bias is not None:
        logits = logits + jnp.where(chosen, bias, 0)
    logits = jnp.where(chosen, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum("bhgtn,bnhd->bthgd", weights / total, v, precision="highest")
    return (
        out.reshape(q.shape).astype(q.dtype),
        jnp.moveaxis(lse, 3, 1).reshape(batch, tokens, num_heads),
    )
