"""The convolution along the tokens, against sums written out."""

import numpy as np
from flax import nnx

from sparsex_jax.modules.attention import SparseXAttention
from sparsex_jax.modules.layers import CausalConvolution
from tests.modules.test_transformer import TINY


def convolved(x, taps, age):
    """x plus its convolution, [T, C]."""
    total = x.copy()
    for t in range(len(x)):
        for lag, tap in enumerate(taps):
            if lag <= min(t, age[t]):
                total[t] += tap * x[t - lag]
    return total


def test_taps_reach_back_within_a_document():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 30, 5), np.float32)
    age = np.stack([np.arange(30), np.r_[np.arange(12), np.arange(18)]])
    convolution = CausalConvolution(5, 4, rngs=nnx.Rngs(0))
    taps = np.asarray(convolution.taps[...])
    for row in range(2):
        expected = convolved(x[row], taps, age[row])
        np.testing.assert_allclose(convolution(x, age=age)[row], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        convolution(x)[1], convolved(x[1], taps, age[0]), rtol=1e-5, atol=1e-6
    )


def test_a_part_with_what_is_before_it_equals_the_whole():
    layer, reach = SparseXAttention(TINY, "s", rngs=nnx.Rngs(0)), TINY.conv_reach
    x = np.random.default_rng(0).standard_normal((2, 60, TINY.model_dim), np.float32)
    age = np.stack([np.arange(60), np.r_[np.arange(40), np.arange(20)]])
    before, after = x[:, 30 - reach : 30], x[:, 30:]
    for whole, part in (
        (layer.mix(x), layer.mix(after, before)),
        (layer.mix(x, age=age), layer.mix(after, before, age[:, 30:])),
    ):
        np.testing.assert_allclose(part, whole[:, 30:], rtol=1e-5, atol=1e-6)
    changed = x.copy()
    changed[0, 10] += 1
    moved = np.abs(layer.mix(changed) - layer.mix(x))[0].max(axis=1).nonzero()[0]
    assert moved.tolist() == [10, 11, 12, 13]
