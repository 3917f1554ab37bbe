"""Blocks searched in two levels: the op, the model, the loss that teaches it, and the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.cache import Engine, host
from sparsex_jax.cache.layer import empty_layers
from sparsex_jax.cache.model import extend
from sparsex_jax.cache.store import CacheDirectory
from sparsex_jax.config import AttentionConfig, ConfigError
from sparsex_jax.scoring import BlockIndex, Blocks, node_features, pool_blocks, rms_normalize
from sparsex_jax.selection_loss import selection_loss
from tests.cache.test_engine import greedy
from tests.modules.test_transformer import TINY, make, make_tokens, predict
from tests.test_attention import SMALL, SOFTMAX, attend, make_inputs, reference

NODES = {"search_node_size": 8, "search_beam": 1}  # a node has 64 tokens
IN_NODES = dataclasses.replace(SMALL, **NODES)
SOFTMAX_IN_NODES = dataclasses.replace(SOFTMAX, **NODES)
TOKENS = 277


@pytest.mark.parametrize(
    ("config", "documents"),
    [
        (IN_NODES, True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((IN_NODES, False), (SOFTMAX_IN_NODES, False), (SOFTMAX_IN_NODES, True))
        ),
    ],
)
def test_equals_its_definition(config, documents):
    inputs = make_inputs(config, TOKENS)
    ids = np.repeat([3, 1], (72, TOKENS - 72))[None] if documents else None
    found = attend(config, inputs, segment_ids=ids)
    np.testing.assert_allclose(found, reference(config, inputs, ids), rtol=2e-5, atol=2e-5)
    flat = dataclasses.replace(config, search_node_size=0)
    del inputs["block_mass"]
    assert np.abs(found - attend(flat, inputs, segment_ids=ids)).max() > 0.1  # it misses blocks


def test_a_beam_of_all_nodes_searches_all_blocks():
    wide = dataclasses.replace(IN_NODES, search_beam=4)
    inputs = make_inputs(wide, TOKENS, seed=1)
    bar = np.random.default_rng(2).standard_normal(inputs["q"].shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(config, inputs):
        out, pull_back = jax.vjp(lambda x: attend(config, x), inputs)
        return out, pull_back(bar)[0]

    out, bars = both(wide, inputs)
    mass_bar = bars.pop("block_mass")
    del inputs["block_mass"]
    expected, expected_bars = both(SMALL, inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    for name, value in expected_bars.items():
        np.testing.assert_allclose(bars[name], value, rtol=1e-5, atol=1e-5)
    assert not np.any(mass_bar)  # which blocks are searched has no gradient


def test_no_bit_depends_on_later_tokens():
    inputs, other = (make_inputs(IN_NODES, TOKENS, seed=seed) for seed in (3, 4))
    run = jax.jit(lambda inputs: attend(IN_NODES, inputs))
    before = run(inputs)
    for changed in (64, 150, 200):
        mixed = {}
        for name, x in inputs.items():
            first = changed // IN_NODES.block_size if name.startswith("block") else changed
            mixed[name] = np.concatenate((x[:, :first], 9 * other[name][:, first:]), axis=1)
        np.testing.assert_array_equal(run(mixed)[:, :changed], before[:, :changed])


def test_mass_must_be_given():
    inputs = make_inputs(IN_NODES, TOKENS)
    mass = inputs.pop("block_mass")
    with pytest.raises(ValueError, match="block_mass is missing: this config needs it"):
        attend(IN_NODES, inputs)
    with pytest.raises(ValueError, match="block_mass is given, but .*search_node_size=0"):
        attend(SMALL, {**inputs, "block_mass": mass})


def test_a_node_is_pooled_as_its_tokens_would_be_at_once():
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = rms_normalize(jax.random.normal(keys[0], (2, 130, 3, 4)))
    logits = 3 * jax.random.normal(keys[1], (2, 130, 3))
    of_one_token = dataclasses.replace(IN_NODES, block_size=1, landmarks_per_segment=1)
    blocks = pool_blocks(inputs, logits, of_one_token)
    at_once = pool_blocks(inputs, logits, IN_NODES).features
    np.testing.assert_allclose(node_features(blocks, of_one_token), at_once, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(blocks.mass, logits, rtol=1e-6)
    assert node_features(Blocks(blocks.features, None), SMALL) is None


def test_nodes_learn_what_their_blocks_have_together():
    config = AttentionConfig(window=8, block_size=8, top_k=2, segment_length=16, score_dim=4)
    in_nodes = dataclasses.replace(config, **NODES)
    keys = jax.random.split(jax.random.key(4), 5)
    q, k, u, c = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys, ((1, 220, 2, 6), (1, 220, 1, 6), (1, 220, 1, 4), (1, 27, 1, 4)), strict=False
        )
    )
    mass = jax.random.normal(keys[4], (1, 27, 1))
    queries, t = jnp.asarray([[219]], jnp.int32), 219

    def loss(c, mass, config):
        index = BlockIndex.of(Blocks(c, mass), config)
        return selection_loss(q, k, u, index, queries, None, config)[0]

    # Of the 26 blocks before the window 24 are in whole nodes, three of them.
    best = jnp.einsum("gd,nsd->gns", q[0, t], k[0, :208, 0].reshape(26, 8, 6)).max(-1)
    target = jax.nn.softmax(2 * best / 6**0.5, axis=1).mean(0)[:24].reshape(3, 8).sum(1)
    share = jax.nn.log_softmax(node_features(Blocks(c, mass), in_nodes)[0, :, 0] @ u[0, t, 0])
    expected = jnp.sum(target * (jnp.log(target / target.sum()) - share))
    both, flat = loss(c, mass, in_nodes), loss(c, None, config)
    np.testing.assert_allclose(both - flat, expected, rtol=1e-5)
    bars = jax.grad(loss, (0, 1))(c, mass, in_nodes)
    assert all(bool(jnp.any(bar != 0)) for bar in bars)


LAYERS = dataclasses.replace(
    TINY, layers="sl", attention=dataclasses.replace(TINY.attention, **NODES)
)


def test_the_model_learns_to_pool_nodes():
    tokens = make_tokens(1, TOKENS)
    model = make(dataclasses.replace(LAYERS, selection_loss=1.0))
    weights = np.ones(tokens.shape, np.float32)
    grads = nnx.jit(nnx.grad(lambda model: model.loss(tokens, tokens, weights)[0]))(model)
    for name in ("pool", "score_key", "score_query"):
        for leaf in jax.tree.leaves(grads["blocks"][0]["attention"][name]):
            assert np.isfinite(leaf).all() and np.any(leaf != 0), name


def test_any_chunking_equals_the_forward_pass():
    model, tokens = make(LAYERS), make_tokens(2, TOKENS)
    step, expected = nnx.jit(extend), predict(model, tokens)
    flat = make(dataclasses.replace(LAYERS, attention=TINY.attention))
    assert np.abs(expected - predict(flat, tokens)).max() > 1e-2
    layers, read = empty_layers(model.config, TOKENS, 2, TOKENS), 0
    for chunk in (1,) * 3 + (53,) * 5 + (1,) * 2:
        part = tokens[:, read : read + chunk]
        logits, layers = step(model, layers, part, jnp.int32(read), jnp.int32(chunk))
        read += chunk
        np.testing.assert_allclose(logits, expected[:, read - 1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("tier", ["device", pytest.param("host", marks=pytest.mark.long)])
def test_generation_equals_the_forward_pass_also_from_disk(tier, monkeypatch, tmp_path):
    monkeypatch.setattr(host, "PAGE", 64)
    model, tokens = make(LAYERS), make_tokens(1, 250)
    expected = greedy(model, tokens, 20)
    engine, directory = Engine(model, capacity=280, chunk=48, tier=tier), tmp_path / "cache"
    cache = engine.prefill(tokens[:, :240])
    CacheDirectory(directory, {}).save(engine, cache, tokens[0])
    for each in (cache, CacheDirectory(directory, {}).load(engine)):
        np.testing.assert_array_equal(engine.answer(each, tokens[:, 240:], 20), expected)


def test_refused():
    for fields, message in (
        ({"search_node_size": 12}, "search_node_size=12 must be a multiple of 8 up to 64"),
        ({"search_node_size": 72}, "or 0 to search all blocks: use 8"),
        ({"search_node_size": 8, "search_beam": 0}, "search_beam=0 must be positive"),
        ({"search_node_size": 8, "search_beam": 1}, "fewer than top_k=16: use search_beam=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            AttentionConfig(**fields)
