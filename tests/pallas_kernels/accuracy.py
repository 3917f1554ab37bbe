"""How results are compared."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_accurate(names, found, plain, right):
    """Errors are at most twice those of plain JAX in the same dtypes, and a rounding more.

    Args:
      names: of the leaves, at least as many.
      found: a tree of what is tested.
      plain: the same by plain JAX.
      right: the same in more precision.
    """
    leaves = list(zip(*map(jax.tree.leaves, (found, plain, right)), strict=True))
    for name, (x, y, z) in zip(names[: len(leaves)], leaves, strict=True):
        assert x.dtype == y.dtype, name
        rounding = 2**-8 if x.dtype == jnp.bfloat16 else 2**-18
        x, y, z = (np.asarray(each, np.float64) for each in (x, y, z))
        some = np.isfinite(z)
        np.testing.assert_array_equal(x[~some], z[~some], err_msg=name)
        error, allowed = (np.max(np.abs(each[some] - z[some]), initial=0) for each in (x, y))
        allowed = 2 * allowed + rounding * np.max(np.abs(z[some]), initial=0)
        assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


def assert_same_bits(tree, other):
    """The leaves of two trees agree bit for bit."""
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        x, y = (np.asarray(each) for each in (x, y))
        np.testing.assert_array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}"))
