"""Loops over repeated layers, against the program written out."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

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


def test_loops_equal_the_program_written_out(monkeypatch):
    # A loop of a loop and a layer, and a layer behind it.
    config = dataclasses.replace(TINY, layers="lls" * 2 + "l", remat="layer", selection_loss=0.1)
    monkeypatch.setattr(repeats, "FEWEST", 2)
    model, tokens = make(config), make_tokens(2, 65)
    weights = np.random.default_rng(1).random((2, 64), np.float32)

    def loss(model):
        return model.loss(tokens[:, :-1], tokens[:, 1:], weights)[0]

    def compute():
        step = jax.jit(lambda state: nnx.value_and_grad(loss)(nnx.merge(graph, state)))
        return step(state), step.trace(state).jaxpr

    graph, state = nnx.split(model)
    (value, gradients), program = compute()
    monkeypatch.setattr(repeats, "FEWEST", 100)
    (expected, others), written_out = compute()
    assert len(str(program)) < 0.8 * len(str(written_out))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
