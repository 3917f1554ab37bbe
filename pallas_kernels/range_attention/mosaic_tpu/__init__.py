"""Attention to a range of keys per query on TPUs (Pallas Mosaic TPU).

Forward and dQ: a tile is the G query heads of a KV head over neighbouring tokens, and walks over
the tiles of keys that its tokens see, with an online softmax (arXiv:2205.14135). dK and dV: a tile
of keys walks over the tiles of queries that see it. Walks are as long as the ranges say: the next
tile is copied from HBM while one is computed with, across the ends of walks, too. Ranges are
compared only in steps that not all queries see whole; the arithmetic is the same in all steps, so
that a query's result does not depend on its neighbours by one bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import shapes
from pallas_kernels.range_attention import xla
from pallas_kernels.range_attention.mosaic_tpu.kernels import BLIND, backward, forward
from pallas_kernels.tpu import LOG2E


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, start, end, key_bias, scale):
    return _attend_fwd(q, k, v, start, end, key_bias, scale)[0]


def _attend_fwd(q, k, v, start, end, key_bias, scale):
    attend = shapes.batchable(functools.partial(forward, scale=scale))
    results = attend(q, k, v, start, end, key_bias)
    out, lse = checkpoint_name(results, "range_attention")
    return (out, lse), (q, k, v, start, end, key_bias, out, lse)


def _attend_bwd(scale, residuals, cotangents):
    q, k, v, start, end, key_bias, out, lse = residuals
    out_bar, lse_bar = cotangents
    seen = lse > -jnp.inf
    delta = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_bar
    # Queries without keys, and their cotangents, may hold anything.
    lse, delta = jnp.where(seen, lse * LOG2E, BLIND), jnp.where(seen, delta, 0)
    gradients = shapes.batchable(functools.partial(backward, scale=scale))
    q_bar, k_bar, v_bar, bias_bar = gradients(q, k, v, start, end, key_bias, out_bar, lse, delta)
    return q_bar, k_bar, v_bar, None, None, bias_bar


_attend.defvjp(_attend_fwd, _attend_bwd)


def range_attention(q, k, v, start, end, key_bias, scale, _all_finite=False):
    """See `pallas_kernels.range_attention.range_attention`; start and end are int32 [B, T]."""
    if 0 in (*q.shape, k.shape[1]):
        return xla.range_attention(q, k, v, start, end, key_bias, scale)
    return _attend(q, k, v, start, end, key_bias, scale)
