"""Gradients of the scores of selected blocks, by entries sorted by block.

The work grows with the selected blocks, T x K, where a dense product with all blocks grows with
T x N / S. Nothing is added in an order that could change.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mesh_axes import zeros_like
from pallas_kernels.segments import choose_rows, cut_runs, first_places, sum_runs

_TILE = 64  # entries
_MAX_ENTRIES = 2**25  # at a time


def select_bwd(count: int, residuals, cotangents):
    """Gradients of u and c, the same for whatever implementation found `index`.

    Args:
      count: K.
      residuals: u [B, T, Hkv, d], c [B, Nb, Hkv, d] and index int32 [B, T, Hkv, K].
      cotangents: of the index, which has none, and of the score, f32 [B, T, Hkv, K].
    """
    u, c, index = residuals
    score_bar = jnp.where(index < 0, 0, cotangents[1])
    batch, tokens, heads, _ = u.shape
    chunks = -(-batch * tokens * heads * count // _MAX_ENTRIES)
    size = -(-tokens // chunks)

    def split(x, fill=0):
        missing = [(0, 0), (0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, missing, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)

    def add(c_bar, operands):
        u, index, score_bar = operands
        more = _block_gradient(u, index, score_bar, c.shape[1])
        return c_bar + more, _query_gradient(c, index, score_bar).astype(u.dtype)

    operands = split(u), split(index, fill=-1), split(score_bar)
    c_bar, u_bar = lax.scan(add, zeros_like(c, score_bar.dtype), operands)
    u_bar = jnp.moveaxis(u_bar, 0, 1).reshape(batch, -1, *u.shape[2:])[:, :tokens]
    return u_bar, c_bar.astype(c.dtype), None, None


def _tokens_last(x):
    """[B, T, Hkv, K] -> [K, B, Hkv, T], whose elements a TPU has side by side.

    To lay those of [..., K] end to end, XLA makes code of its own for each register of them, which
    takes minutes to compile.
    """
    return x.transpose(3, 0, 2, 1)


def _query_gradient(c, index, score_bar):
    """[B, T, Hkv, d] in score_bar's type."""
    index, score_bar = _tokens_last(index), _tokens_last(score_bar)
    b, h, _ = jnp.ogrid[: c.shape[0], : c.shape[2], :1]
    # A block that nobody selected may hold anything.
    block = jnp.where(index < 0, c.shape[1], index)
    chosen = c.at[b, block, h].get(mode="fill", fill_value=0)
    total = jnp.sum(score_bar[..., None] * chosen.astype(score_bar.dtype), axis=0)
    return total.swapaxes(1, 2)


def _block_gradient(u, index, score_bar, num_blocks):
    """[B, Nb, Hkv, d] in score_bar's type.

    Tiles of entries that chose the same block are summed first, then the tiles of a block.
    """
    batch, tokens, heads, dim = u.shape
    columns = batch * heads * num_blocks
    index, score_bar = _tokens_last(index), _tokens_last(score_bar)
    head = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    column = jnp.where(index < 0, columns, head * num_blocks + index).ravel()
    order = jnp.argsort(column, stable=True).astype(jnp.int32)
    tiles = cut_runs(first_places(column[order], columns), column.size, _TILE)

    entry = order.at[tiles.place].get(mode="clip")
    weight = jnp.where(tiles.inside, score_bar.ravel()[entry], 0)
    head, token = entry // tokens % (batch * heads), entry % tokens
    row = (head // heads * tokens + token) * heads + head % heads
    row = jnp.where(tiles.inside, row, u.size // dim)
    rows = u.reshape(-1, dim).at[row].get(mode="fill", fill_value=0)
    sums = sum_runs(tiles.run, jnp.sum(weight[..., None] * rows.astype(weight.dtype), axis=1))
    ends = tiles.starts[1:]
    sums = choose_rows(ends > tiles.starts[:-1], sums[ends - 1], 0)
    return jnp.moveaxis(sums.reshape(batch, heads, num_blocks, dim), 1, 2)
