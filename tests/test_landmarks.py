"""Gathering landmarks; the pyramid itself is tested with the whole op."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import (
    build_pyramid,
    gather_keys,
    leaf_nodes,
    visible_landmarks,
    visible_nodes,
)


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


def test_what_is_seen_stands_together():
    """Whatever nodes of the levels are missing; of queries with any number of segments before."""
    config = AttentionConfig(
        window=8, block_size=8, segment_length=8, landmarks_per_segment=2, nodes_per_level=2
    )
    salience = jax.random.normal(jax.random.key(0), (1, 8 * 21, 2))
    leaves = leaf_nodes(salience, 0, config.segment_length, config.landmarks_per_segment)
    pyramid = build_pyramid(leaves, config, sliding=False)
    segments = jnp.arange(22, dtype=jnp.int32)[None]
    listed, length = visible_landmarks(pyramid, segments, None, config)
    spans = visible_nodes(segments[0], len(pyramid), config.nodes_per_level)
    assert listed.shape == (1, 2, 22, len(pyramid) * 3 * 2)
    for query in range(22):
        for head in range(2):
            expected = [
                nodes.token[0, head, first[query] : first[query] + count[query]].ravel()
                for nodes, (first, count) in zip(pyramid, spans, strict=True)
            ]
            expected = np.concatenate(expected)
            assert len(expected) == length[0, query]
            rest = np.full(listed.shape[3] - len(expected), -1)
            np.testing.assert_array_equal(listed[0, head, query], [*expected, *rest])
    assert set(np.asarray(length[0])) >= {0, 2, 4, 8, 10, 12}
