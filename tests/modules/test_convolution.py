"""Convolutions along the tokens, against sums written out."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import normal

from sparsex_jax.modules.attention import SparseXAttention
from sparsex_jax.modules.layers import CausalConvolution
from tests.modules.test_transformer import TINY


def convolved(x, taps, dilation, age):
    """x plus its convolution, [T, C]."""
    total = x.copy()
    for t in range(len(x)):
        for number, tap in enumerate(taps):
            lag = number * dilation
            if lag <= min(t, age[t]):
                total[t] += tap * x[t - lag]
    return total


@pytest.mark.parametrize("dilation", [1, 3])
def test_taps_reach_back_within_a_document(dilation):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 30, 5), np.float32)
    age = np.stack([np.arange(30), np.r_[np.arange(12), np.arange(18)]])
    convolution = CausalConvolution(5, 4, normal(0.1), dilation, rngs=nnx.Rngs(0))
    taps = np.asarray(convolution.taps[...])
    for row in range(2):
        expected = convolved(x[row], taps, dilation, age[row])
        np.testing.assert_allclose(convolution(x, age)[row], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        convolution(x)[1], convolved(x[1], taps, dilation, age[0]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["s", "l", "d"])
def test_a_part_with_what_is_before_it_equals_the_whole(kind):
    """Only what is matched comes from afar, and not in local layers."""
    config = dataclasses.replace(TINY, dilations=(2, 5))
    layer, reach = SparseXAttention(config, kind, rngs=nnx.Rngs(0)), 3 if kind == "l" else 24
    assert layer.conv_reach == reach
    x = np.random.default_rng(0).standard_normal((2, 60, TINY.model_dim), np.float32)
    age = np.stack([np.arange(60), np.r_[np.arange(40), np.arange(20)]])
    before, after = x[:, 30 - reach : 30], x[:, 30:]
    for whole, part in (
        (layer.mix(x), layer.mix(after, before)),
        (layer.mix(x, age=age), layer.mix(after, before, age[:, 30:])),
    ):
        np.testing.assert_allclose(part.near, whole.near[:, 30:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(part.far, whole.far[:, 30:], rtol=1e-5, atol=1e-6)
        assert (whole.far is whole.near) == (kind == "l")
    changed = x.copy()
    changed[0, 10] += 1
    for name, last in (("near", 13), ("far", 10 + reach)):
        difference = getattr(layer.mix(changed), name) - getattr(layer.mix(x), name)
        moved = np.abs(difference[0]).max(axis=1).nonzero()[0]
        assert moved[0] == 10 and moved[-1] == last
