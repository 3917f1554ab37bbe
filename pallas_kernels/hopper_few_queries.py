"""Attention of few queries on Hopper GPUs, as in decoding: keys are cut into pieces.

A thread block of one warpgroup takes one query token with its heads and one piece of keys; XLA
joins the results (flash-decoding). So also one token's attention has work for many multiprocessors.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, shapes
from pallas_kernels.hopper import HALF, LOG2E

FEW = 4  # query tokens of a sequence, at most
_RANGE_PIECE = HALF  # keys of a piece of a range
_JOINED = 16  # pieces at a time


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What is static about a call."""

    tokens: int
    heads: int  # of keys and values
    groups: int
    dim: int
    num_keys: int
    pieces: int  # of each token and head
    piece_keys: int  # of each, at most
    scale: float
    num_blocks: int = 0


class _Piece:
    """A thread block's work.

    `at` has the references: q, k, v, bias, out, lse, and either indptr, indices and values or span,
    in device memory; q_tile, k_tile, v_tile, bias_tile, out_tile and lse_tile in shared
    memory; and the barrier `ready`.
    """

    def __init__(self, sizes: _Sizes, at):
        self.sizes, self.at = sizes, at
        query, self.piece = lax.div(at.program, sizes.pieces), lax.rem(at.program, sizes.pieces)
        row, self.t = lax.div(query, sizes.tokens), lax.rem(query, sizes.tokens)
        self.b, self.h = lax.div(row, sizes.heads), lax.rem(row, sizes.heads)

    def run(self):
        """Attention of one token to one piece."""
        first, low, high = self._bounds()
        pl.when(low < high)(lambda: self._attend(first, low, high))
        pl.when(low >= high)(lambda: self._store(hopper.full((HALF,), -jnp.inf, hopper.ROW)))

    def _bounds(self):
        """The piece's first key, and of its keys the first seen and the one after the last."""
        at, sizes = self.at, self.sizes
        if at.indices is not None:
            head, entries = self.b * sizes.heads + self.h, at.indices.shape[1]
            if at.indptr is None:
                place, end = self.t * sizes.pieces + self.piece, entries
            else:
                row = head * (sizes.tokens + 1) + self.t
                place, end = at.indptr[row] + self.piece, at.indptr[row + 1]
            inside = place < jnp.minimum(end, entries)
            place = jnp.minimum(place, entries - 1)
            block, value = (x[head, place] for x in (at.indices, at.values))
            seen = inside & (block >= 0) & (block < sizes.num_blocks) & (value > -jnp.inf)
            first = jnp.where(seen, block, 0) * sizes.piece_keys
            last = jnp.minimum(sizes.num_keys - first, sizes.piece_keys)
            return first, jnp.int32(0), jnp.where(seen, last, 0)
        row = self.b * self.sizes.tokens + self.t
        start, end = jnp.maximum(at.span[0, row], 0), jnp.minimum(at.span[1, row], sizes.num_keys)
        # TMA copies from multiples of 8 keys on.
        first = lax.div(start, 8) * 8 + self.piece * sizes.piece_keys
        return first, jnp.maximum(start - first, 0), jnp.minimum(end - first, sizes.piece_keys)

    def _attend(self, first, low, high):
        at, sizes = self.at, self.sizes
        self._load(first)
        logits = hopper.scores(at.q_tile, at.k_tile, None, None, scale=sizes.scale)
        logits = hopper.keep(logits, 1, low, high)
        if at.bias is not None:
            bias = plgpu.load(at.bias_tile, layout=hopper.COLUMN)
            bias = hopper.along_columns(bias, logits.shape)
            logits = jnp.where(bias > -jnp.inf, logits + bias * LOG2E, -jnp.inf)
        if at.indices is None:
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
        at, sizes, b, h = self.at, self.sizes, self.b, self.h
        heads = pl.ds(pl.multiple_of(h * sizes.groups, 8), sizes.groups)
        q_rows = at.q_tile.at[pl.ds(0, sizes.groups)]
        plgpu.copy_gmem_to_smem(at.q.at[b, self.t, heads], q_rows, at.ready)
        keys = pl.ds(pl.multiple_of(first, 8), sizes.piece_keys)
        plgpu.copy_gmem_to_smem(at.k.at[b, keys, h], at.k_tile, at.ready)
        plgpu.copy_gmem_to_smem(at.v.at[b, keys, h], at.v_tile, at.ready)
        if at.bias is not None:
            plgpu.copy_gmem_to_smem(at.bias.at[b, h, keys], at.bias_tile, at.ready)
        plgpu.barrier_wait(at.ready)

    def _mask_values(self, low, high):
        """Zeros for the values of hidden keys: 0 * NaN is no zero."""
        at = self.at
        values = plgpu.load(at.v_tile, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
        values = jnp.where(key >= low, values, 0)
        values = jnp.where(key < high, values, 0)
        if at.bias is not None:
            bias = plgpu.load(at.bias_tile, layout=hopper.ROW)
            values = jnp.where(hopper.along_rows(bias, values.shape) > -jnp.inf, values, 0)
        at.v_tile[...] = values
        plgpu.commit_smem()

    def _store(self, lse):
        at = self.at
        at.lse_tile[...] = lse
        plgpu.commit_smem()
        rows = pl.ds(0, self.sizes.groups)
        plgpu.copy_smem_to_gmem(at.lse_tile.at[rows], at.lse.at[at.program])
        plgpu.wait_smem_to_gmem(0)


def takes(q) -> bool:
    """Whether queries [B, T, ...] are few."""
    return q.shape[1] <= FEW


def attend_blocks(
    q, k, v, indptr, indices, values, value, *,
    num_keys: int, num_blocks: int, block_size: int, scale: float,
):  # fmt: skip
    """Attention of each query token to blocks of its own, which are pieces.

    Args:
      q: [B, T, Hq, D], up to 16 query heads for each of k.
      k: [B, N, Hkv, D], padded to a multiple of 8 keys.
      v: [B, N, Hkv, D].
      indptr: int32 [B, Hkv, T + 1], of a `BlockCSR`; None of a regular one.
      indices: int32 [B, Hkv, E], likewise.
      values: f32 [B, Hkv, E], likewise.
      value: f32 [B, Hkv, T, P], the values of each token's entries; where it has fewer, anything.
      num_keys: N before it was padded.
      num_blocks: those of other numbers are no entries.
      block_size: keys of a block, a multiple of 16.
      scale: of the logits.

    Returns:
      out, like q, and lse, f32 [B, T, Hq].
    """
    sizes = _Sizes(*_shape(q, k), num_keys, value.shape[3], block_size, scale, num_blocks)
    entries = {
        "indptr": None if indptr is None else indptr.ravel(),
        "indices": indices.reshape(-1, indices.shape[2]),
        "values": values.reshape(-1, values.shape[2]),
    }
    return _join(*_attend_pieces(q, k, v, sizes, **entries), value, q)


def attend_ranges(q, k, v, start, end, key_bias, *, num_keys: int, scale: float):
    """Attention of each query token to a range of keys, of which those hidden may be no numbers.

    Args:
      q: [B, T, Hq, D], up to 16 query heads for each of k.
      k: [B, N, Hkv, D], padded to a multiple of 8 keys.
      v: [B, N, Hkv, D].
      start: int32 [B, T], the first key that is seen.
      end: int32 [B, T], the one after the last.
      key_bias: f32 [B, Hkv, N], or None; -inf hides a key.
      num_keys: N before it was padded.
      scale: of the logits.

    Returns:
      out, like q, and lse, f32 [B, T, Hq].
    """
    # A piece begins at a multiple of 8 keys, so a range may take one more.
    sizes = _Sizes(*_shape(q, k), num_keys, (num_keys + 6) // _RANGE_PIECE + 1, _RANGE_PIECE, scale)
    span = jnp.stack((start.ravel(), end.ravel()))
    return _join(*_attend_pieces(q, k, v, sizes, bias=key_bias, span=span), None, q)


def _shape(q, k):
    """Tokens, heads of keys, query heads for each, and width, of `_Sizes`."""
    groups = q.shape[2] // k.shape[2]
    return q.shape[1], k.shape[2], 8 if groups <= 8 else 16, q.shape[3]


def _attend_pieces(q, k, v, sizes: _Sizes, bias=None, **given):
    """out f32 [B, Hkv, T, P, G, D], not set where a piece has no keys, and lse f32 [..., G]."""
    batch, tokens, heads, groups, dim = len(q), *dataclasses.astuple(sizes)[:4]
    programs = batch * heads * tokens * sizes.pieces
    q = shapes.pad(q.reshape(batch, tokens, heads, -1, dim), 3, groups)
    operand = functools.partial(hopper.operand_tile, inner=sizes.piece_keys)
    keys = operand((sizes.piece_keys, dim))
    results = hopper.launch(
        "attend_pieces",
        lambda at: _Piece(sizes, at).run(),
        programs=programs,
        warpgroups=1,
        operands={
            "q": q.reshape(batch, tokens, heads * groups, dim), "k": k, "v": v, "bias": bias,
            **dict.fromkeys(("indptr", "indices", "values", "span")), **given,
        },
        outputs={
            "out": jax.ShapeDtypeStruct((programs, groups, dim), jnp.float32),
            "lse": jax.ShapeDtypeStruct((programs, groups), jnp.float32),
        },
        scratch={
            "q_tile": operand((HALF, dim)),
            "k_tile": keys,
            "v_tile": keys,
            "bias_tile": None if bias is None else plgpu.SMEM((sizes.piece_keys,), jnp.float32),
            "out_tile": plgpu.SMEM((HALF, dim), jnp.float32),
            "lse_tile": plgpu.SMEM((HALF,), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=3 + (bias is not None)),
        },
    )  # fmt: skip
    shape = batch, heads, tokens, sizes.pieces, groups
    return results["out"].reshape(*shape, dim), results["lse"].reshape(shape)


def _join(out, lse, value, q):
    """The results of pieces, with their biases, as those of the queries q.

    A few pieces at a time, and without reductions, of which XLA would make launches of their own.
    """
    groups = q.shape[2] // out.shape[1]
    out, lse = out[..., :groups, :], lse[..., :groups]
    while True:
        width = min(lse.shape[3], _JOINED)
        out, each = _in_turns(out, width, 0), _in_turns(lse, width, -jnp.inf)
        if value is not None:
            biases = _in_turns(jnp.broadcast_to(value, lse.shape[:4]), width, 0)
            each = [
                jnp.where(x > -jnp.inf, x + y[..., None], x)
                for x, y in zip(each, biases, strict=True)
            ]
            value = None
        top = functools.reduce(jnp.maximum, each)
        top = jnp.where(top > -jnp.inf, top, 0)
        weights = [jnp.exp(x - top) for x in each]
        total = sum(weights)
        weighted = (
            jnp.where(x[..., None] > 0, x[..., None] * y, 0)
            for x, y in zip(weights, out, strict=True)
        )
        out = sum(weighted) / jnp.where(total > 0, total, 1)[..., None]
        lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
        if lse.shape[3] == 1:
            break
    out, lse = (x[:, :, :, 0].swapaxes(1, 2) for x in (out, lse))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[:3])


def _in_turns(x, width: int, fill):
    """[B, Hkv, T, P, ...] as `width` arrays of pieces, [B, Hkv, T, P / width, ...] each."""
    x = shapes.pad(x, 3, width, fill=fill)
    x = x.reshape(*x.shape[:3], -1, width, *x.shape[4:])
    return [x[:, :, :, :, n] for n in range(width)]
