"""Hashes of n-grams, against n-grams written out, and what they do to queries and keys."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.modules.attention import SparseXAttention
from sparsex_jax.modules.ngrams import NO_TOKEN, add_signs, hash_ngrams
from tests.modules.test_transformer import TINY

SIZES = (1, 2, 3, 6, 13, 16)


def repetitive(rows=2, tokens=200, seed=0):
    """Tokens of few kinds, and stretches that are there twice."""
    found = np.random.default_rng(seed).integers(0, 3, (rows, tokens), dtype=np.int32)
    found[:, 120:160] = found[:, 20:60]
    return found


def ngram(tokens, end, size, age):
    """The last tokens of a document, up to a size, that end before `end`."""
    return tuple(tokens[max(end - size, end - age) : end])


@pytest.mark.parametrize("documents", [(200,), (90, 1, 109)])
def test_hashes_are_the_same_where_ngrams_are(documents):
    tokens = repetitive()
    age = np.tile(np.concatenate([np.arange(n) for n in documents]), (2, 1))
    hashes = hash_ngrams(tokens, SIZES, age=None if len(documents) == 1 else age)
    for number, size in enumerate(SIZES):
        seen, of_hash = {}, {}
        for row, t in np.ndindex(tokens.shape):
            for kind, behind in ((hashes.before, 0), (hashes.ending, 1)):
                key = ngram(tokens[row], t + behind, size, age[row, t] + behind)
                value = int(kind[row, t, number])
                assert seen.setdefault(key, value) == value
                assert of_hash.setdefault(value, key) == key
        assert len(seen) > 3


def test_a_part_with_what_is_before_it_equals_the_whole():
    tokens, reach = repetitive(), max(SIZES)
    age = np.stack([np.arange(200), np.r_[np.arange(95), np.arange(105)]])
    for begin in (100, 4):
        first = max(0, begin - reach)
        history = np.pad(
            tokens[:, first:begin], ((0, 0), (reach - begin + first, 0)), constant_values=NO_TOKEN
        )
        for ages in (None, age):
            whole = hash_ngrams(tokens, SIZES, age=ages)
            own = None if ages is None else ages[:, begin:]
            part = hash_ngrams(tokens[:, begin:], SIZES, history, own)
            later = jax.tree.map(lambda x, n=begin: x[:, n:], whole)
            chex.assert_trees_all_equal(part, later)


def test_signs_agree_where_hashes_do_and_cancel_elsewhere():
    hashes = np.array([[[7, 1], [7, 2], [3, 4]]], np.uint32)
    weights = np.array([[0.5, 1.0], [2.0, 0.0]], np.float32)
    signs = np.asarray(add_signs(jnp.zeros((1, 3, 2, 4000)), hashes, weights))[0]
    np.testing.assert_allclose(np.square(signs).mean(axis=2), np.tile((4.25, 1), (3, 1)), rtol=0.1)
    products = np.einsum("ahd,bhd->hab", signs, signs) / np.array((17000, 4000))[:, None, None]
    # The first head weighs the second size four times as much; the other one not at all.
    assert abs(products[0, 0, 1] - 0.25 / 4.25) < 0.05 and abs(products[0, 0, 2]) < 0.05
    assert products[1, 0, 1] > 0.999 and abs(products[1, 0, 2]) < 0.05


def test_the_share_of_each_hash_is_learned():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 3, 40), np.float32)
    hashes = rng.integers(0, 2**32, (2, 12, 4), dtype=np.uint32)
    weights = rng.standard_normal((4, 3), np.float32)

    def total(x, weights):
        return jnp.sum(add_signs(x, hashes, weights) * jnp.sin(jnp.arange(x.size).reshape(x.shape)))

    chex.assert_numerical_grads(total, (x, weights), order=1, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("kind", "matches"), [("s", True), ("d", True), ("l", False)])
def test_a_query_finds_the_token_behind_the_longest_match(kind, matches):
    """Places that go on alike for 3 tokens are told from one that has for 6."""
    config = dataclasses.replace(TINY, ngrams=(2, 4, 6), head_dim=128)
    layer = SparseXAttention(config, kind, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(6, 64, (1, 120), dtype=np.int32)
    tokens[0, 114:] = range(6)
    tokens[0, 40:46] = range(6)
    tokens[0, 20:23] = tokens[0, 80:83] = range(3, 6)
    hashes = layer.hash(tokens)
    assert (hashes is not None) == matches
    if not matches:
        return
    same = jnp.zeros((1, 120, TINY.model_dim))  # nothing but the signs
    q = layer.query_side(same, same, hashes).q[0, -1]
    k = layer.key_side(same, same, hashes).k[0]
    for head in range(TINY.num_heads):
        order = np.argsort(-np.asarray(k[:119, head // 2] @ q[head]))
        assert order[0] == 46 and set(order[1:3]) == {23, 83}


def test_a_layer_has_a_weight_for_each_size_and_head():
    plain, with_ngrams = (
        SparseXAttention(dataclasses.replace(TINY, ngrams=sizes), "s", rngs=nnx.Rngs(0))
        for sizes in ((), (2, 5))
    )
    first, second = (set(nnx.to_pure_dict(nnx.state(x))) for x in (plain, with_ngrams))
    assert second - first == {"query_log_signs", "key_log_signs"} and first < second
    assert with_ngrams.query_log_signs.shape == (2, 4)
    assert with_ngrams.key_log_signs.shape == (2, 2)
