"""Attention to selected key blocks in plain JAX, key-major, with memory linear in T and N.

Queries are taken in chunks. In a chunk the entries of the pattern are sorted by block, and each
block's entries are cut into tiles of a fixed number of rows: a tile gathers its query rows and
one block of keys, so that a block is read once per tile instead of once per query. A tile's
normalised partial results are written per entry, then combined per query in a fixed order. This
is the scheme of MoBA (arXiv:2502.13189) and FSA (arXiv:2508.18224).

Strict causality: the sort is stable, so a query's place in its tile depends on earlier queries
only, and every shape is static; what later queries choose moves whole tiles at most.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.block_sparse_attention.entries import (
    Entries,
    Sizes,
    by_token,
    combine,
    join_chunks,
    sort_entries,
)
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_with

# Floats of the partial results of a chunk: as many as q has, within these bounds.
_MIN_PARTIALS = 2**27
_MAX_PARTIALS = 2**29
# Logits of a step, which works on many tiles at once: they fit a CPU's cache, and are few launches
# elsewhere.
_LOGITS_PER_STEP = {"cpu": 2**20}
_LOGITS_PER_STEP_ELSEWHERE = 2**24
_MAX_TILE_ROWS = 64
_MIN_TILE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class _Shapes(Sizes):
    """All that is static: also the sizes of a tile and of a step."""

    tile_rows: int
    step_tiles: int
    max_tiles: int


class _Chunk(NamedTuple):
    """A chunk's entries, cut into tiles."""

    entries: Entries
    tile_starts: jax.Array  # [columns + 1] first tile of each column
    tile_columns: jax.Array  # [max_tiles] column of each tile; `columns` past the last


class _Tiles(NamedTuple):
    """The tiles of one step, P of them with R rows each."""

    column: jax.Array  # [P]
    entry: jax.Array  # [P, R], distinct; out of bounds if empty
    filled: jax.Array  # [P, R]


