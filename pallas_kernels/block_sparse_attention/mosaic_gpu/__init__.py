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
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import hopper
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.entries import Sizes, by_token, combine, join_chunks
from pallas_kernels.block_sparse_attention.mosaic_gpu.block_walk import key_gradients
from pallas_kernels.block_sparse_attention.mosaic_gpu.configs import KERNELS, config_for
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import forward, query_gradient
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import plan_chunk
from pallas_kernels.csr import BlockCSR
from pallas_kernels.hopper import HALF, ROWS
from pallas_kernels.mesh_axes import vary_with, zeros_like

# Entries of a chunk of queries. Partial results are held of all of them, so there should be few,
# but enough for whole tiles of a block's entries, and not so few that launches dominate.
_ENTRIES_PER_BLOCK = {"forward": 24, "query_gradient": 16}
_MIN_ENTRIES = 2**18
# dK and dV have no partial results: as many as int32 counts, and sorts.
_MAX_ENTRIES = 2**27


def _padded_groups(groups: int) -> int:
    return 8 if groups <= 8 else 16


def _cut(kernel: str, q, sizes: Sizes) -> tuple[Sizes, jax.Array]:
    """The sizes of a kernel's call on q [B, T, Hkv * groups, D], and the indices of its chunks."""
    sizes = dataclasses.replace(sizes, batch=len(q))
    entries = max(_MIN_ENTRIES, _ENTRIES_PER_BLOCK.get(kernel, _MAX_ENTRIES) * sizes.columns)
    most = max(1, min(entries, _MAX_ENTRIES) // (sizes.batch * sizes.heads * sizes.capacity))
    chunks = -(-q.shape[1] // most)
    sizes = dataclasses.replace(sizes, chunk=-(-q.shape[1] // chunks))
    return sizes, jnp.arange(chunks, dtype=jnp.int32)


def _forward(q, k, v, indptr, indices, values, *, sizes: Sizes):
    sizes, chunks = _cut("forward", q, sizes)
    config = config_for("forward", sizes.head_dim)

    def attend(_, i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, ROWS // sizes.groups)
        parts = forward(q, k, v, chunk, sizes, config)
        out, lse = combine(chunk.entries, *parts, sizes)
        return None, (out.astype(q.dtype), lse)

    _, (out, lse) = lax.scan(attend, None, chunks)
    return join_chunks(out, q.shape[1]), join_chunks(lse, q.shape[1])


def _query_gradient(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dQ and the gradient of the values."""
    sizes, chunks = _cut("query_gradient", q, sizes)
    config = config_for("query_gradient", sizes.head_dim)
    b, h = (x[..., None, None] for x in jnp.ogrid[: sizes.batch, : sizes.heads])

    def differentiate(values_bar, i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, ROWS // sizes.groups)
        parts = query_gradient(q, k, v, out_bar, lse, delta, chunk, sizes, config)
        q_bar, bias_bar = (by_token(x, sizes) for x in parts)
        filled = jnp.moveaxis(chunk.entries.filled, 1, 2)[..., None]
        q_bar = jnp.sum(jnp.where(filled[..., None], q_bar.astype(jnp.float32), 0), axis=3)
        value_bar = jnp.sum(jnp.where(filled, bias_bar, 0), axis=4).swapaxes(1, 2)
        # Each entry belongs to one row, so adding to zero is writing.
        values_bar = values_bar.at[b, h, chunk.entries.place].add(value_bar, mode="drop")
        return values_bar, q_bar.astype(q.dtype)

    values_bar, q_bar = lax.scan(differentiate, zeros_like(values), chunks)
    return join_chunks(q_bar, q.shape[1]), values_bar


def _key_gradients(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dK and dV, [B, N, Hkv, D]."""
    sizes, chunks = _cut("key_gradients", q, sizes)
    config = config_for("key_gradients", sizes.head_dim)

    def differentiate(i):
        chunk = plan_chunk(i, indptr, indices, values, sizes, HALF // sizes.groups)
        return key_gradients(q, k, v, out_bar, lse, delta, chunk, sizes, config)

    def add(total, i):
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, differentiate(i)), None

    if len(chunks) == 1:
        bars = differentiate(0)
    else:
        shapes = jax.eval_shape(differentiate, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        bars, _ = lax.scan(add, vary_with(k, zeros), chunks)
    return tuple(x.reshape(len(q), -1, *k.shape[2:])[:, : k.shape[1]].astype(k.dtype) for x in bars)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, indptr, indices, values, sizes: Sizes):
    return _attend_fwd(q, k, v, indptr, indices, values, sizes)[0]


def _attend_fwd(q, k, v, indptr, indices, values, sizes):
    attend = hopper.batchable(functools.partial(_forward, sizes=sizes))
    results = attend(q, k, v, indptr, indices, values)
    out, lse = checkpoint_name(results, "block_sparse_attention")
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
    sizes = Sizes(
        batch, num_kv_heads, q.shape[3], head_dim, k.shape[1], block_size, blocks.num_columns,
        blocks.row_capacity, tokens, scale,
    )  # fmt: skip
    q = q.reshape(batch, tokens, -1, head_dim)
    k, v = (hopper.pad(x, 1, 8) for x in (k, v))
    out, lse = _attend(q, k, v, blocks.indptr, blocks.indices, blocks.values, sizes)

    def unpad(x):
        x = x.reshape(batch, tokens, num_kv_heads, sizes.groups, *x.shape[3:])
        return x[:, :, :, :groups].reshape(batch, tokens, num_heads, *x.shape[4:])

    return unpad(out), unpad(lse)


__all__ = ["KERNELS", "block_sparse_attention"]
