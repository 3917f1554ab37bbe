"""Caches of more than 2^31 numbers: addresses do not fit in 32 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from sparsex_jax.cache.device import write
from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import gather_keys

SIZE = AttentionConfig().block_size


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 256])
def test_keys_beyond_2_to_the_31_are_written_and_found(tokens):
    whole, end = 2**24 + 2**16, 2**12  # of 128 numbers each; the last `end` tokens are looked at
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    small = [normal(1, end, 2, 64) for _ in range(2)]
    fill = jax.jit(
        lambda x: write(jnp.zeros((1, whole, 2, 64), x.dtype), x, jnp.int32(whole - end))
    )
    large = [fill(x) for x in small]
    salience = normal(1, end, 2, dtype=jnp.float32)
    place = jnp.asarray(rng.integers(0, end, (1, 2, 300)), jnp.int32)
    behind = jnp.pad(salience, ((0, 0), (whole - end, 0), (0, 0)))
    found = jax.jit(gather_keys)(*large, behind, place + whole - end)
    for x, y in zip(found, gather_keys(*small, salience, place), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    chosen = [rng.permutation(end // SIZE)[:16] for _ in range(2 * tokens)]
    index = jnp.asarray(np.reshape(chosen, (1, tokens, 2, 16)), jnp.int32)
    blocks = BlockCSR.from_selection(index, normal(*index.shape, dtype=jnp.float32), end // SIZE)
    moved = dataclasses.replace(
        blocks, indices=blocks.indices + (whole - end) // SIZE, num_columns=whole // SIZE
    )
    q = normal(1, tokens, 4, 64)
    attend = jax.jit(lambda *x: block_sparse_attention(*x, block_size=SIZE))
    for x, y in zip(attend(q, *large, moved), attend(q, *small, blocks), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0.02, atol=0.02
        )
