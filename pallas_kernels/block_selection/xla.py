"""Selection of the best blocks in plain JAX: chunks of queries, memory linear in T and in Nb."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mesh_axes import zeros_like

# Floats held at a time, unless _MIN_ROWS rows already need more.
_FLOATS_PER_CHUNK = 2**25
_MIN_ROWS = 16


def _accumulator(x):
    return jnp.promote_types(jnp.float32, x.dtype)


def _einsum(subscripts, a, b):
    dtype = _accumulator(a)
    precision = None if a.dtype == jnp.bfloat16 else "highest"
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=dtype)


def _rows_per_chunk(u, floats_per_row):
    """Query tokens of a chunk: within the budget, and so that chunks are of nearly equal size."""
    batch, tokens, heads, _ = u.shape
    most = max(_MIN_ROWS, _FLOATS_PER_CHUNK // (batch * heads * floats_per_row))
    return math.ceil(tokens / math.ceil(tokens / most))


def _split(x, rows, fill=0):
    """[B, T, ...] -> [chunks, B, rows, ...], padded with `fill`."""
    batch, tokens = x.shape[:2]
    chunks = math.ceil(tokens / rows)
    missing = [(0, 0), (0, chunks * rows - tokens)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, missing, constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, chunks, rows, *x.shape[2:]), 1, 0)


def _join(x, tokens):
    """The inverse of `_split`."""
    chunks, batch, rows = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, chunks * rows, *x.shape[3:])[:, :tokens]


def select_blocks(u, c, limit, start, count):
    """See `pallas_kernels.block_selection.select_blocks`; `limit` and `start` are int32 [B, T]."""
    batch, tokens, heads, _ = u.shape
    num_blocks = c.shape[1]
    found = min(count, num_blocks)
    if 0 in (batch, tokens, heads, found):
        shape = (batch, tokens, heads, count)
        return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, _accumulator(u))
    index, score = _select(u, c, limit, start, found)
    missing = [(0, 0)] * 3 + [(0, count - found)]
    return (
        jnp.pad(index, missing, constant_values=-1),
        jnp.pad(score, missing, constant_values=-jnp.inf),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _select(u, c, limit, start, count):
    rows = _rows_per_chunk(u, c.shape[1])
    block = jnp.arange(c.shape[1], dtype=jnp.int32)

    def chunk(_, operands):
        u, limit, start = operands
        scores = _einsum("bthd,bnhd->bthn", u, c)
        allowed = (start[..., None] <= block) & (block < limit[..., None])
        scores = jnp.where(allowed[:, :, None, :], scores, -jnp.inf)
        # top_k orders -0 below +0, but they are a tie: the lower index wins.
        scores = jnp.where(scores == 0, 0, scores)
        score, index = jax.lax.top_k(scores, count)
        return None, (jnp.where(score == -jnp.inf, -1, index), score)

    operands = _split(u, rows), _split(limit, rows), _split(start, rows)
    _, (index, score) = jax.lax.scan(chunk, None, operands)
    return _join(index, u.shape[1]), _join(score, u.shape[1])


def _select_fwd(u, c, limit, start, count):
    results = _select(u, c, limit, start, count)
    index, score = checkpoint_name(results, "block_selection")
    return (index, score), (u, c, index)


def _places(index, num_blocks):
    """Distinct places of a row's entries; those of missing ones (-1) are dropped: past the end."""
    nowhere = num_blocks + jnp.arange(index.shape[-1], dtype=index.dtype)
    return jnp.where(index < 0, nowhere, index)


def select_bwd(count, residuals, cotangents):
    """Gradients of u and c from (u, c, index), for any implementation that finds `index`."""
    u, c, index = residuals
    score_bar = jnp.where(index < 0, 0, cotangents[1])
    batch, tokens, heads, dim = u.shape
    num_blocks = c.shape[1]
    rows = _rows_per_chunk(u, max(num_blocks, count * dim))
    b, t, h, _ = jnp.ix_(*map(jnp.arange, (batch, rows, heads, count)))

    def chunk(c_bar, operands):
        u, index, score_bar = operands
        block = _places(index, num_blocks)
        # A block that nobody selected may hold anything, so c is gathered, never multiplied by 0.
        chosen = c.at[b, block, h].get(mode="fill", fill_value=0)
        u_bar = _einsum("bthk,bthkd->bthd", score_bar.astype(c.dtype), chosen)
        # The indices of a row are distinct: a dense array and one product instead of adding
        # into shared rows of c_bar, so the result does not depend on the order of additions.
        dense = jnp.zeros((batch, rows, heads, num_blocks), u.dtype)
        dense = dense.at[b, t, h, block].set(
            score_bar.astype(u.dtype), mode="drop", unique_indices=True
        )
        return c_bar + _einsum("bthn,bthd->bnhd", dense, u), u_bar.astype(u.dtype)

    operands = _split(u, rows), _split(index, rows, fill=-1), _split(score_bar, rows)
    c_bar, u_bar = jax.lax.scan(chunk, zeros_like(c, _accumulator(c)), operands)
    return _join(u_bar, tokens), c_bar.astype(c.dtype), None, None


_select.defvjp(_select_fwd, select_bwd)
