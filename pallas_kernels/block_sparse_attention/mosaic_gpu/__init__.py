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

from pallas_kernels import shapes
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.entries import (
    Sizes,
    by_token,
    combine,
    find_entries,
    loop,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.block_walk import key_gradients
from pallas_kernels.block_sparse_attention.mosaic_gpu.configs import KERNELS, config_for
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import forward, query_gradient
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import plan_chunks
from pallas_kernels.csr import BlockCSR
from pallas_kernels.hopper_few_queries import attend_blocks, differentiated_as, takes
from pallas_kernels.mesh_axes import vary_with

# Entries of a chunk of queries. Partial results are held of all of them, so there should be few,
# but enough for whole tiles of a block's entries, and not so few that launches dominate.
_ENTRIES_PER_BLOCK = {"forward": 28, "query_gradient": 16}
_MIN_ENTRIES = 2**17
# Of what is planned at once, and of a chunk for dK and dV, which have no partial results.
_MAX_ENTRIES = 2**27


def _padded_groups(groups: int) -> int:
    return 8 if groups <= 8 else 16


def _cut(kernel: str, q, sizes: Sizes) -> tuple[Sizes, int]:
    """The sizes of a kernel's call on q [B, T, Hkv * groups, D], and the number of its chunks."""
    sizes = dataclasses.replace(sizes, batch=len(q))
    entries = max(_MIN_ENTRIES, _ENTRIES_PER_BLOCK.get(kernel, _MAX_ENTRIES) * sizes.columns)
    most = max(1, min(entries, _MAX_ENTRIES) // (sizes.batch * sizes.heads * sizes.capacity))
    chunks = -(-q.shape[1] // most)
    return dataclasses.replace(sizes, chunk=-(-q.shape[1] // chunks)), chunks


def _for_chunks(chunks: int, pattern, sizes: Sizes, tokens: int, step, results):
    """Runs `step(chunk, its first token, results)` chunk after chunk; returns the last results.

    The last chunk ends with the sequence: what it shares with others is computed again.
    """
    plans = -(-chunks * sizes.entries // _MAX_ENTRIES)
    each = -(-chunks // plans)
    number = jnp.arange(plans * each, dtype=jnp.int32).reshape(plans, each)
    first = jnp.minimum(number * sizes.chunk, tokens - sizes.chunk)

    def of_plan(n, results):
        plan = plan_chunks(first[n], *pattern, sizes)

        def of_chunk(i, results):
            return step(plan.chunk(i, sizes), first[n, i], results)

        return loop(each, of_chunk, results)

    return loop(plans, of_plan, vary_with(pattern[0], results))


def _put(target, rows, first):
    """Writes rows of tokens [B, chunk, Hkv, groups, ...] to target [B, T, Hkv * groups, ...]."""
    rows = rows.reshape(*rows.shape[:2], *target.shape[2:]).astype(target.dtype)
    return lax.dynamic_update_slice_in_dim(target, rows, first, axis=1)


def _forward(q, k, v, indptr, indices, values, *, sizes: Sizes):
    sizes, chunks = _cut("forward", q, sizes)
    config = config_for("forward", sizes.head_dim)

    def attend(chunk, first, results):
        parts = forward(q, k, v, chunk, sizes, config)
        found = combine(chunk.value, chunk.filled, *parts, sizes)
        return tuple(_put(x, y, first) for x, y in zip(results, found, strict=True))

    empty = lax.empty(q.shape, q.dtype), lax.empty(q.shape[:3], jnp.float32)
    return _for_chunks(chunks, (indptr, indices, values), sizes, q.shape[1], attend, empty)


def _query_gradient(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dQ and the gradient of the values."""
    sizes, chunks = _cut("query_gradient", q, sizes)
    config = config_for("query_gradient", sizes.head_dim)
    b, h = (x[..., None, None] for x in jnp.ogrid[: sizes.batch, : sizes.heads])

    def differentiate(chunk, first, results):
        parts = query_gradient(q, k, v, out_bar, lse, delta, chunk, sizes, config)
        of_entries, bias_bar = (by_token(x, sizes) for x in parts)
        filled = jnp.moveaxis(chunk.filled, 1, 2)[..., None]
        of_entries = jnp.where(filled[..., None], of_entries.astype(jnp.float32), 0)
        value_bar = jnp.sum(jnp.where(filled, bias_bar, 0), axis=4).swapaxes(1, 2)
        q_bar, values_bar = results
        values_bar = values_bar.at[b, h, chunk.place].set(value_bar, mode="drop")
        return _put(q_bar, jnp.sum(of_entries, axis=3), first), values_bar

    results = lax.empty(q.shape, q.dtype), jnp.zeros_like(values)
    pattern = indptr, indices, values
    return _for_chunks(chunks, pattern, sizes, q.shape[1], differentiate, results)


def _key_gradients(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dK and dV, [B, N, Hkv, D]."""
    sizes, chunks = _cut("key_gradients", q, sizes)
    config = config_for("key_gradients", sizes.head_dim)

    def differentiate(i):
        first = jnp.reshape(i * sizes.chunk, 1)
        chunk = plan_chunks(first, indptr, indices, values, sizes).chunk(0, sizes)
        return key_gradients(q, k, v, out_bar, lse, delta, chunk, sizes, config)

    def add(i, total):
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, differentiate(i))

    if chunks == 1:
        bars = differentiate(0)
    else:
        shapes = jax.eval_shape(differentiate, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        bars = lax.fori_loop(0, chunks, add, vary_with(k, zeros))
    return tuple(x.reshape(len(q), -1, *k.shape[2:])[:, : k.shape[1]].astype(k.dtype) for x in bars)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, indptr, indices, values, sizes: Sizes):
    return _attend_fwd(q, k, v, indptr, indices, values, sizes)[0]


def _attend_fwd(q, k, v, indptr, indices, values, sizes):
    attend = shapes.batchable(functools.partial(_forward, sizes=sizes))
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
        shapes.batchable(functools.partial(f, sizes=sizes))(*operands)
        for f in (_query_gradient, _key_gradients)
    )
    return q_bar, k_bar, v_bar, None, None, values_bar


_attend.defvjp(_attend_fwd, _attend_bwd)


def _attend_few(q, k, v, indptr, indices, values, *, sizes: Sizes, uniform: bool):
    """As `_attend`, an entry being a piece of keys."""
    sizes = dataclasses.replace(sizes, batch=len(q), chunk=q.shape[1])
    if uniform:  # The entries as they are: nothing that XLA would compute beforehand.
        value, indptr = values.reshape(*values.shape[:2], q.shape[1], sizes.capacity), None
    else:
        value = find_entries(jnp.zeros(1, jnp.int32), indptr, indices, values, sizes)[2][0]
    return attend_blocks(
        q, k, v, indptr, indices, values, value,
        num_keys=sizes.num_keys, num_blocks=sizes.num_blocks, scale=sizes.scale,
    )  # fmt: skip


def block_sparse_attention(q, k, v, blocks: BlockCSR, block_size, scale):
    """See `pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    if 0 in (q.size, k.size, blocks.indices.size, blocks.row_capacity):
        return xla.block_sparse_attention(q, k, v, blocks, block_size, scale)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    groups = num_heads // num_kv_heads
    q = q.reshape(batch, tokens, num_kv_heads, groups, head_dim)
    q = shapes.pad(q, 3, _padded_groups(groups))
    sizes = Sizes(
        batch, num_kv_heads, q.shape[3], head_dim, k.shape[1], block_size, blocks.num_columns,
        blocks.row_capacity, tokens, scale,
    )  # fmt: skip
    q = q.reshape(batch, tokens, -1, head_dim)
    k, v = (shapes.pad(x, 1, 8) for x in (k, v))
    operands = q, k, v, blocks.indptr, blocks.indices, blocks.values
    many = functools.partial(_attend, sizes=sizes)
    few = shapes.batchable(functools.partial(_attend_few, sizes=sizes, uniform=blocks.uniform))
    out, lse = (differentiated_as(many, few) if takes(q) else many)(*operands)

    def unpad(x):
        x = x.reshape(batch, tokens, num_kv_heads, sizes.groups, *x.shape[3:])
        return x[:, :, :, :groups].reshape(batch, tokens, num_heads, *x.shape[4:])

    return unpad(out), unpad(lse)


__all__ = ["KERNELS", "block_sparse_attention"]
