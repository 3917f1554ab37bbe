"""Attention of each query to a contiguous range of keys."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import checks, dispatch
from pallas_kernels.mesh_axes import vary_alike
from pallas_kernels.range_attention import reference, xla


def _not_for_hopper(q, k, *_) -> str | None:
    return dispatch.unfit_for_hopper(q, k, (64, 128, 256))


def _not_for_tpu(q, k, *_) -> str | None:
    head_dim, groups = q.shape[3], q.shape[2] // k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {q.dtype}"
    if head_dim not in (64, 128):
        return f"takes head dimensions of 64, 128, not {head_dim}"
    if groups > 32:
        return f"takes up to 32 query heads per KV head, not {groups}"
    return None


dispatch.register(
    "range_attention",
    dispatch.for_hopper(__name__, "range_attention", _not_for_hopper),
    dispatch.for_tpu(__name__, "range_attention", _not_for_tpu),
    dispatch.Implementation("xla", xla.range_attention),
    dispatch.Implementation("reference", reference.range_attention),
)


def range_attention(
    q, k, v, start, end, key_bias=None, *, scale: float | None = None, all_finite: bool = False,
    implementation=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Softmax attention where query t sees the keys `start_t <= n < end_t`.

    Differentiable in q, k, v and key_bias, from the cotangents of both results. The result at t
    does not depend on queries after t, nor, if finite, on keys from `end_t` on; keys that no
    query sees may even be NaN.

    Args:
      q: [B, T, Hq, D], floating.
      k: [B, N, Hkv, D], q's dtype; Hq is a multiple of Hkv.
      v: [B, N, Hkv, D], q's dtype.
      start: integer [T] or [B, T], non-decreasing in t; clipped to [0, N].
      end: integer [T] or [B, T], non-decreasing in t; clipped to [0, N].
      key_bias: f32 [B, N, Hkv], added to the logits of its key; -inf removes the key.
      scale: of the products q.k; None for 1/sqrt(D).
      all_finite: promises that no operand or cotangent is infinite or NaN, keys that no query sees
        and queries that see no key included (key_bias may be -inf). Implementations that would
        hide those first need not, which saves passes over q, v and the cotangent of out.
      implementation: "xla", "reference", ...; None picks by platform.

    Returns:
      out, q's shape and dtype, and lse, f32 [B, T, Hq], the log-sum-exp of the logits (f64 for
      f64 operands). Where a query has no key, out is 0 and lse is -inf.

    Raises:
      ValueError: if shapes do not fit, if `start` or `end` decreases (seen outside `jit` only),
        or if `implementation` is unknown or cannot run here.
      TypeError: if the dtypes are not as above.
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    checks.check_attention_operands(q, k, v)
    batch, tokens, _, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    start, end = (
        jnp.clip(checks.per_token(name, x, batch, tokens, monotone=True), 0, num_keys)
        for name, x in (("start", start), ("end", end))
    )
    if key_bias is not None:
        key_bias = jnp.asarray(key_bias)
        checks.check_shape("key_bias", key_bias, "B N Hkv", B=batch, N=num_keys, Hkv=num_kv_heads)
        checks.check_floating(key_bias=key_bias)
        key_bias = key_bias.astype(jnp.promote_types(jnp.float32, q.dtype))
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    operands = *vary_alike(q, k, v, start, end, key_bias), scale, bool(all_finite)
    return dispatch.select("range_attention", implementation, *operands)(*operands)
