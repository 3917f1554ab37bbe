"""Attention to selected key blocks on TPU (Pallas Mosaic TPU, written for v5e).

Key-major: the entries of a chunk of queries are sorted by block, XLA gathers their query rows in
that order, and the kernels walk over them, so that a block's keys are read once a chunk
(MoBA, arXiv:2502.13189; FSA, arXiv:2508.18224). Results per entry are written in q's dtype and
combined per query. One backward kernel computes all gradients: those of keys and values are
summed block by block. No atomics: two runs agree bit for bit.

Strict causality: what later queries choose moves an entry to another row of a product, and of the
MXU each row is summed on its own, in the same order. What a query gets depends on its own entries
only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import shapes, tpu
from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.entries import Sizes, loop, weigh
from pallas_kernels.block_sparse_attention.mosaic_tpu.kernels import (
    backward,
    forward,
    vmem_bytes,
    weighted_sum,
)
from pallas_kernels.block_sparse_attention.mosaic_tpu.plan import Chunk, plan_chunk, window_entries
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_with

# Query rows of a chunk, of all its entries: so many for each key block, within these bounds. Each
# is held two or three times, so there should be few: with S = 64 they are four times the keys. But
# each chunk loads and stores all blocks' keys and their gradients.
_MIN_ROWS = 2**20
_MAX_ROWS = 2**22
_ROWS_PER_BLOCK = 256
# Key blocks of a chunk: SMEM has 1 MiB for its pieces, 8 bytes each.
_MAX_BLOCKS = 2**16 - 2**13


def _cut(tokens: int, sizes: Sizes) -> tuple[Sizes, int]:
    """The sizes of chunks of queries, and their number."""
    rows = min(max(_MIN_ROWS, _ROWS_PER_BLOCK * sizes.columns), _MAX_ROWS)
    most = max(1, rows // (sizes.groups * sizes.batch * sizes.heads * sizes.capacity))
    chunks = -(-tokens // most)
    return dataclasses.replace(sizes, chunk=-(-tokens // chunks)), chunks


def _for_chunks(pattern, tokens: int, sizes: Sizes, step, results, sums):
    """Runs `step(chunk, its first token, its sizes, sums)`, chunk after chunk.

    A step returns what its tokens get, [B, chunk, Hkv * G, ...] each, which is written to
    `results`, [B, T, Hkv * G, ...] each; and the new sums. The last chunk ends with the sequence:
    the tokens that it shares with the one before have no entries in it.

    Returns:
      results and sums.
    """
    indptr, indices, values = pattern
    sizes, chunks = _cut(tokens, sizes)

    def of_chunk(i, state):
        results, sums = state
        begin = jnp.asarray(i * sizes.chunk, jnp.int32)
        first = jnp.minimum(begin, tokens - sizes.chunk)
        own = jnp.maximum(indptr, lax.dynamic_slice_in_dim(indptr, begin, 1, axis=2))
        chunk = plan_chunk(first, own, indices, values, sizes)
        rows, sums = step(chunk, first, sizes, sums)
        return tuple(_put(x, y, begin, first) for x, y in zip(results, rows, strict=True)), sums

    return loop(chunks, of_chunk, vary_with(indptr, (results, sums)))


def _put(target, rows, begin, first):
    """Writes to [B, T, Hkv * G, ...] those rows of tokens from `first` on that are from `begin`."""
    rows = rows.astype(target.dtype)
    before = lax.dynamic_slice_in_dim(target, first, rows.shape[1], axis=1)
    own = first + jnp.arange(rows.shape[1], dtype=jnp.int32) >= begin
    rows = jnp.where(own.reshape(-1, *[1] * (rows.ndim - 2)), rows, before)
    return lax.dynamic_update_slice_in_dim(target, rows, first, axis=1)


def _gather(x, chunk: Chunk, first, sizes: Sizes):
    """The sorted entries' rows of [B, T, Hkv * G, ...]: [entries, G * ...]."""
    x = lax.dynamic_slice_in_dim(x, first, sizes.chunk, axis=1)
    x = x.reshape(sizes.batch * sizes.chunk * sizes.heads, -1)
    return x.at[chunk.row].get(mode="promise_in_bounds")


