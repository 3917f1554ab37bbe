"""Attention of each query token to the key blocks of its row of a sparse pattern."""

import dataclasses
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import reference, xla
from pallas_kernels.checks import check_attention_operands, check_shape
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_alike


def _not_for_hopper(q, k, v, blocks, block_size, *_) -> str | None:
    if block_size not in (32, 64):
        return f"takes blocks of 32 and 64 keys, not {block_size}"
    return dispatch.unfit_for_hopper(q, k, (64, 128))


dispatch.register(
    "block_sparse_attention",
    dispatch.for_hopper(__name__, "block_sparse_attention", _not_for_hopper),
    dispatch.for_tpu(
        __name__,
        "block_sparse_attention",
        dispatch.deferred(f"{__name__}.mosaic_tpu", "why_not_for"),
    ),
    dispatch.Implementation("xla", xla.block_sparse_attention),
    dispatch.Implementation("reference", reference.block_sparse_attention),
)


def _check_blocks(blocks: BlockCSR, q, k, block_size: int) -> None:
    batch, tokens, num_keys, heads = *q.shape[:2], *k.shape[1:3]
    sizes = {"B": batch, "Hkv": heads, "T+1": tokens + 1}
    check_shape("blocks.indptr", blocks.indptr, "B Hkv T+1", **sizes)
    check_shape("blocks.indices", blocks.indices, "B Hkv E", B=batch, Hkv=heads)
    entries = blocks.indices.shape[2]
    check_shape("blocks.values", blocks.values, "B Hkv E", B=batch, Hkv=heads, E=entries)
    for name in ("indptr", "indices"):
        dtype = getattr(blocks, name).dtype
        if dtype != jnp.int32:
            raise TypeError(f"blocks.{name} is {dtype}, but must be int32: cast it")
    if blocks.values.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"blocks.values is {blocks.values.dtype}, but must be float32: cast it")
    if block_size <= 0:
        raise ValueError(f"block_size={block_size} must be positive: use 64")
    num_blocks = -(-num_keys // block_size)
    if blocks.num_columns != num_blocks:
        raise ValueError(
            f"blocks.num_columns={blocks.num_columns} must be the {num_blocks} blocks of"
            f" block_size={block_size} that k's {num_keys} keys fill: build the pattern for them"
        )


def block_sparse_attention(
    q,
    k,
    v,
    blocks: BlockCSR,
    *,
    block_size: int,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of query t over the keys of the blocks in row t of `blocks`.

    The logit of key n in block b is `q_t . k_n * scale + value`, with the value of the entry
    (t, b). A query without keys has out 0 and lse -inf. Nothing is read from blocks that no row
    names. Differentiable in q, k, v and blocks.values, from the cotangents of both results.

    Args:
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D], of the same dtype; Hq is a multiple of Hkv.
      v: [B, N, Hkv, D].
      blocks: T rows and ceil(N / block_size) columns per batch element and KV head.
      block_size: S, keys of a block; the last block may be incomplete.
      scale: of the logits; None for 1 / sqrt(D).
      implementation: a name that `pallas_kernels.dispatch` knows; None for the best.

    Returns:
      out [B, T, Hq, D] of q's dtype and lse [B, T, Hq], f32 (f64 for f64 operands).

    Raises:
      ValueError: if shapes do not fit together, or `implementation` cannot run.
      TypeError: if a dtype is wrong.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    check_attention_operands(q, k, v)
    block_size = operator.index(block_size)
    _check_blocks(blocks, q, k, block_size)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    values = blocks.values.astype(jnp.promote_types(jnp.float32, q.dtype))
    blocks = dataclasses.replace(blocks, values=values)
    operands = *vary_alike(q, k, v, blocks), block_size, scale
    return dispatch.select("block_sparse_attention", implementation, *operands)(*operands)


def adds_up(q, k, v, *, tokens: int, capacity: int, block_size: int, implementation=None) -> bool:
    """Whether `add_up` takes queries and keys like these, by the implementation that is taken here.

    Args:
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      tokens: rows of the pattern.
      capacity: entries of a row.
      block_size: S.
      implementation: as in `block_sparse_attention`.
    """
    # Of the pattern only its shape matters.
    blocks = BlockCSR(*[None] * 3, num_columns=-(-k.shape[1] // block_size), row_capacity=capacity)
    operands = q, k, v, blocks, block_size, 1.0
    chosen = dispatch.chosen("block_sparse_attention", implementation, *operands)
    if chosen.name != "mosaic_gpu":
        return False
    return dispatch.deferred(f"{__name__}.mosaic_gpu", "adds_up")(q, k, tokens, capacity)


def value_scales(v, *, block_size: int):
    """What `add_up` has to know of all values, for whatever tokens it is called.

    Args:
      v: [B, N, Hkv, D].
      block_size: S.

    Returns:
      f32 [B, Nb, Hkv], a power of two above the values of each block.
    """
    return dispatch.deferred(f"{__name__}.mosaic_gpu", "value_scales")(v, block_size)


def add_up(
    out,
    q,
    k,
    v,
    blocks: BlockCSR,
    first,
    *,
    heads: int | None = None,
    gate,
    added,
    value_scales,
    block_size: int,
    scale: float | None = None,
):
    """Block-sparse attention of some tokens, with other branches added, written in place.

    Not differentiable, and only for what `adds_up` takes.

    Args:
      out: [B, T, Hq, D], of which the tokens of the pattern are written. Inside `jax.shard_map` it
        must not vary, as far as JAX knows, and nor does the result: `jax.lax.empty` does not.
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      blocks: of T' tokens.
      first: the first of these, int32, a multiple of 8.
      heads: KV heads that are taken at a time; None for all.
      gate: f32 [B, T', Hq], what the attention to the blocks is multiplied with; None for 1.
      added: pairs of rows [B, T', Hq, D] to add, and what they are multiplied with, as `gate`.
      value_scales: of all values, from the function of that name.
      block_size: as in `block_sparse_attention`.
      scale: likewise.

    Returns:
      out, after that.
    """
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    first = jnp.asarray(first, jnp.int32)
    operands = vary_alike(q, k, v, blocks, first, gate, tuple(added), value_scales)
    run = dispatch.deferred(f"{__name__}.mosaic_gpu", "add_up")
    return run(out, *operands, block_size, scale, heads)


__all__ = ["BlockCSR", "add_up", "adds_up", "block_sparse_attention", "value_scales"]
