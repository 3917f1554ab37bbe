"""Attention to selected key blocks on Hopper GPUs (Pallas Mosaic GPU, sm_90).

Key-major: the entries of a chunk of queries are sorted by block, and a tile gathers, by TMA, the
query rows of entries that chose the same block, so that a block's keys are read once for all of
its tiles (MoBA, arXiv:2502.13189; FSA, arXiv:2508.18224). Results per entry are written in 12
bits a number (`packing`) and combined per query. dK and dV are summed block by block. No atomics:
two runs agree bit for bit. What a query gets depends on its own entries only.

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
    combine_by_token,
    find_entries,
    loop,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu import packing
from pallas_kernels.block_sparse_attention.mosaic_gpu.block_walk import key_gradients
from pallas_kernels.block_sparse_attention.mosaic_gpu.combination import (
    TOGETHER,
    Added,
    combine_config_for,
    combine_entries,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.configs import KERNELS, config_for
from pallas_kernels.block_sparse_attention.mosaic_gpu.entry_walk import (
    forward,
    query_gradient,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import Chunk, by_token, plan_chunks
from pallas_kernels.csr import BlockCSR
from pallas_kernels.hopper_few_queries import attend_blocks, takes
from pallas_kernels.mesh_axes import vary_with

# Entries of a chunk of queries. Partial results are held of all of them, so there should be few,
# but enough for whole tiles of a block's entries, and not so few that launches dominate.
_ENTRIES_PER_BLOCK = {"forward": 64, "query_gradient": 16}
_MIN_ENTRIES = 2**17
# Of what is planned at once, and of a chunk for dK and dV, which have no partial results.
_MAX_ENTRIES = 2**27


def _padded_groups(groups: int) -> int:
    return 8 if groups <= 8 else 16


def _cut(
    kernel: str, batch: int, tokens: int, sizes: Sizes, heads: int | None = None
) -> tuple[Sizes, int]:
    """The sizes of a kernel's call on so many queries, and the number of its chunks.

    Partial results may be as many as if it were for `heads` KV heads.
    """
    sizes = dataclasses.replace(sizes, batch=batch)
    columns = sizes.columns // sizes.heads * (heads or sizes.heads)
    entries = max(_MIN_ENTRIES, _ENTRIES_PER_BLOCK.get(kernel, _MAX_ENTRIES) * columns)
    most = max(1, min(entries, _MAX_ENTRIES) // (sizes.batch * sizes.heads * sizes.capacity))
    chunks = -(-tokens // most)
    return dataclasses.replace(sizes, chunk=_whole(-(-tokens // chunks))), chunks


def _whole(tokens: int) -> int:
    """As many tokens or more, of which the results are whole tiles."""
    return -(-tokens // TOGETHER) * TOGETHER


def _for_chunks(chunks: int, pattern, sizes: Sizes, tokens: int, step, results, **options):
    """Runs `step(chunk, results)` chunk after chunk; returns the last results.

    The last chunk ends with the sequence: what it shares with others is computed again.

    Args:
      chunks: how many.
      pattern: indptr, indices and values.
      sizes: of the call.
      tokens: of the pattern, a multiple of 8 or more.
      step: what to do.
      results: to begin with.
      options: of `plan_chunks`.
    """
    plans = -(-chunks * sizes.entries // _MAX_ENTRIES)
    each = -(-chunks // plans)
    number = jnp.arange(plans * each, dtype=jnp.int32).reshape(plans, each)
    first = jnp.minimum(number * sizes.chunk, tokens - sizes.chunk)

    def of_plan(n, results):
        plan = plan_chunks(first[n], *pattern, sizes, **options)

        def of_chunk(i, results):
            return step(plan.chunk(i), results)

        return loop(each, of_chunk, results)

    return loop(plans, of_plan, results)


def _put(target, rows, chunk: Chunk):
    """Writes rows of tokens [B, chunk, Hkv, groups, ...] to target [B, T, Hkv * groups, ...]."""
    rows = rows.reshape(*rows.shape[:2], *target.shape[2:]).astype(target.dtype)
    return lax.dynamic_update_slice_in_dim(target, rows, chunk.span[2], axis=1)


def _forward(q, k, v, indptr, indices, values, *, sizes: Sizes):
    tokens = q.shape[1]
    sizes, chunks = _cut("forward", len(q), tokens, sizes)
    batch, whole, heads = len(q), _whole(tokens), q.shape[2]
    config, combine_config = config_for("forward", sizes.head_dim), combine_config_for(sizes)

    def attend(chunk, results):
        words, lse = forward(q, k, v, chunk, sizes, config)
        if combine_config is not None:
            return combine_entries(words, lse, chunk, results, sizes, combine_config)
        parts = packing.unpack_entries(words, chunk.scale)
        operands = chunk.value[:, None], chunk.filled[:, None], parts, lse
        found = combine_by_token(*(by_token(x, sizes) for x in operands))
        return tuple(_put(x, y, chunk) for x, y in zip(results, found, strict=True))

    by_head = batch, sizes.heads, whole, sizes.groups  # as the kernel writes lse
    lse = (batch, whole, heads) if combine_config is None else by_head
    empty = lax.empty((batch, whole, heads, sizes.head_dim), q.dtype), lax.empty(lse, jnp.float32)
    if combine_config is None:  # else it must not vary, see `hopper.launch`
        empty = vary_with(q, empty)
    pattern = indptr, indices, values
    scales = packing.scales(v, sizes.block_size)
    results = _for_chunks(chunks, pattern, sizes, whole, attend, empty, scales=scales)
    out, lse = vary_with(q, results)
    if combine_config is not None:
        lse = lse.swapaxes(1, 2).reshape(batch, whole, heads)
    return out[:, :tokens], lse[:, :tokens]


def _query_gradient(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dQ and the gradient of the values."""
    tokens = q.shape[1]
    sizes, chunks = _cut("query_gradient", len(q), tokens, sizes)
    config = config_for("query_gradient", sizes.head_dim)
    b, _, h = (x[..., None] for x in jnp.ogrid[: sizes.batch, :1, : sizes.heads])

    def differentiate(chunk, results):
        of_entries, bias_bar = query_gradient(q, k, v, out_bar, lse, delta, chunk, sizes, config)
        filled = chunk.filled[:, None]
        bias_bar = jnp.where(filled, bias_bar, 0)
        value_bar = jnp.sum(bias_bar, axis=1)
        of_entries = jnp.where(filled[..., None], of_entries.astype(jnp.float32), 0)
        value_bar, place, of_entries = (
            by_token(x, sizes) for x in (value_bar, chunk.place, of_entries)
        )
        q_bar, values_bar = results
        values_bar = values_bar.at[b, h, place].set(value_bar, mode="drop")
        return _put(q_bar, jnp.sum(of_entries, axis=3), chunk), values_bar

    whole = _whole(tokens)
    results = lax.empty((len(q), whole, *q.shape[2:]), q.dtype), jnp.zeros_like(values)
    pattern = indptr, indices, values
    results = vary_with(q, results)
    q_bar, values_bar = _for_chunks(chunks, pattern, sizes, whole, differentiate, results)
    return q_bar[:, :tokens], values_bar