def _plan_shapes(q, k, blocks: BlockCSR, block_size, scale) -> _Shapes:
    batch, tokens, num_heads, head_dim = q.shape
    heads = k.shape[2]
    capacity = blocks.row_capacity
    partials = min(max(_MIN_PARTIALS, q.size), _MAX_PARTIALS)
    most = max(1, partials // (batch * num_heads * head_dim * capacity))
    chunk = math.ceil(tokens / math.ceil(tokens / most))
    entries = chunk * capacity
    # Rows of a tile: the entries of an average column, so that few rows stay empty.
    mean = math.ceil(entries / blocks.num_columns)
    rows = min(max(mean, _MIN_TILE_ROWS), _MAX_TILE_ROWS, chunk)
    rows = 1 << (rows - 1).bit_length()
    groups = num_heads // heads
    tiles = batch * heads * (entries // rows + min(blocks.num_columns, entries))
    logits = _LOGITS_PER_STEP.get(jax.default_backend(), _LOGITS_PER_STEP_ELSEWHERE)
    step = min(max(1, logits // (rows * groups * block_size)), tiles)
    return _Shapes(
        batch, heads, groups, head_dim, k.shape[1], block_size, blocks.num_columns, capacity,
        chunk, scale, rows, step, max_tiles=math.ceil(tiles / step) * step,
    )  # fmt: skip


def _einsum(subscripts, a, b, dtype):
    precision = None if a.dtype == jnp.bfloat16 else "highest"
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=dtype)


def _slice(x, chunk_index, shapes):
    """The chunk's part of an array [B, tokens, ...] that `_pad` made whole chunks of."""
    return jax.lax.dynamic_slice_in_dim(x, chunk_index * shapes.chunk, shapes.chunk, axis=1)


def _pad(x, shapes):
    """Pads the token axis, 1, to whole chunks."""
    missing = -x.shape[1] % shapes.chunk
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _group(x, shapes):
    """[B, tokens, Hq, ...] -> [B, tokens, Hkv, G, ...], padded to whole chunks."""
    x = x.reshape(*x.shape[:2], shapes.heads, shapes.groups, *x.shape[3:])
    return _pad(x, shapes)


def _plan_chunk(chunk_index, indptr, indices, values, shapes: _Shapes) -> _Chunk:
    entries = sort_entries(
        jnp.reshape(chunk_index * shapes.chunk, 1), indptr, indices, values, shapes
    )
    tiles = (jnp.diff(entries.starts) + shapes.tile_rows - 1) // shapes.tile_rows
    tile_starts = jnp.pad(jnp.cumsum(tiles, dtype=jnp.int32), (1, 0))
    tile = jnp.arange(shapes.max_tiles, dtype=jnp.int32)
    tile_columns = jnp.searchsorted(tile_starts, tile, side="right").astype(jnp.int32) - 1
    return _Chunk(entries, tile_starts, tile_columns)


def _take_tiles(step, chunk: _Chunk, shapes: _Shapes) -> _Tiles:
    first = step * shapes.step_tiles
    tile = first + jnp.arange(shapes.step_tiles, dtype=jnp.int32)
    column = jax.lax.dynamic_slice_in_dim(chunk.tile_columns, first, shapes.step_tiles)
    # Tiles past the last start where all columns end, and are empty.
    end = chunk.entries.starts[jnp.minimum(column + 1, shapes.columns)]
    sorted_place = (
        chunk.entries.starts[column] + (tile - chunk.tile_starts[column]) * shapes.tile_rows
    )
    row = jnp.arange(shapes.tile_rows, dtype=jnp.int32)
    sorted_place = sorted_place[:, None] + row
    filled = sorted_place < end[:, None]
    nowhere = jnp.arange(filled.size, dtype=jnp.int32).reshape(filled.shape) + shapes.entries
    entry = chunk.entries.order.at[sorted_place].get(mode="fill", fill_value=0)
    return _Tiles(column, jnp.where(filled, entry, nowhere), filled)


def _walk(chunk: _Chunk, shapes: _Shapes, body, carry):
    """Runs `body(tiles, carry)` over all tiles of a chunk, `step_tiles` at a time."""
    steps = (chunk.tile_starts[-1] + shapes.step_tiles - 1) // shapes.step_tiles
    carry = vary_with(steps, carry)
    return jax.lax.fori_loop(
        0, steps, lambda i, carry: body(_take_tiles(i, chunk, shapes), carry), carry
    )


def _gather_rows(x, tiles: _Tiles, shapes: _Shapes):
    """Rows of the tiles from a chunk [B, chunk, Hkv, G, ...] -> [P, R * G, ...]; zeros if empty."""
    row = tiles.entry // shapes.capacity
    t, bh = row % shapes.chunk, row // shapes.chunk
    x = x.at[bh // shapes.heads, t, bh % shapes.heads].get(mode="fill", fill_value=0)
    return x.reshape(shapes.step_tiles, shapes.tile_rows * shapes.groups, *x.shape[3:])


def _column_index(tiles: _Tiles, shapes: _Shapes):
    """(batch element, KV head, block), [P] each; the batch element is out of bounds if empty."""
    bh, block = tiles.column // shapes.num_blocks, tiles.column % shapes.num_blocks
    return bh // shapes.heads, bh % shapes.heads, block


def _gather_keys(x, tiles: _Tiles, shapes: _Shapes):
    """The tiles' blocks of [B, N, Hkv, D] -> [P, S, D]; zeros where there is no key."""
    b, h, block = _column_index(tiles, shapes)
    key = block[:, None] * shapes.block_size + jnp.arange(shapes.block_size)
    return x.at[b[:, None], key, h[:, None]].get(mode="fill", fill_value=0)


def _logits(q, k, tiles: _Tiles, shapes: _Shapes, dtype):
    logits = _einsum("pmd,psd->pms", q, k, dtype) * jnp.asarray(shapes.scale, dtype)
    if shapes.num_keys % shapes.block_size == 0:
        return logits
    block = tiles.column % shapes.num_blocks
    key = block[:, None] * shapes.block_size + jnp.arange(shapes.block_size)
    return jnp.where((key < shapes.num_keys)[:, None], logits, -jnp.inf)


def _scatter_entries(partials, tiles: _Tiles, update):
    return partials.at[tiles.entry].set(update, mode="drop", unique_indices=True)


def block_sparse_attention(q, k, v, blocks: BlockCSR, block_size, scale):
    """See `pallas_kernels.block_sparse_attention.block_sparse_attention`."""
    if 0 in (q.size, k.size, blocks.indices.size, blocks.row_capacity):
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.promote_types(jnp.float32, q.dtype))
        return jnp.zeros_like(q), lse
    shapes = _plan_shapes(q, k, blocks, block_size, scale)
    return _attend(q, k, v, blocks.indptr, blocks.indices, blocks.values, shapes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, indptr, indices, values, shapes: _Shapes):
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    grouped = _group(q, shapes)

    def attend_chunk(_, i):
        chunk = _plan_chunk(i, indptr, indices, values, shapes)
        q_chunk = _slice(grouped, i, shapes)

        def attend_tiles(tiles, carry):
            keys, payload = (_gather_keys(x, tiles, shapes) for x in (k, v))
            logits = _logits(_gather_rows(q_chunk, tiles, shapes), keys, tiles, shapes, dtype)
            top = jnp.max(logits, axis=-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _einsum("pms,psd->pmd", weights.astype(v.dtype), payload, dtype) / total
            per_entry = (shapes.step_tiles, shapes.tile_rows, shapes.groups)
            return (
                _scatter_entries(carry[0], tiles, out.reshape(*per_entry, shapes.head_dim)),
                _scatter_entries(carry[1], tiles, (top + jnp.log(total)).reshape(per_entry)),
            )

        partials = (
            jnp.zeros((shapes.entries, shapes.groups, shapes.head_dim), dtype),
            jnp.zeros((shapes.entries, shapes.groups), dtype),
        )
        partials = _walk(chunk, shapes, attend_tiles, partials)
        out, lse = combine(chunk.entries.value[0], chunk.entries.filled[0], *partials, shapes)
        return None, (out.astype(q.dtype), lse)

    _, (out, lse) = jax.lax.scan(attend_chunk, None, jnp.arange(grouped.shape[1] // shapes.chunk))
    return join_chunks(out, q.shape[1]), join_chunks(lse, q.shape[1])


def _attend_fwd(q, k, v, indptr, indices, values, shapes):
    results = _attend(q, k, v, indptr, indices, values, shapes)
    out, lse = checkpoint_name(results, "block_sparse_attention")
    return (out, lse), (q, k, v, indptr, indices, values, out, lse)


def _tile_gradients(tiles, rows, value, k, v, shapes: _Shapes, dtype):
    """Gradients of the queries [P, R*G, D], of the entries' values [P, R], of K and V [P, S, D].

    `rows` are the chunk's queries, their lse, the cotangent of their output, and delta.
    """
    q, lse, out_bar, delta = (_gather_rows(x, tiles, shapes) for x in rows)
    keys, payload = (_gather_keys(x, tiles, shapes) for x in (k, v))
    value = value.ravel().at[tiles.entry].get(mode="fill", fill_value=0)
    shift = jnp.repeat(value, shapes.groups, axis=1) - lse
    logits = _logits(q, keys, tiles, shapes, dtype)
    filled = jnp.repeat(tiles.filled, shapes.groups, axis=1)[..., None]
    weights = jnp.where(filled, jnp.exp(logits + shift[..., None]), 0)
    weights_bar = _einsum("pmd,psd->pms", out_bar, payload, dtype)
    logits_bar = weights * (weights_bar - delta[..., None])
    value_bar = jnp.sum(logits_bar.reshape(*tiles.filled.shape, -1), axis=-1)
    payload_bar = _einsum("pms,pmd->psd", weights.astype(out_bar.dtype), out_bar, dtype)
    logits_bar = (logits_bar * jnp.asarray(shapes.scale, dtype)).astype(q.dtype)
    q_bar = _einsum("pms,psd->pmd", logits_bar, keys, dtype)
    keys_bar = _einsum("pms,pmd->psd", logits_bar, q, dtype)
    return q_bar, value_bar, keys_bar, payload_bar


def _attend_bwd(shapes: _Shapes, residuals, cotangents):
    q, k, v, indptr, indices, values, out, lse = residuals
    out_bar, lse_bar = cotangents
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    # d lse / d logits is the softmax itself, so lse_bar acts as a shift of delta.
    delta = jnp.sum(out_bar.astype(dtype) * out.astype(dtype), axis=-1) - lse_bar
    grouped = [_group(x, shapes) for x in (q, lse, out_bar, delta)]
    b, h = (x[..., None, None] for x in jnp.ogrid[: shapes.batch, : shapes.heads])

    def chunk_gradients(carry, i):
        chunk = _plan_chunk(i, indptr, indices, values, shapes)
        rows = [_slice(x, i, shapes) for x in grouped]

        def add_tiles(tiles, carry):
            q_bar, value_bar, k_bar, v_bar = carry
            of_q, of_value, of_keys, of_payload = _tile_gradients(
                tiles, rows, chunk.entries.value, k, v, shapes, dtype
            )
            per_entry = (shapes.step_tiles, shapes.tile_rows, shapes.groups, shapes.head_dim)
            batch, head, block = _column_index(tiles, shapes)
            return (
                _scatter_entries(q_bar, tiles, of_q.reshape(per_entry)),
                _scatter_entries(value_bar, tiles, of_value),
                k_bar.at[batch, block, :, head].add(of_keys, mode="drop"),
                v_bar.at[batch, block, :, head].add(of_payload, mode="drop"),
            )

        k_bar, v_bar, values_bar = carry
        q_bar, value_bar, k_bar, v_bar = _walk(
            chunk,
            shapes,
            add_tiles,
            (
                jnp.zeros((shapes.entries, shapes.groups, shapes.head_dim), dtype),
                jnp.zeros((shapes.entries,), dtype),
                k_bar,
                v_bar,
            ),
        )
        q_bar = jnp.sum(by_token(q_bar, shapes), axis=3)
        value_bar = value_bar.reshape(chunk.entries.value.shape[1:]).astype(values.dtype)
        # Each entry belongs to one row, so adding to zero is writing.
        values_bar = values_bar.at[b, h, chunk.entries.place[0]].add(value_bar, mode="drop")
        return (k_bar, v_bar, values_bar), q_bar.astype(q.dtype)

    padded = (shapes.batch, shapes.num_blocks, shapes.block_size, shapes.heads, shapes.head_dim)
    zeros = jnp.zeros(padded, dtype), jnp.zeros(padded, dtype), jnp.zeros_like(values)
    chunks = jnp.arange(grouped[0].shape[1] // shapes.chunk)
    bars, q_bar = jax.lax.scan(chunk_gradients, vary_with(k, zeros), chunks)
    k_bar, v_bar, values_bar = bars
    k_bar, v_bar = (
        x.reshape(shapes.batch, -1, *k.shape[2:])[:, : shapes.num_keys].astype(k.dtype)
        for x in (k_bar, v_bar)
    )
    return join_chunks(q_bar, q.shape[1]), k_bar, v_bar, None, None, values_bar


_attend.defvjp(_attend_fwd, _attend_bwd)
