"""Selection of the best blocks in plain JAX: chunks of queries, memory linear in T and in Nb."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import shapes
from pallas_kernels.block_selection import two_levels
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
        score, index = _top(jnp.where(allowed[:, :, None, :], scores, -jnp.inf), count)
        return None, (jnp.where(score == -jnp.inf, -1, index), score)

    operands = _split(u, rows), _split(limit, rows), _split(start, rows)
    _, (index, score) = jax.lax.scan(chunk, None, operands)
    return _join(index, u.shape[1]), _join(score, u.shape[1])


def _top(scores, count):
    """(score, index) of the best of a row."""
    # top_k orders -0 below +0, but they are a tie: the lower index wins.
    return jax.lax.top_k(jnp.where(scores == 0, 0, scores), count)


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


def best_of_nodes(u, c, expanded, limit, start, count, node_size):
    """index int32 and score [B, T, Hkv, K] of the best blocks of each query's expanded nodes.

    The features of their blocks are gathered, for as many queries at a time as fit in the budget.

    Args:
      u: [B, T, Hkv, d].
      c: [B, Nb, Hkv, d].
      expanded: int32 [B, T, Hkv, E], ascending nodes, then -1.
      limit: int32 [B, T], at most Nb.
      start: int32 [B, T], at least 0.
      count: K.
      node_size: blocks of a node.
    """
    batch, tokens, heads, dim = u.shape
    candidates = expanded.shape[3] * node_size
    found = min(count, candidates)
    rows = _rows_per_chunk(u, candidates * dim)
    by_node = shapes.pad(c, 1, node_size).reshape(batch, -1, node_size, heads, dim)
    b, _, h, _ = jnp.ix_(*map(jnp.arange, (batch, rows, heads, 1)))

    def chunk(_, operands):
        u, expanded, limit, start = operands
        features = by_node[b, jnp.maximum(expanded, 0), :, h]
        scores = _einsum("bthd,bthesd->bthes", u, features)
        block = expanded[..., None] * node_size + jnp.arange(node_size, dtype=jnp.int32)
        limit, start = (x[:, :, None, None, None] for x in (limit, start))
        scores = jnp.where((start <= block) & (block < limit), scores, -jnp.inf)
        # Nodes ascend, so of equal scores the first is that of the lower block.
        score, place = _top(scores.reshape(*u.shape[:3], candidates), found)
        index = jnp.take_along_axis(block.reshape(*u.shape[:3], candidates), place, axis=3)
        return None, (jnp.where(score == -jnp.inf, -1, index), score)

    operands = _split(u, rows), _split(expanded, rows), _split(limit, rows), _split(start, rows)
    _, (index, score) = jax.lax.scan(chunk, None, operands)
    missing = [(0, 0)] * 3 + [(0, count - found)]
    return (
        jnp.pad(_join(index, tokens), missing, constant_values=-1),
        jnp.pad(_join(score, tokens), missing, constant_values=-jnp.inf),
    )


select_blocks_in_nodes = functools.partial(
    two_levels.select, two_levels.Levels(select_blocks, best_of_nodes)
)
