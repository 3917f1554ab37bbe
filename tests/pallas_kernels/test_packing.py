"""Results of entries in 12 bits a number."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper_lanes
from pallas_kernels.block_sparse_attention.mosaic_gpu import packing


def round_trip(x, scale):
    """x [entries, groups, D], scale f32 [entries]."""
    total = 2.0**-packing.SHIFT
    factor = packing.packing_factor(scale, total)[:, None, None]
    words = packing.pack_pairs(hopper_lanes.plain_narrow(x * total * factor))
    assert words.shape == (*x.shape[:2], packing.width(x.shape[2]))
    return np.asarray(packing.unpack_entries(words, scale))


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [2.0**-35, 1.0, 2.0**59])
def test_bf16_of_what_is_large_enough(dim, size):
    """The largest numbers of a block and those up to 2^13 times smaller are bf16's."""
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-13, 0, size=(5, 8, dim))) * rng.choice([-1, 1], size=(5, 8, dim))
    x = jnp.asarray(x * size, jnp.float32)
    scale = packing.scales(jnp.full((1, 5 * 8, 1, 1), 0.99 * size, jnp.bfloat16), 8)[0, :, 0]
    assert scale.shape == (5,) and (np.asarray(scale) <= 2 * size).all()
    np.testing.assert_array_equal(round_trip(x, scale), rounded(x))


def test_what_is_too_small_is_close():
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, size=(2, 8, 64)) * 2**-15, jnp.float32)
    scale = jnp.ones(2, jnp.float32)
    assert np.max(np.abs(round_trip(x, scale) - x)) <= 2.0**-14


class TestScales:
    def test_of_each_block(self):
        v = np.zeros((1, 10, 2, 3), np.float32)
        v[0, 0, 0, 1], v[0, 5, 0, 2], v[0, 9, 1, 0] = -3, 4, 0.2
        found = packing.scales(jnp.asarray(v, jnp.bfloat16), 4)
        least = 2.0**-40
        np.testing.assert_array_equal(found[0], [[4, least], [8, least], [least, 0.25]])

    @pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**60])
    def test_what_cannot_be_packed_is_nan(self, value):
        v = jnp.ones((1, 8, 1, 64), jnp.bfloat16).at[0, 5, 0, 7].set(value)
        scale = packing.scales(v, 4)[0, :, 0]
        np.testing.assert_array_equal(np.isnan(scale), [False, True])
        assert np.isnan(round_trip(jnp.ones((2, 8, 64)), scale)[1]).all()
