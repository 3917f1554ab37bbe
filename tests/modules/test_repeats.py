"""Loops over repeated layers, against the program written out."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.config import ConfigError
from sparsex_jax.modules import repeats
from tests.modules.test_transformer import TINY, make, make_tokens


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("s", (1, 1)),
        ("llls", (1, 1)),
        ("lllls", (1, 4)),
        ("lllls" * 4, (5, 4)),
        ("ls" * 4 + "l", (2, 4)),
        ("lslslsls" * 4, (2, 16)),
    ],
)
def test_longest_repetition(kinds, expected):
    assert repeats._longest_repetition(tuple(kinds)) == expected


@pytest.mark.long
def test_loops_equal_the_program_written_out(monkeypatch):
    # A loop of a loop and a layer, and a layer behind it.
    config = dataclasses.replace(TINY, layers="lls" * 2 + "l", selection_loss=0.1)
    tokens = make_tokens(2, 65)
    weights = np.random.default_rng(1).random((2, 64), np.float32)

    def loss(model):
        return model.loss(tokens[:, :-1], tokens[:, 1:], weights)[0]

    def compute(remat):
        graph, state = nnx.split(make(dataclasses.replace(config, remat=remat)))
        step = jax.jit(lambda state: nnx.value_and_grad(loss)(nnx.merge(graph, state)))
        return step(state), step.trace(state).jaxpr

    monkeypatch.setattr(repeats, "FEWEST", 2)
    (value, gradients), program = compute("repetition")
    monkeypatch.setattr(repeats, "FEWEST", 100)
    with pytest.raises(ConfigError, match="needs layers of which several repeat 100 times"):
        compute("repetition")
    (expected, others), written_out = compute("layer")
    assert len(str(program)) < 0.8 * len(str(written_out))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


def test_repetitions_that_are_recomputed_keep_less():
    tokens, weights = make_tokens(1, 257), np.ones((1, 256), np.float32)
    kept = {}
    for remat in ("layer", "repetition"):
        graph, state = nnx.split(make(dataclasses.replace(TINY, layers="llls" * 4, remat=remat)))

        def loss(state, graph=graph):
            model = nnx.merge(graph, state)
            return model.loss(tokens[:, :-1], tokens[:, 1:], weights)[0]

        backward = jax.eval_shape(lambda state, loss=loss: jax.vjp(loss, state)[1], state)
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
    inputs = 256 * TINY.model_dim * 4
    assert 11 * inputs < kept["layer"] - kept["repetition"] < 13 * inputs  # of 16 layers, or 4
