"""Attention to selected blocks of a split sequence: keys and values travel round the devices.

In each of P steps a device attends to those of its entries that lie in the part that visits it,
and adds the result to a softmax over all of them. The backward pass sends the parts round once
more, and their gradients with them, so that no device ever holds more than two parts (Ring
Attention, Liu et al., 2023, arXiv:2310.01889, of which this is the sparse case).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_alike, vary_with
from sparsex_jax.fusion import Branch, SoftmaxSum
from sparsex_jax.parallel.mesh import axis_size


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    score: jax.Array,
    *,
    block_size: int,
    implementation: str | None = None,
) -> Branch:
    """Attention of a device's queries to the blocks that they selected anywhere in the sequence.

    Within `jax.shard_map`, over the axis "seq".

    Args:
      q: [B, T, Hq, D], the device's, like all the others.
      k: [B, T, Hkv, D].
      v: [B, T, Hkv, D].
      index: int32 [B, T, Hkv, K], blocks of the whole sequence; -1 where there is none.
      score: f32 [B, T, Hkv, K], biases of the logits.
      block_size: S, which divides T.
      implementation: as in `block_sparse_attention`.

    Returns:
      out [B, T, Hq, D] and lse f32 [B, T, Hq].
    """
    return _attend(*vary_alike(q, k, v, index, score), block_size, implementation)


def _entries(index, score, step, blocks: int) -> tuple[jax.Array, jax.Array]:
    """Entries that lie in the part which visits in a step; the others are made empty."""
    owner = (lax.axis_index("seq") - step) % axis_size("seq")
    column = index - owner * blocks
    inside = (index >= 0) & (column >= 0) & (column < blocks)
    return jnp.where(inside, column, -1), jnp.where(inside, score, -jnp.inf)


def _to_the_right(x):
    parts = axis_size("seq")
    return lax.ppermute(x, "seq", [(i, (i + 1) % parts) for i in range(parts)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, index, score, block_size, implementation):
    blocks = k.shape[1] // block_size

    def visit(step, carry):
        parts, total = carry
        column, value = _entries(index, score, step, blocks)
        found = block_sparse_attention(
            q, *parts, BlockCSR.from_selection(column, value, blocks),
            block_size=block_size, implementation=implementation,
        )  # fmt: skip
        return _to_the_right(parts), total.add(found)

    empty = vary_with(q, SoftmaxSum.empty(q))
    _, total = lax.fori_loop(0, axis_size("seq"), visit, ((k, v), empty))
    return total.branch(q.dtype)


def _attend_fwd(q, k, v, index, score, block_size, implementation):
    out, lse = _attend(q, k, v, index, score, block_size, implementation)
    return (out, lse), (q, k, v, index, score, out, lse)


def _attend_bwd(block_size, implementation, residuals, cotangents):
    q, k, v, index, score, out, lse = residuals
    out_bar, lse_bar = cotangents
    blocks = k.shape[1] // block_size
    delta = jnp.sum(out_bar.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - lse_bar

    def visit(step, carry):
        parts, part_bars, q_bar, score_bar = carry
        column, value = _entries(index, score, step, blocks)
        of_q, *of_parts, of_value = partial_gradients(
            q, *parts, column, value, out_bar, lse, delta, block_size, implementation
        )
        part_bars = _add(part_bars, tuple(of_parts))
        parts, part_bars = _to_the_right((parts, part_bars))
        return parts, part_bars, _add(q_bar, of_q), score_bar + of_value

    def zeros(x):
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    carry = (k, v), *vary_with(q, ((zeros(k), zeros(v)), zeros(q), zeros(score)))
    _, part_bars, q_bar, score_bar = lax.fori_loop(0, axis_size("seq"), visit, carry)
    k_bar, v_bar = (bar.astype(k.dtype) for bar in part_bars)
    return q_bar.astype(q.dtype), k_bar, v_bar, None, score_bar.astype(score.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _add(total, more):
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, more)


def partial_gradients(
    q, k, v, column, value, out_bar, lse, delta, block_size: int, implementation: str | None
):
    """Gradients by way of some of the keys of a softmax.

    Args:
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D], some of the keys.
      v: [B, N, Hkv, D].
      column: int32 [B, T, Hkv, K], blocks of these; -1 where there is none.
      value: [B, T, Hkv, K], their biases.
      out_bar: [B, T, Hq, D], cotangent of the output of the whole softmax.
      lse: [B, T, Hq], of the whole softmax.
      delta: [B, T, Hq]: out_bar . out - lse_bar, of the whole softmax.
      block_size: S.
      implementation: as in `block_sparse_attention`.

    Returns:
      Gradients of q, k, v and value.
    """

    def attend(q, k, v, value):
        blocks = BlockCSR.from_selection(column, value, k.shape[1] // block_size)
        return block_sparse_attention(
            q, k, v, blocks, block_size=block_size, implementation=implementation
        )

    (part, part_lse), pull_back = jax.vjp(attend, q, k, v, value)
    # The whole is the sum of `weight` times the parts.
    weight = jnp.where(part_lse > -jnp.inf, jnp.exp(part_lse - lse), 0)
    wide = out_bar.astype(lse.dtype)
    toward = jnp.sum(wide * part.astype(lse.dtype), axis=-1)
    lse_bar = weight * (toward - delta)
    return pull_back(((wide * weight[..., None]).astype(part.dtype), lse_bar))