def _windows(x, sizes: Sizes):
    """[entries, ...] -> [windows, entries, ...]."""
    return x.reshape(-1, window_entries(sizes.groups), *x.shape[1:])


def _of_heads(x):
    """f32 [windows, entries, G] -> [windows, 1, G * entries], head by head."""
    return x.swapaxes(1, 2).reshape(len(x), 1, -1)


def _by_token(x, chunk: Chunk):
    """Of sorted entries [windows, entries, ...] -> [capacity, rows, ...]."""
    place = chunk.sorted_place.reshape(len(chunk.sorted_place), -1)
    return x.reshape(-1, *x.shape[2:]).at[place].get(mode="promise_in_bounds")


def _tokens_first(x, sizes: Sizes):
    """[B * Hkv * chunk, G * ...] -> [B, chunk, Hkv * G, ...]."""
    x = x.reshape(sizes.batch, sizes.heads, sizes.chunk, x.shape[1]).swapaxes(1, 2)
    width = x.shape[3] // sizes.groups
    shape = sizes.batch, sizes.chunk, sizes.heads * sizes.groups
    return x.reshape(shape if width == 1 else (*shape, width))


def _join(k, v, sizes: Sizes):
    """Keys and values [B, N, Hkv, D], side by side: [columns, S, 2 * D]."""
    x = shapes.pad(jnp.concatenate([k, v], axis=3), 1, sizes.block_size)
    return x.swapaxes(1, 2).reshape(sizes.columns, sizes.block_size, -1)


def _forward(q, k, v, indptr, indices, values, *, sizes: Sizes):
    kv = _join(k, v, sizes)

    def attend(chunk, first, sizes, _):
        rows = _windows(_gather(q, chunk, first, sizes), sizes)
        out, lse = forward(rows, kv, chunk, sizes)
        lse = lse.reshape(len(lse), sizes.groups, -1).swapaxes(1, 2)
        # Heads first: last, they would leave most lanes of all that follows empty.
        lse = lax.optimization_barrier(jnp.moveaxis(_by_token(lse, chunk), 2, 0))
        value, filled = (x.reshape(lse.shape[1:]) for x in (chunk.value, chunk.filled))
        weights, total, lse = weigh(lse + value, filled, axis=1)
        weights = jnp.moveaxis(weights / total[:, None], 0, 2)
        out = weighted_sum(_by_token(out, chunk), weights, sizes.head_dim)
        return (_tokens_first(out, sizes), _tokens_first(lse.T, sizes)), ()

    empty = lax.empty(q.shape, q.dtype), lax.empty(q.shape[:3], jnp.float32)
    return _for_chunks((indptr, indices, values), q.shape[1], sizes, attend, empty, ())[0]