def _key_gradients(q, k, v, indptr, indices, values, out_bar, lse, delta, *, sizes: Sizes):
    """dK and dV, [B, N, Hkv, D]."""
    sizes, chunks = _cut("key_gradients", len(q), q.shape[1], sizes)
    config = config_for("key_gradients", sizes.head_dim)

    def differentiate(i):
        first = jnp.reshape(i * sizes.chunk, 1)
        chunk = plan_chunks(first, indptr, indices, values, sizes).chunk(0)
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


def _attend_few(q, k, v, indptr, indices, values, *, sizes: Sizes):
    """As `_attend`, an entry being a piece of keys."""
    sizes = dataclasses.replace(sizes, batch=len(q), chunk=q.shape[1])
    if sizes.regular:  # The entries as they are: nothing that XLA would compute beforehand.
        value, indptr = values.reshape(*values.shape[:2], q.shape[1], sizes.capacity), None
    else:
        value = find_entries(jnp.zeros(1, jnp.int32), indptr, indices, values, sizes)[2][0]
    return attend_blocks(
        q, k, v, indptr, indices, values, value,
        num_keys=sizes.num_keys, num_blocks=sizes.num_blocks, block_size=sizes.block_size,
        scale=sizes.scale,
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
        blocks.row_capacity, tokens, scale, regular=blocks.regular,
    )  # fmt: skip
    q = q.reshape(batch, tokens, -1, head_dim)
    k, v = (shapes.pad(x, 1, 8) for x in (k, v))
    operands = q, k, v, blocks.indptr, blocks.indices, blocks.values
    many = functools.partial(_attend, sizes=sizes)
    few = shapes.batchable(functools.partial(_attend_few, sizes=sizes))
    out, lse = (shapes.differentiated_as(many, few) if takes(q) else many)(*operands)

    def unpad(x):
        x = x.reshape(batch, tokens, num_kv_heads, sizes.groups, *x.shape[3:])
        return x[:, :, :, :groups].reshape(batch, tokens, num_heads, *x.shape[4:])

    return unpad(out), unpad(lse)


