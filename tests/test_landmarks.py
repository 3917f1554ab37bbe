"""Gathering landmarks; the pyramid itself is tested with the whole op."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax.landmarks import gather_keys


def test_gradients_of_keys_that_are_listed_often():
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 9, 2, 4)).astype(np.float32) for _ in range(2))
    salience = rng.standard_normal((2, 9, 2)).astype(np.float32)
    token = jnp.asarray(rng.integers(-1, 7, (2, 2, 40)), jnp.int32)
    found, vjp = jax.vjp(jax.jit(lambda *x: gather_keys(*x, token)), k, v, salience)
    assert np.array_equal(found[2] == -np.inf, token.swapaxes(1, 2) < 0)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), found)
    listed = np.asarray(token)[:, :, None] == np.arange(9)[:, None]  # [B, Hkv, N, M]
    for x, bar, cotangent in zip((k, v, salience), vjp(cotangents), cotangents, strict=True):
        expected = np.einsum("bhnm,bmh...->bnh...", listed, cotangent)
        assert bar.dtype == x.dtype
        np.testing.assert_allclose(bar, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_summed_in_f32():
    k = jnp.ones((1, 2, 1, 1), jnp.bfloat16)
    token = jnp.ones((1, 1, 300), jnp.int32)

    @jax.jit
    @jax.grad
    def gradient(k):
        return jnp.sum(gather_keys(k, k, jnp.zeros((1, 2, 1)), token)[0])

    assert gradient(k).ravel().tolist() == [0, 300]
