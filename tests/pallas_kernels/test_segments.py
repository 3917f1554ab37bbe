"""Runs of equal keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.segments import first_places, sum_runs


@pytest.mark.parametrize("size", [0, 1, 7, 200])
@pytest.mark.parametrize("highest", [0, 3, 60])
def test_first_places(size, highest):
    rng = np.random.default_rng(size)
    for lowest, count in ((0, highest), (-2, 5), (0, 0)):  # some are negative, some beyond
        keys = np.sort(rng.integers(lowest, highest + 1, size)).astype(np.int32)
        found = jax.jit(first_places, static_argnums=1)(keys, count)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.searchsorted(keys, np.arange(count + 1)))


def test_sum_runs():
    rng = np.random.default_rng(0)
    keys = np.sort(rng.integers(0, 9, 50))
    rows = {"a": rng.standard_normal((50, 3)), "b": rng.standard_normal(50)}
    found = jax.jit(sum_runs)(keys, rows)
    for n in range(50):
        run = slice(np.searchsorted(keys, keys[n]), n + 1)
        for name, x in rows.items():
            np.testing.assert_allclose(found[name][n], x[run].sum(axis=0), rtol=1e-4, atol=1e-5)
