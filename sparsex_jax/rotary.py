"""Rotary position embedding with phases that are exact at any position.

The angle of token t is a whole number of steps of 2 pi / 2^32, computed in wrapping uint32
arithmetic: float32 would have lost the position of a token long before 64M.

Source: RoFormer (Su et al., 2021, arXiv:2104.09864); the integer phases are ours.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(positions: jax.Array, head_dim: int, base: float) -> jax.Array:
    """Angles of the rotations, in radians within [-pi, pi).

    Args:
      positions: integers, any shape, below 2^32.
      head_dim: D, even.
      base: base of the geometric series of frequencies.

    Returns:
      f32 [*positions.shape, D / 2].
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    steps = np.round(frequencies / (2 * np.pi) * 2.0**32).astype(np.uint32)
    phases = positions.astype(jnp.uint32)[..., None] * steps
    return phases.astype(jnp.int32).astype(jnp.float32) * np.float32(np.pi / 2**31)


def apply_rotary(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates the two halves of each head vector by the angles of its position.

    Args:
      x: [B, T, H, D].
      positions: [T] or [B, T], integers.
      base: as in `rotary_angles`.

    Returns:
      [B, T, H, D] in the type of x.
    """
    angles = rotary_angles(positions, x.shape[-1], base)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated = (left * cos - right * sin, right * cos + left * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rotate_from(x: jax.Array, first: jax.Array | int, base: float) -> jax.Array:
    """`apply_rotary` of neighbouring tokens [B, T, H, D], the first of which is at `first`."""
    return apply_rotary(x, first + jnp.arange(x.shape[1], dtype=jnp.int32), base)
