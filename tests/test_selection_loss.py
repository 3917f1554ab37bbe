"""The loss that teaches block scores, against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.config import AttentionConfig, ConfigError, ModelConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.scoring import BlockIndex
from sparsex_jax.selection_loss import SAMPLE, sample_queries, selection_loss

CONFIG = AttentionConfig(window=16, block_size=8, top_k=2, segment_length=16, score_dim=4)
TOKENS, BLOCKS = 100, 12


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (2, TOKENS, 4, 6), (2, TOKENS, 2, 6), (2, TOKENS, 2, 4), (2, BLOCKS, 2, 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def loss_of(q, k, u, c, queries, document_start=None):
    return selection_loss(q, k, u, BlockIndex(c, None), queries, document_start, CONFIG)


def by_definition(q, k, u, c, queries, document_start=None):
    q, k, u, c = (np.asarray(x, np.float64) for x in (q, k, u, c))
    found = [[] for _ in queries]
    for b, t in np.ndindex(queries.shape):
        t = int(queries[b, t])
        start = 0 if document_start is None else int(document_start[b, t])
        blocks = range(start // 8, max(start, (t - 15) // 8 * 8) // 8)
        if len(blocks) < 2:
            continue
        for head in range(2):
            target = 0
            for row in q[b, t, 2 * head : 2 * head + 2]:
                best = np.array([(k[b, 8 * n : 8 * n + 8, head] @ row).max() for n in blocks])
                share = np.exp(2 * best / np.sqrt(6))
                target += share / share.sum() / 2
            share = np.exp([c[b, n, head] @ u[b, t, head] for n in blocks])
            found[b].append(np.sum(target * np.log(target / (share / share.sum()))))
    return [np.mean(each) for each in found]


@pytest.mark.parametrize("documents", [False, True])
def test_equals_its_definition(documents):
    queries = jnp.asarray([[99, 3, 40, 57, 16], [31, 98, 5, 77, 60]], jnp.int32)
    start = None
    if documents:
        start = jnp.asarray(np.where(np.arange(TOKENS) < 40, 0, 40)[None].repeat(2, 0), jnp.int32)
    loss = loss_of(*inputs(), queries, start)
    np.testing.assert_allclose(loss, by_definition(*inputs(), queries, start), rtol=1e-5)


def test_queries_may_be_taken_a_few_at_a_time(monkeypatch):
    queries = jnp.asarray([[99, 3, 40, 57, 16], [31, 98, 5, 77, 60]], jnp.int32)
    of_all = jax.value_and_grad(lambda *x: loss_of(*x, queries).sum(), (2, 3))(*inputs())
    monkeypatch.setattr("sparsex_jax.selection_loss._LOGITS", 0)
    monkeypatch.setattr("sparsex_jax.selection_loss._LEAST_QUERIES", 2)
    of_few = jax.value_and_grad(lambda *x: loss_of(*x, queries).sum(), (2, 3))(*inputs())
    for value, other in zip(jax.tree.leaves(of_all), jax.tree.leaves(of_few), strict=True):
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-7)


def test_only_features_learn():
    queries = jnp.asarray([[99, 60], [80, 70]], jnp.int32)
    bars = jax.grad(lambda x: loss_of(*x, queries).sum())(inputs())
    assert [bool(jnp.any(bar != 0)) for bar in bars] == [False, False, True, True]


def test_scores_learn_what_is_not_selected():
    q, k, u, c = inputs()
    queries = jnp.asarray([[99], [99]], jnp.int32)
    k = k.at[:, 5].set(100 * q[:, 99, ::2])  # the best key by far, in block 0
    c = c.at[:, 0].set(-u[:, 99])  # whose score is the lowest
    bar = jax.grad(lambda c: loss_of(q, k, u, c, queries).sum())(c)
    assert (jnp.einsum("bhd,bhd->bh", bar[:, 0], u[:, 99]) < 0).all()  # descent raises it


def test_queries_without_a_past():
    loss, bars = jax.value_and_grad(lambda x: loss_of(*x, jnp.zeros((2, 3), jnp.int32)).sum())(
        inputs()
    )
    assert loss == 0
    assert all(bool(jnp.all(bar == 0)) for bar in bars)


def test_nothing_later_matters():
    queries = jnp.asarray([[60], [50]], jnp.int32)
    q, k, u, c = inputs()
    changed = q, k.at[:, 48:].set(jnp.nan), u, c.at[:, 6:].set(jnp.nan)
    np.testing.assert_array_equal(
        loss_of(*changed, queries),
        loss_of(q, k, u, c, queries),
    )


def test_the_heaviest_tokens_are_sampled_evenly():
    weights = jnp.full((1, 4096), 0.1).at[0, 1000:3000].set(1.0)
    found = np.asarray(sample_queries(weights))[0]
    assert len(set(found.tolist())) == SAMPLE
    assert found.min() == 1000
    assert 2985 < found.max() < 3000
    few = np.asarray(sample_queries(jnp.full((1, 600), 0.1).at[0, 7].set(1.0)))[0]
    assert 7 in few
    assert len(set(few.tolist())) == SAMPLE
    assert sorted(np.asarray(sample_queries(jnp.ones((1, 9))))[0]) == list(range(9))


def tiny(**changes):
    config = ModelConfig(
        vocab_size=64, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=16,
        layers="ls", attention=CONFIG, dtype="float32",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_is_added_to_the_model_s_loss():
    tokens = jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 64)
    weights = jnp.ones((2, TOKENS)).at[:, 60:].set(2.0)

    def loss(weight):
        model = Transformer(tiny(selection_loss=weight), rngs=nnx.Rngs(0))
        return nnx.jit(lambda m: m.loss(tokens, tokens, weights))(model)

    none, one, two = (loss(weight) for weight in (0.0, 1.0, 2.0))
    assert one[0] > none[0]
    np.testing.assert_allclose(two[0] - none[0], 2 * (one[0] - none[0]), rtol=1e-3)
    assert none[1] == one[1]
    # Likelihoods, of which perplexities are made, are the same.
    likelihoods = (
        nnx.jit(lambda m: m.nll(tokens, tokens, weights))(
            Transformer(tiny(selection_loss=weight), rngs=nnx.Rngs(0))
        )
        for weight in (0.0, 2.0)
    )
    for found in likelihoods:
        np.testing.assert_allclose(found, none[0], rtol=1e-6)


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match=r"selection_loss=-0\.1 must not be negative: use 0"):
        tiny(selection_loss=-0.1)
