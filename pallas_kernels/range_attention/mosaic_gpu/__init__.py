"""Attention to a range of keys per query on Hopper GPUs (Pallas Mosaic GPU, sm_90).

Forward and dQ: a tile is 128 rows, the G query heads of a KV head over neighbouring tokens, and
walks over the keys of its tokens, with an online softmax (arXiv:2205.14135), which runs while the
next step's product is computed (arXiv:2407.08608). dK and dV: a tile is 128 keys, and walks over
the query rows that see them. Ranges are compared only in steps at the edges, which not
all rows see whole; the arithmetic is the same in all steps, so that a query's result does not
depend on its neighbours by one bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import shapes
from pallas_kernels.hopper import LOG2E
from pallas_kernels.hopper_few_queries import attend_ranges, takes
from pallas_kernels.range_attention import xla
from pallas_kernels.range_attention.mosaic_gpu.configs import KERNELS, config_for
from pallas_kernels.range_attention.mosaic_gpu.key_walk import forward, query_gradient
from pallas_kernels.range_attention.mosaic_gpu.query_walk import key_gradients
from pallas_kernels.segments import first_places

_WIDEST_BACKWARD = 128  # head dimension


def _hide_unseen_keys(k, v, start, end, key_bias):
    """Zeros for keys that no query sees: they may hold anything, and 0 * NaN is no zero."""
    # Of the queries whose end is past a key, the first has the lowest start.
    first = jax.vmap(lambda end: first_places(end, k.shape[1]))(end)[:, 1:]
    start = jnp.take_along_axis(start, first, axis=1, mode="fill", fill_value=2**31 - 1)
    seen = (start <= jnp.arange(k.shape[1], dtype=jnp.int32))[..., None]
    if key_bias is not None:
        seen = seen & (key_bias != -jnp.inf).swapaxes(1, 2)
    return tuple(jnp.where(seen[..., None], x, 0) for x in (k, v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, start, end, key_bias, scale, all_finite):
    return _attend_fwd(q, k, v, start, end, key_bias, scale, all_finite)[0]


def _attend_fwd(q, k, v, start, end, key_bias, scale, all_finite):
    shown_k, shown_v = k, v
    if not all_finite:
        shown_k, shown_v = _hide_unseen_keys(k, v, start, end, key_bias)
    if key_bias is None:
        shown_k = k  # logits are masked, whatever they are
    config = config_for("forward", q.shape[3], biased=key_bias is not None)
    attend = shapes.batchable(functools.partial(forward, scale=scale, config=config))
    results = attend(q, shown_k, shown_v, start, end, key_bias)
    out, lse = checkpoint_name(results, "range_attention")
    return (out, lse), (q, k, v, start, end, key_bias, out, lse)


def _attend_bwd(scale, all_finite, residuals, cotangents):
    q, k, v, start, end, key_bias, out, lse = residuals
    if q.shape[3] > _WIDEST_BACKWARD:
        return _wide_bwd(scale, residuals, cotangents)
    out_bar, lse_bar = cotangents
    seen = lse > -jnp.inf
    delta = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - lse_bar
    # Or XLA would transpose before it adds, and read numbers one by one.
    delta = lax.optimization_barrier(delta)
    lse, delta = jnp.where(seen, lse * LOG2E, 0), jnp.where(seen, delta, 0)
    if not all_finite:
        k, v = _hide_unseen_keys(k, v, start, end, key_bias)
        # Queries without keys, and their cotangents, may hold anything, too.
        q, out_bar = (jnp.where(seen[..., None], x, 0) for x in (q, out_bar))
    operands = q, k, v, start, end, key_bias, out_bar, lse, delta
    q_bar, (k_bar, v_bar, bias_bar) = (
        shapes.batchable(functools.partial(f, scale=scale, config=config_for(name, q.shape[3])))(
            *operands
        )
        for f, name in ((query_gradient, "query_gradient"), (key_gradients, "key_gradients"))
    )
    return q_bar, k_bar, v_bar, None, None, bias_bar


def _wide_bwd(scale, residuals, cotangents):
    """As `_attend_bwd`, in plain JAX: two accumulators of 64 x 256 do not fit in registers."""
    q, k, v, start, end, key_bias, out, lse = residuals
    shape = *q.shape[:2], k.shape[2], q.shape[2] // k.shape[2]

    def grouped(x):
        return x.reshape(*shape, *x.shape[3:])

    key_bias = None if key_bias is None else key_bias.swapaxes(1, 2)
    residuals = grouped(q), k, v, start, end, key_bias, grouped(out), grouped(lse)
    q_bar, *bars, bias_bar = xla.attend_bwd(scale, residuals, tuple(map(grouped, cotangents)))
    return q_bar.reshape(q.shape), *bars, None if bias_bar is None else bias_bar.swapaxes(1, 2)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _attend_few(q, k, v, start, end, key_bias, *, scale):
    """Of few queries: their ranges are cut into pieces."""
    num_keys = k.shape[1]
    k, v = (shapes.pad(x, 1, 8) for x in (k, v))
    if key_bias is not None:
        key_bias = shapes.pad(key_bias, 1, 8).swapaxes(1, 2)
    return attend_ranges(q, k, v, start, end, key_bias, num_keys=num_keys, scale=scale)


def range_attention(q, k, v, start, end, key_bias, scale, all_finite=False):
    """See `pallas_kernels.range_attention.range_attention`; start and end are int32 [B, T]."""
    if 0 in (*q.shape, k.shape[1]):
        return xla.range_attention(q, k, v, start, end, key_bias, scale)
    many = functools.partial(_attend_many, scale=scale, all_finite=all_finite)
    few = shapes.batchable(functools.partial(_attend_few, scale=scale))
    return (shapes.differentiated_as(many, few) if takes(q) else many)(
        q, k, v, start, end, key_bias
    )


def _attend_many(q, k, v, start, end, key_bias, *, scale, all_finite):
    tokens = q.shape[1]
    # Copies by TMA begin at multiples of 8 rows, so arrays are made to end at such.
    q, start, end = (shapes.pad(x, 1, 8, mode) for x, mode in (
        (q, "constant"), (start, "edge"), (end, "edge")))  # fmt: skip
    k, v = (shapes.pad(x, 1, 8) for x in (k, v))
    if key_bias is not None:
        key_bias = shapes.pad(key_bias, 1, 8).swapaxes(1, 2)
    out, lse = _attend(q, k, v, start, end, key_bias, scale, all_finite)
    return out[:, :tokens], lse[:, :tokens]


__all__ = ["KERNELS", "range_attention"]
