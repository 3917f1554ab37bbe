"""Validation and preparation of operands, shared by the primitives."""

import jax
import jax.numpy as jnp
import numpy as np


def check_shape(name: str, x, axes: str, **sizes: int) -> None:
    """Checks an array's rank and sizes.

    Args:
      name: the operand's name, for the message.
      x: the array.
      axes: its axes, e.g. "B T Hkv D".
      **sizes: the required sizes of some of the axes.

    Raises:
      ValueError: if the rank differs from the number of axes, or a size from the required one.
    """
    letters = axes.split()
    if x.ndim != len(letters):
        raise ValueError(
            f"{name} has shape {x.shape}, but must be [{', '.join(letters)}]:"
            f" give it {len(letters)} axes"
        )
    for axis, size in zip(letters, x.shape, strict=True):
        if axis in sizes and size != sizes[axis]:
            raise ValueError(
                f"{name} has shape {x.shape}, but its axis {axis} must have size {sizes[axis]}"
                f" as in the other operands: give it shape [{', '.join(letters)}]"
            )


def check_floating(**arrays) -> None:
    """Checks that the named arrays have one floating dtype.

    Raises:
      TypeError: if one is not floating, or two differ.
    """
    (first, reference), *_ = arrays.items()
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} is {x.dtype}, but must be floating: cast it to bfloat16")
        if x.dtype != reference.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, but must be {reference.dtype} like {first}: cast one"
            )


def check_attention_operands(q, k, v) -> None:
    """Checks q [B, T, Hq, D] against k and v [B, N, Hkv, D], with Hkv a divisor of Hq.

    Raises:
      ValueError: if the shapes do not fit together.
      TypeError: if the dtypes are not one floating dtype.
    """
    check_shape("q", q, "B T Hq D")
    check_shape("k", k, "B N Hkv D", B=q.shape[0], D=q.shape[3])
    check_shape("v", v, "B N Hkv D", B=k.shape[0], N=k.shape[1], Hkv=k.shape[2], D=k.shape[3])
    check_floating(q=q, k=k, v=v)
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"Hq={num_heads} must be a multiple of Hkv={num_kv_heads}: change q's or k's heads"
        )


def per_token(name: str, x, batch: int, tokens: int, *, monotone: bool = False) -> jax.Array:
    """An integer per query token, broadcast to int32 [B, T].

    Args:
      name: the operand's name, for the messages.
      x: integer [T] or [B, T]; what exceeds int32 is clipped.
      batch: B.
      tokens: T.
      monotone: whether it must not decrease along T, which is checked unless x is traced.

    Raises:
      ValueError: if the shape is neither [T] nor [B, T], or x decreases where it must not.
      TypeError: if x is not of an integer dtype.
    """
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} is {x.dtype}, but must be integer: cast it to int32")
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{name} has shape {x.shape}, but must be [T] or [B, T]: give it shape"
            f" {(tokens,)} or {(batch, tokens)}"
        )
    if monotone and not isinstance(x, jax.core.Tracer):
        seen = np.asarray(x)
        falls = np.argwhere(seen[..., 1:] < seen[..., :-1])
        if len(falls):
            raise ValueError(
                f"{name} decreases from token {falls[0, -1]} to {falls[0, -1] + 1}, but must be"
                " non-decreasing: sort the queries, or split the call"
            )
    own, wanted = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    x = x.clip(max(own.min, wanted.min), min(own.max, wanted.max)).astype(np.int32)
    return jnp.broadcast_to(jnp.asarray(x), (batch, tokens))
