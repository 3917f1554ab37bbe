"""Over which axes of a mesh arrays vary inside `jax.shard_map`; outside, over none."""

import jax
import jax.numpy as jnp


def varying(x) -> frozenset:
    """The axes over which an array varies."""
    return jax.typeof(x).manual_axis_type.varying


def vary_over(axes, x):
    """x, varying over `axes` too; along those that replicate it, its gradient is summed."""
    missing = tuple(axes - varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(*operands) -> tuple:
    """The operands of a kernel, arrays and trees of them, all varying over the same axes."""
    axes = frozenset().union(*map(varying, jax.tree.leaves(operands)))
    return jax.tree.map(lambda x: vary_over(axes, x), operands)


def vary_with(x, tree):
    """A tree of arrays, to begin a loop with, that vary where x does, too."""
    return jax.tree.map(lambda y: vary_over(varying(x), y), tree)


def zeros_like(x, dtype=None) -> jax.Array:
    """Zeros that vary as x does, to begin a loop's sum with."""
    return vary_over(varying(x), jnp.zeros(x.shape, dtype or x.dtype))
