"""Chunks of tokens, one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from sparsex_jax.token_chunks import map_chunks


def weigh(first, x, shared):
    positions = first + jnp.arange(x.shape[1])
    return x * shared["w"] * (positions[:, None] + 1)


@pytest.mark.parametrize("size", [4, 5, 12, 20])
def test_values_and_gradients(size):
    rng = np.random.default_rng(0)
    x, w, cotangent = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 12, 3), (3,), (2, 12, 3))
    )

    def f(x, w):
        return map_chunks(weigh, x, {"w": w}, size=size, saved=())

    out, vjp = jax.vjp(f, x, w)
    scaled = np.arange(1, 13)[:, None] * cotangent
    np.testing.assert_allclose(out, x * w * np.arange(1, 13)[:, None], rtol=1e-6)
    x_bar, w_bar = vjp(cotangent)
    np.testing.assert_allclose(x_bar, scaled * w, rtol=1e-6)
    np.testing.assert_allclose(w_bar, np.sum(scaled * x, axis=(0, 1)), rtol=1e-5)


def test_gradients_of_what_is_shared_are_summed_in_f32():
    w = jnp.ones((), jnp.bfloat16)
    x = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((1, 100))], axis=1)

    def f(w):
        of_chunk = lambda first, x, w: x * w.astype(jnp.float32)  # noqa: E731
        return jnp.sum(map_chunks(of_chunk, x, w, size=1, saved=()))

    # In bf16, 256 + 1 is 256.
    gradient = jax.grad(f)(w)
    assert gradient.dtype == jnp.bfloat16 and gradient == 356


@pytest.mark.parametrize(("saved", "times"), [((), 2), (("sine",), 1)])
def test_only_what_is_named_is_not_computed_anew(saved, times):
    def of_chunk(first, x, w):
        return jnp.exp(checkpoint_name(jnp.sin(x * w), "sine"))

    def f(x, w):
        return jnp.sum(map_chunks(of_chunk, x, w, size=2, saved=saved))

    jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(jnp.ones((1, 8)), jnp.ones(()))
    assert str(jaxpr).count(" sin ") == times