def adds_up(q, k, tokens: int, capacity: int) -> bool:
    """Whether `add_up` takes queries and keys like these, so many tokens and entries of a query."""
    whole = [q.shape[1] % TOGETHER, tokens % TOGETHER, k.shape[1] % 8]
    if not q.size or not capacity or any(whole) or q.shape[2] // k.shape[2] not in (8, 16):
        return False
    sizes = Sizes(
        len(q), k.shape[2], q.shape[2] // k.shape[2], q.shape[3], k.shape[1], 64, 1, capacity,
        tokens, 1.0,
    )  # fmt: skip
    return combine_config_for(sizes) is not None


def add_up(
    out, q, k, v, blocks: BlockCSR, first, gate, added, value_scales, block_size, scale, heads
):
    """See `pallas_kernels.block_sparse_attention.add_up`."""
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads, tokens = k.shape[2], blocks.indptr.shape[2] - 1
    heads = heads or num_kv_heads
    sizes = Sizes(
        batch, heads, num_heads // num_kv_heads, head_dim, k.shape[1], block_size,
        blocks.num_columns, blocks.row_capacity, tokens, scale, regular=blocks.regular,
    )  # fmt: skip
    sizes, chunks = _cut("forward", batch, tokens, sizes, num_kv_heads)
    config, combine_config = config_for("forward", head_dim), combine_config_for(sizes)

    def by_head(gate):
        if gate is None:
            return None
        gate = gate.astype(jnp.float32).reshape(batch, tokens, num_kv_heads, sizes.groups)
        return gate.swapaxes(1, 2)

    gate, added = by_head(gate), tuple(Added(rows, by_head(each)) for rows, each in added)

    def attend(chunk, out):
        words, lse = forward(q, k, v, chunk, sizes, config)
        return combine_entries(
            words, lse, chunk, (out, None), sizes, combine_config, gate=gate, added=added
        )[0]

    def add_heads(i, out):
        pattern = (
            lax.dynamic_slice_in_dim(x, i * heads, heads, axis=1)
            for x in (blocks.indptr, blocks.indices, blocks.values)
        )
        return _for_chunks(
            chunks, tuple(pattern), sizes, tokens, attend, out,
            origin=first, first_head=i * heads, scales=value_scales,
        )  # fmt: skip

    return loop(num_kv_heads // heads, add_heads, out)


value_scales = packing.scales

__all__ = ["KERNELS", "add_up", "adds_up", "block_sparse_attention", "value_scales"]