def _backward(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """The gradients of q, k, v and values."""
    kv = _join(k, v, sizes)
    b, h, _ = jnp.ogrid[: sizes.batch, : sizes.heads, :1]
    numbers = jnp.stack([lse, delta], axis=-1)

    def differentiate(chunk, first, sizes, sums):
        kv_bar, values_bar = sums
        rows, rows_bar = (_windows(_gather(x, chunk, first, sizes), sizes) for x in (q, out_bar))
        lse_rows, delta_rows = jnp.unstack(
            _gather(numbers, chunk, first, sizes).reshape(-1, sizes.groups, 2), axis=2
        )
        shift = chunk.sorted_value[:, None] - lse_rows
        of_q, of_bias, kv_bar = backward(
            rows, rows_bar, *(_of_heads(_windows(x, sizes)) for x in (shift, delta_rows)),
            kv, kv_bar, chunk, sizes,
        )  # fmt: skip
        filled = chunk.filled.reshape(sizes.capacity, -1, 1).astype(jnp.float32)
        filled = jnp.broadcast_to(filled, (*filled.shape[:2], sizes.groups))
        q_bar = weighted_sum(_by_token(of_q, chunk), filled, sizes.head_dim)
        of_bias = jnp.sum(of_bias.reshape(len(of_bias), sizes.groups, -1), axis=1)
        value_bar = _by_token(of_bias, chunk).reshape(chunk.place.shape)
        # Each entry has its own place; empty ones have none.
        values_bar = values_bar.at[b, h, chunk.place].set(value_bar, mode="drop")
        return (_tokens_first(q_bar, sizes),), (kv_bar, values_bar)

    results = (lax.empty(q.shape, q.dtype),)
    sums = jnp.zeros(kv.shape, jnp.float32), jnp.zeros_like(values)
    pattern = indptr, indices, values
    (q_bar,), sums = _for_chunks(pattern, q.shape[1], sizes, differentiate, results, sums)
    kv_bar, values_bar = sums
    kv_bar = kv_bar.reshape(sizes.batch, sizes.heads, -1, 2 * sizes.head_dim)
    kv_bar = kv_bar[:, :, : sizes.num_keys].swapaxes(1, 2).astype(k.dtype)
    return q_bar, *jnp.split(kv_bar, 2, axis=3), values_bar


def _batched(f, sizes: Sizes):
    """f, of as many batch elements at a time as a chunk may have key blocks."""

    def call(*operands):
        batch = len(operands[0])
        each = max(1, min(batch, _MAX_BLOCKS // (sizes.heads * sizes.num_blocks)))
        while batch % each:
            each -= 1
        part = functools.partial(f, sizes=dataclasses.replace(sizes, batch=each))
        if each == batch:
            return part(*operands)
        split = [x.reshape(-1, each, *x.shape[1:]) for x in operands]
        results = lax.map(lambda x: part(*x), split)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)

    return shapes.batchable(call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, indptr, indices, values, sizes: Sizes):
    return _attend_fwd(q, k, v, indptr, indices, values, sizes)[0]


def _attend_fwd(q, k, v, indptr, indices, values, sizes):
    results = _batched(_forward, sizes)(q, k, v, indptr, indices, values)
    out, lse = checkpoint_name(results, "block_sparse_attention")
    return (out, lse), (q, k, v, indptr, indices, values, out, lse)


def _attend_bwd(sizes, residuals, cotangents):
    q, k, v, indptr, indices, values, out, lse = residuals
    out_bar, lse_bar = cotangents
    delta = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_bar
    operands = q, k, v, indptr, indices, values, out_bar, lse, delta
    q_bar, k_bar, v_bar, values_bar = _batched(_backward, sizes)(*operands)
    return q_bar, k_bar, v_bar, None, None, values_bar


_attend.defvjp(_attend_fwd, _attend_bwd)


def why_not_for(q, k, v, blocks: BlockCSR, block_size, scale) -> str | None:
    """Why the kernels do not take the operands of `block_sparse_attention`, or None."""
    head_dim, groups = q.shape[3], q.shape[2] // k.shape[2]
    columns = k.shape[2] * blocks.num_columns
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {q.dtype}"
    if head_dim not in (64, 128):
        return f"takes head dimensions of 64 and 128, not {head_dim}"
    if block_size % 16:
        return f"takes blocks of a multiple of 16 keys, not {block_size}"
    if columns > _MAX_BLOCKS:
        return f"takes up to {_MAX_BLOCKS} key blocks of all KV heads, not {columns}"
    vmem = vmem_bytes("backward", groups, head_dim, block_size, q.dtype.itemsize)
    if vmem > tpu.VMEM_BUDGET:
        return f"{groups} query heads and {block_size} keys at a time take {vmem} bytes of VMEM"
    return None


def block_sparse_attention(q, k, v, blocks: BlockCSR, block_size, scale):
    """See `pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    if 0 in (q.size, k.size, blocks.indices.size, blocks.row_capacity):
        return xla.block_sparse_attention(q, k, v, blocks, block_size, scale)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    sizes = Sizes(
        batch, num_kv_heads, num_heads // num_kv_heads, head_dim, k.shape[1], block_size,
        blocks.num_columns, blocks.row_capacity, tokens, scale,
    )  # fmt: skip
    return _attend(q, k, v, blocks.indptr, blocks.indices, blocks.values, sizes)


__all__ = ["block_sparse_attention", "why_not_for"]
