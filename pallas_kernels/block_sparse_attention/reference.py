"""Attention to selected key blocks, written plainly: a dense [T, N] bias from the pattern."""

import jax
import jax.numpy as jnp

from pallas_kernels.csr import BlockCSR


def _dense_bias(blocks: BlockCSR, block_size, num_keys):
    """[B, Hkv, T, N]: the value of the entry that covers a key, or -inf."""
    batch, heads, entries = blocks.indices.shape
    b, h, _ = jnp.ix_(*map(jnp.arange, (batch, heads, entries)))
    column = jnp.where(blocks.indices < 0, blocks.num_columns, blocks.indices)
    bias = jnp.full(
        (batch, heads, blocks.num_rows, blocks.num_columns), -jnp.inf, blocks.values.dtype
    )
    bias = bias.at[b, h, blocks.entry_rows(), column].set(blocks.values, mode="drop")
    return jnp.repeat(bias, block_size, axis=-1)[..., :num_keys]


def block_sparse_attention(q, k, v, blocks: BlockCSR, block_size, scale):
    """See `pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    groups = num_heads // num_kv_heads
    grouped = q.reshape(batch, tokens, num_kv_heads, groups, head_dim).astype(dtype)
    k, v = k.astype(dtype), v.astype(dtype)
    bias = _dense_bias(blocks, block_size, k.shape[1])[:, :, None].astype(dtype)
    chosen = bias > -jnp.inf
    # Keys that nobody chose may hold NaN, which a product with 0 would keep.
    read = jnp.moveaxis(jnp.any(chosen, axis=(2, 3)), 1, 2)[..., None]
    k, v = jnp.where(read, k, 0), jnp.where(read, v, 0)
    logits = jnp.einsum("bthgd,bnhd->bhgtn", grouped, k, precision="highest") * scale
    logits = jnp.where(chosen, logits + jnp.where(chosen, bias, 0), -jnp.inf)
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
