"""Attention to selected key blocks on Hopper GPUs (Pallas Mosaic GPU, sm_90).

Key-major: the entries of a chunk of queries are sorted by block, and a tile gathers, by TMA, the
query rows of entries that chose the same block, so that a block's keys are read once for all of
its tiles (MoBA, arXiv:2502.13189; FSA, arXiv:2508.18224). Results per entry are written in bf16
and combined per query. dK and dV are summed block by block. No atomics: two runs agree bit for
bit. What a query gets depends on its own entries only.

Copies of whole entries need 8 or 16 query heads per KV head; other numbers are padded to these.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.mosaic_gpu.block_walk import key_gradients
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import forward, query_gradient
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    Chunk,
    Config,
    Sizes,
    plan_chunk,
    sizes_of,
)
from pallas_kernels.csr import BlockCSR
from pallas_kernels.hopper import HALF, ROWS

# Numbers in a chunk's partial results: as many as q has, but not so few that launches dominate.
_MIN_PARTIALS = 2**26
# Entries of which dK and dV are summed at once: int32 counts them, and sorts them.
_MAX_ENTRIES = 2**27


def config_for(kernel: str, head_dim: int) -> Config:
    """How "forward", "query_gradient" or "key_gradients" is cut, to fit shared memory."""
    small = head_dim == 64
    stages = {"forward": 6 if small else 4, "query_gradient": 4 if small else 2}
    return Config(stages=stages.get(kernel, 6 if small else 3))


def _padded_groups(groups: int) -> int:
    return 8 if groups <= 8 else 16


def _split(x, sizes: Sizes):
    """[B, T, Hkv * groups, ...] -> [chunks, B, chunk, Hkv, groups, ...], padded."""
    x = hopper.pad(x, 1, sizes.chunk)
    shape = sizes.batch, -1, sizes.chunk, sizes.num_kv_heads, sizes.groups, *x.shape[3:]
    return jnp.moveaxis(x.reshape(shape), 1, 0)


def _join(x, sizes: Sizes):
    """[chunks, B, chunk, Hkv, groups, ...] -> [B, T, Hkv * groups, ...]."""
    heads = sizes.num_kv_heads * sizes.groups
    x = jnp.moveaxis(x, 0, 1).reshape(sizes.batch, -1, heads, *x.shape[5:])
    return x[:, : sizes.tokens]


def _by_entry(x, sizes: Sizes):
    """[entries, groups, ...] -> [B, Hkv, chunk, capacity, groups, ...]."""
    shape = sizes.batch, sizes.num_kv_heads, sizes.chunk, sizes.capacity
    return x.reshape(*shape, *x.shape[1:])


def _combine(chunk: Chunk, out, lse, sizes: Sizes):
    """Results of entries -> those of queries, [B, chunk, Hkv, groups, D] and [.., groups]."""
    out, lse = (_by_entry(x, sizes) for x in (out, lse))
    filled = chunk.filled[..., None]
    lse = jnp.where(filled, lse + chunk.value[..., None], -jnp.inf)
    top = jnp.max(lse, axis=3)
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(lse - top[:, :, :, None])
    total = jnp.sum(weights, axis=3)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    weighted = jnp.where(filled[..., None], weights[..., None] * out.astype(jnp.float32), 0)
    combined = jnp.sum(weighted, axis=3) / total[..., None]
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    return jnp.moveaxis(combined, 1, 2).astype(out.dtype), jnp.moveaxis(lse, 1, 2)


def _forward(q, k, v, indptr, indices, values, *, sizes: Sizes):
    sizes = dataclasses.replace(sizes, batch=len(q))
    config = config_for("forward", sizes.head_dim)

    def attend(_, i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, ROWS // sizes.groups)
        return None, _combine(chunk, *forward(q, k, v, chunk, sizes, config), sizes)

    chunks = jnp.arange(-(-sizes.tokens // sizes.chunk), dtype=jnp.int32)
    _, (out, lse) = lax.scan(attend, None, chunks)
    return _join(out, sizes), _join(lse, sizes)


def _query_gradient(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dQ and the gradient of the values."""
    sizes = dataclasses.replace(sizes, batch=len(q))
    config = config_for("query_gradient", sizes.head_dim)
    b, h = (x[..., None, None] for x in jnp.ogrid[: sizes.batch, : sizes.num_kv_heads])

    def differentiate(values_bar, i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, ROWS // sizes.groups)
        parts = query_gradient(q, k, v, out_bar, lse, delta, chunk, sizes, config)
        q_bar, bias_bar = (_by_entry(x, sizes) for x in parts)
        filled = chunk.filled[..., None]
        q_bar = jnp.sum(jnp.where(filled[..., None], q_bar.astype(jnp.float32), 0), axis=3)
        value_bar = jnp.sum(jnp.where(filled, bias_bar, 0), axis=4)
        # Each entry belongs to one row, so adding to zero is writing.
        values_bar = values_bar.at[b, h, chunk.place].add(value_bar, mode="drop")
        return values_bar, jnp.moveaxis(q_bar, 1, 2).astype(q.dtype)

    chunks = jnp.arange(-(-sizes.tokens // sizes.chunk), dtype=jnp.int32)
    values_bar, q_bar = lax.scan(differentiate, jnp.zeros_like(values), chunks)
    return _join(q_bar, sizes), values_bar


def _key_gradients(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dK and dV, [B, N, Hkv, D]."""
    per_token = len(q) * sizes.num_kv_heads * sizes.capacity
    chunks = -(-sizes.tokens // max(1, _MAX_ENTRIES // per_token))
    sizes = dataclasses.replace(sizes, batch=len(q), chunk=-(-sizes.tokens // chunks))
    config = config_for("key_gradients", sizes.head_dim)

    def differentiate(i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, HALF // sizes.groups)
        return key_gradients(q, k, v, out_bar, lse, delta, chunk, sizes, config)

    def add(total, i):
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, differentiate(i)), None

    if chunks == 1:
        bars = differentiate(0)
    else:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(differentiate, 0)
        )
        bars, _ = lax.scan(add, zeros, jnp.arange(chunks, dtype=jnp.int32))
    return tuple(x.reshape(len(q), -1, *k.shape[2:])[:, : k.shape[1]].astype(k.dtype) for x in bars)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, indptr, indices, values, sizes: Sizes):
    return _attend_fwd(q, k, v, indptr, indices, values, sizes)[0]


def _attend_fwd(q, k, v, indptr, indices, values, sizes):
    attend = hopper.batchable(functools.partial(_forward, sizes=sizes))
    out, lse = attend(q, k, v, indptr, indices, values)
    return (out, lse), (q, k, v, indptr, indices, values, out, lse)


def _attend_bwd(sizes, residuals, cotangents):
    q, k, v, indptr, indices, values, out, lse = residuals
    out_bar, lse_bar = cotangents
    delta = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_bar
    lse = jnp.where(lse > -jnp.inf, lse, 0)
    operands = q, k, v, indptr, indices, values, out_bar, lse, delta
    (q_bar, values_bar), (k_bar, v_bar) = (
        hopper.batchable(functools.partial(f, sizes=sizes))(*operands)
        for f in (_query_gradient, _key_gradients)
    )
    return q_bar, k_bar, v_bar, None, None, values_bar


_attend.defvjp(_attend_fwd, _attend_bwd)


def block_sparse_attention(q, k, v, blocks: BlockCSR, block_size, scale):
    """See `pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    if 0 in (q.size, k.size, blocks.indices.size, blocks.row_capacity):
        return xla.block_sparse_attention(q, k, v, blocks, block_size, scale)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    groups = num_heads // num_kv_heads
    q = q.reshape(batch, tokens, num_kv_heads, groups, head_dim)
    q = hopper.pad(q, 3, _padded_groups(groups))
    q = q.reshape(batch, tokens, -1, head_dim)
    partials = max(_MIN_PARTIALS, q.size)
    sizes = sizes_of(q, k, blocks, block_size, scale, partials)
    k, v = (hopper.pad(x, 1, 8) for x in (k, v))
    out, lse = _attend(q, k, v, blocks.indptr, blocks.indices, blocks.values, sizes)

    def unpad(x):
        x = x.reshape(batch, tokens, num_kv_heads, sizes.groups, *x.shape[3:])
        return x[:, :, :, :groups].reshape(batch, tokens, num_heads, *x.shape[4:])

    return unpad(out), unpad(lse)
