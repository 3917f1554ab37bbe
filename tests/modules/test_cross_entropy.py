"""The likelihood of tokens, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.modules.cross_entropy import cross_entropy


def by_definition(hidden, table, targets):
    logits = jnp.einsum("tc,vc->tv", hidden, table, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_equals_its_definition(dtype, tolerance):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal((n, 16)), dtype) for n in (64, 100))
    targets = jnp.asarray(rng.integers(0, 100, 64), jnp.int32)
    weights = jnp.asarray(rng.random(64), jnp.float32)

    def both(loss):
        return jax.value_and_grad(lambda *x: jnp.sum(weights * loss(*x, targets)), (0, 1))(
            hidden, table
        )

    value, gradients = both(cross_entropy)
    expected_value, expected = both(by_definition)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for found, right in zip(gradients, expected, strict=True):
        assert found.dtype == dtype
        found, right = (np.asarray(x, np.float32) for x in (found, right))
        np.testing.assert_allclose(found, right, atol=tolerance * np.abs(right).max())


def test_a_large_logit_does_not_overflow():
    hidden, table = jnp.full((1, 4), 300.0), jnp.asarray(np.eye(3, 4), jnp.float32)
    targets = jnp.zeros(1, jnp.int32)
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, table, targets).sum())(hidden)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-4)
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-4)
