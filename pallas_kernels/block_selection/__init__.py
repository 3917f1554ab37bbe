"""The best blocks of each query token."""

import operator

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_selection import reference, xla
from pallas_kernels.checks import check_floating, check_shape, per_token
from pallas_kernels.mesh_axes import vary_alike


def _not_for_kernels(u, c, limit, start, count) -> str | None:
    if u.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {u.dtype}"
    if u.shape[3] not in (64, 128):
        return f"takes features of width 64 and 128, not {u.shape[3]}"
    if count > 64:
        return f"selects up to 64 blocks, not {count}"
    if c.shape[1] > 2**24:
        return f"counts blocks in float32, up to 2^24, not {c.shape[1]}"
    return None


dispatch.register(
    "block_selection",
    dispatch.for_hopper(__name__, "select_blocks", _not_for_kernels),
    dispatch.for_tpu(__name__, "select_blocks", _not_for_kernels),
    dispatch.Implementation("xla", xla.select_blocks),
    dispatch.Implementation("reference", reference.select_blocks),
)


def select_blocks(
    u, c, limit, count: int, *, start=None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The `count` best blocks b with start_t <= b < limit_t, by the score <u_t, c_b>.

    The best comes first; of equal scores, the lower index. Where fewer blocks are allowed, the
    rest has index -1 and score -inf. `score` is differentiable in u and c, `index` is not.
    Nothing is read from the blocks that a query may not select, so they may hold anything.

    Args:
      u: query features [B, T, Hkv, d].
      c: block features [B, Nb, Hkv, d], of the same dtype; Nb may be less than `count`, or 0.
      limit: integer [T] or [B, T].
      count: K, at least 0.
      start: as `limit`; None for 0.
      implementation: a name that `pallas_kernels.dispatch` knows; None for the best.

    Returns:
      index int32 [B, T, Hkv, K] and score [B, T, Hkv, K], f32 (f64 for f64 features).

    Raises:
      ValueError: if shapes do not fit together, count < 0, or `implementation` cannot run.
      TypeError: if a dtype is wrong.
    """
    u, c = map(jnp.asarray, (u, c))
    check_shape("u", u, "B T Hkv d")
    batch, tokens, heads, dim = u.shape
    check_shape("c", c, "B Nb Hkv d", B=batch, Hkv=heads, d=dim)
    check_floating(u=u, c=c)
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count={count} must not be negative: use 0 for none")
    limit = per_token("limit", limit, batch, tokens)
    if start is None:
        start = jnp.zeros((batch, tokens), jnp.int32)
    else:
        start = per_token("start", start, batch, tokens)
    operands = *vary_alike(u, c, limit, start), count
    return dispatch.select("block_selection", implementation, *operands)(*operands)


__all__ = ["select_blocks"]
