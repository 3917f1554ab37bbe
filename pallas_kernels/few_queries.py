"""Attention of few queries on Hopper GPUs, as in decoding: keys are cut into pieces.

A thread block of one warpgroup takes one query token with its heads and one piece of keys; XLA
joins the results (flash-decoding). So also one token's attention has work for many multiprocessors.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, shapes
from pallas_kernels.block_sparse_attention.entries import weigh
from pallas_kernels.hopper import HALF, LOG2E

FEW = 4  # query tokens of a sequence, at most


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What is static about a call."""

    tokens: int
    heads: int  # of keys and values
    groups: int
    pieces: int  # of each token and head
    length: int  # keys of a piece, a multiple of 64
    dim: int
    masks_values: bool  # whether hidden keys' values may be no numbers
    scale: float


class _Piece:
    """A thread block's work.

    `at` has the references: q, k, v, pieces (first key, first and last key seen), bias, out and lse
    in device memory; q_tile, k_tile, v_tile, bias_tile, out_tile and lse_tile in shared memory; and
    the barrier `ready`.
    """

    def __init__(self, sizes: _Sizes, at):
        self.sizes, self.at = sizes, at
        self.tiles = [pl.ds(n, HALF) for n in range(0, sizes.length, HALF)]

    def run(self):
        """Attention of one token to one piece."""
        at = self.at
        first, begin, end = (at.pieces[at.program, n] for n in range(3))
        low, high = jnp.maximum(begin - first, 0), jnp.minimum(end - first, self.sizes.length)
        pl.when(low < high)(lambda: self._attend(first, low, high))
        pl.when(low >= high)(lambda: self._store(hopper.full((HALF,), -jnp.inf, hopper.ROW)))

    def _attend(self, first, low, high):
        at, sizes = self.at, self.sizes
        self._load(first)
        logits = hopper.scores(at.q_tile, at.k_tile, None, None, scale=sizes.scale)
        logits = hopper.keep(logits, 1, low, high)
        if at.bias is not None:
            bias = plgpu.load(at.bias_tile, layout=hopper.COLUMN)
            bias = hopper.along_columns(bias, logits.shape)
            logits = jnp.where(bias > -jnp.inf, logits + bias * LOG2E, -jnp.inf)
        if sizes.masks_values:
            self._mask_values(low, high)
        top = jnp.maximum(logits.max(axis=1), hopper.LOWEST)
        weights = jnp.exp2(logits - hopper.along_rows(top, logits.shape))
        total = weights.sum(axis=1)
        shape = HALF, sizes.dim
        acc = hopper.multiply(weights.astype(at.v.dtype), at.v_tile, shape)
        at.out_tile[...] = acc * hopper.along_rows(1 / total, shape)
        self._store(top * (1 / LOG2E) + jnp.log(total))
        rows = pl.ds(0, sizes.groups)
        plgpu.copy_smem_to_gmem(at.out_tile.at[rows], at.out.at[at.program])
        plgpu.wait_smem_to_gmem(0)

    def _load(self, first):
        at, sizes = self.at, self.sizes
        query = lax.div(at.program, sizes.pieces)
        row, t = lax.div(query, sizes.tokens), lax.rem(query, sizes.tokens)
        b, h = lax.div(row, sizes.heads), lax.rem(row, sizes.heads)
        heads = pl.ds(pl.multiple_of(h * sizes.groups, 8), sizes.groups)
        q_rows = at.q_tile.at[pl.ds(0, sizes.groups)]
        plgpu.copy_gmem_to_smem(at.q.at[b, t, heads], q_rows, at.ready)
        keys = pl.ds(pl.multiple_of(first, 8), sizes.length)
        plgpu.copy_gmem_to_smem(at.k.at[b, keys, h], at.k_tile, at.ready)
        plgpu.copy_gmem_to_smem(at.v.at[b, keys, h], at.v_tile, at.ready)
        if at.bias is not None:
            plgpu.copy_gmem_to_smem(at.bias.at[b, h, keys], at.bias_tile, at.ready)
        plgpu.barrier_wait(at.ready)

    def _mask_values(self, low, high):
        """Zeros for the values of hidden keys: 0 * NaN is no zero."""
        at = self.at
        for n, tile in enumerate(self.tiles):
            values = plgpu.load(at.v_tile.at[tile], layout=plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
            values = jnp.where(key >= low - n * HALF, values, 0)
            values = jnp.where(key < high - n * HALF, values, 0)
            if at.bias is not None:
                bias = plgpu.load(at.bias_tile.at[tile], layout=hopper.ROW)
                values = jnp.where(hopper.along_rows(bias, values.shape) > -jnp.inf, values, 0)
            at.v_tile[tile] = values
        plgpu.commit_smem()

    def _store(self, lse):
        at = self.at
        at.lse_tile[...] = lse
        plgpu.commit_smem()
        rows = pl.ds(0, self.sizes.groups)
        plgpu.copy_smem_to_gmem(at.lse_tile.at[rows], at.lse.at[at.program])
        plgpu.wait_smem_to_gmem(0)


def takes(q) -> bool:
    """Whether q [B, T, Hq, D] are few queries."""
    return q.shape[1] <= FEW


def differentiated_as(general: Callable, few: Callable) -> Callable:
    """A function that `few` computes, and `general` where it is differentiated."""

    @jax.custom_vjp
    def compute(*operands):
        return few(*operands)

    compute.defvjp(lambda *operands: jax.vjp(general, *operands), lambda vjp, bars: vjp(bars))
    return compute


def attend_pieces(q, k, v, pieces, value, key_bias, *, length, scale, masks_values):
    """Attention of each query token to the pieces of keys that are its own.

    Args:
      q: [B, T, Hkv * G, D], G up to 16.
      k: [B, N, Hkv, D], N a multiple of 8.
      v: [B, N, Hkv, D].
      pieces: int32 [B, Hkv, T, P, 3]: the first key of a piece, a multiple of 8, and the first key
        that is seen and the one after the last; others of its `length` keys are hidden.
      value: f32 [B, Hkv, T, P], the bias of a piece; or None.
      key_bias: f32 [B, Hkv, N], of each key; or None.
      length: keys of a piece, a multiple of 64.
      scale: of the logits.
      masks_values: whether hidden keys of pieces with others may hold no numbers.

    Returns:
      out, like q, and lse, f32 [B, T, Hkv * G].
    """
    batch, tokens, num_heads, dim = q.shape
    heads, count = k.shape[2], pieces.shape[3]
    own = num_heads // heads
    rows_of_heads = shapes.pad(q.reshape(batch, tokens, heads, own, dim), 3, 8 if own <= 8 else 16)
    groups = rows_of_heads.shape[3]
    sizes = _Sizes(tokens, heads, groups, count, length, dim, masks_values, scale)
    rows = batch * heads * tokens * count
    keys = hopper.operand_tile((length, dim))
    results = hopper.launch(
        "attend_pieces",
        lambda at: _Piece(sizes, at).run(),
        programs=rows,
        warpgroups=1,
        operands={
            "q": rows_of_heads.reshape(batch, tokens, heads * groups, dim), "k": k, "v": v,
            "pieces": pieces.reshape(rows, 3), "bias": key_bias,
        },
        outputs={
            "out": jax.ShapeDtypeStruct((rows, groups, dim), jnp.float32),
            "lse": jax.ShapeDtypeStruct((rows, groups), jnp.float32),
        },
        scratch={
            "q_tile": hopper.operand_tile((HALF, dim)),
            "k_tile": keys,
            "v_tile": keys,
            "bias_tile": None if key_bias is None else plgpu.SMEM((length,), jnp.float32),
            "out_tile": plgpu.SMEM((HALF, dim), jnp.float32),
            "lse_tile": plgpu.SMEM((HALF,), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=3 + (key_bias is not None)),
        },
    )  # fmt: skip
    shape = batch, heads, tokens, count, groups
    out = results["out"].reshape(*shape, dim)[..., :own, :]
    lse = results["lse"].reshape(shape)[..., :own]
    if value is not None:
        lse = lse + value[..., None]
    seen = lse > -jnp.inf
    weights, total, lse = weigh(lse, seen, axis=3)
    out = jnp.sum(jnp.where(seen[..., None], weights[..., None] * out, 0), axis=3)
    out, lse = (x.swapaxes(1, 2) for x in (out / total[..., None], lse))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])
