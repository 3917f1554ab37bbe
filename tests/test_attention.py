"""The whole op against its token-by-token definition."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_selection import select_blocks
from sparsex_jax import attention
from sparsex_jax.attention import sparse_attention
from sparsex_jax.config import AttentionConfig, ConfigError
from sparsex_jax.fusion import merge_softmax
from sparsex_jax.spans import remote_end
from tests.attention_reference import sparse_attention_reference

SMALL = AttentionConfig(
    window=16, block_size=8, top_k=2, segment_length=16, landmarks_per_segment=2,
    nodes_per_level=2, score_dim=4,
)  # fmt: skip
SOFTMAX = dataclasses.replace(SMALL, fusion="softmax", landmarks="off")
ALL = dataclasses.replace(SMALL, landmarks="all")
NEAR = dataclasses.replace(SMALL, top_k=3, near_reach=24, recency=True)


def make_inputs(config, tokens, *, batch=1, heads=4, kv_heads=2, dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    inputs = {name: normal(batch, tokens, n, dim) for name, n in
              (("q", heads), ("k", kv_heads), ("v", kv_heads))}  # fmt: skip
    if config.landmarks != "off":
        inputs["salience"] = np.round(normal(batch, tokens, kv_heads), 1)  # with ties
    if config.top_k:
        blocks = tokens // config.block_size
        inputs["query_features"] = normal(batch, tokens, kv_heads, config.score_dim)
        inputs["block_features"] = normal(batch, blocks, kv_heads, config.score_dim)
        if config.search_node_size:
            inputs["block_mass"] = normal(batch, blocks, kv_heads)
    if config.fusion == "sum" and config.landmarks != "off":
        inputs["landmark_gate"] = np.abs(normal(batch, tokens, heads))
    if config.fusion == "sum" and config.top_k:
        inputs["dynamic_gate"] = np.abs(normal(batch, tokens, heads))
    if config.recency and config.top_k:
        inputs["recency"] = np.abs(normal(batch, tokens, kv_heads))
    return inputs


def attend(config, inputs, **options):
    """The op as one program: its steps one by one would be hundreds, each compiled."""
    return jax.jit(lambda inputs: sparse_attention(**inputs, config=config, **options))(inputs)


def reference(config, inputs, segment_ids=None):
    names = {"query_features": "u", "block_features": "c", "block_mass": "mass",
             "landmark_gate": "gate_g", "dynamic_gate": "gate_d"}  # fmt: skip
    renamed = {names.get(name, name): value for name, value in inputs.items()}
    return sparse_attention_reference(**renamed, config=config, segment_ids=segment_ids)[0]


def dense_causal(q, k, v):
    """Dense attention with RoPE in the terms of the reference."""
    wide = AttentionConfig(window=2048, block_size=64, top_k=0, landmarks="off")
    return sparse_attention_reference(q, k, v, wide)[0]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SOFTMAX,
        NEAR,
        dataclasses.replace(SMALL, landmarks="all"),
        dataclasses.replace(SMALL, landmarks="off"),
        dataclasses.replace(SMALL, top_k=0),
        dataclasses.replace(SMALL, window=32, segment_length=8, nodes_per_level=1, top_k=3),
        dataclasses.replace(SMALL, window=8, segment_length=32, nodes_per_level=3),
    ],
)
@pytest.mark.parametrize(
    "tokens", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 16)), 100, 131]
)
def test_equals_its_definition(config, tokens):
    inputs = make_inputs(config, tokens, batch=2 if tokens < 120 else 1)
    np.testing.assert_allclose(
        attend(config, inputs), reference(config, inputs), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("config", [SMALL, SOFTMAX, ALL, NEAR])
def test_packed_documents_equal_their_definition_and_separate_ones(config):
    lengths = (40, 8, 72)  # each a whole number of blocks
    segment_ids = np.repeat([3, 1, 2], lengths)[None]
    inputs = make_inputs(config, sum(lengths), seed=1)
    packed = np.asarray(attend(config, inputs, segment_ids=segment_ids))
    expected = reference(config, inputs, segment_ids)
    np.testing.assert_allclose(packed, expected, rtol=2e-5, atol=2e-5)
    begin = 0
    for length in lengths:

        def cut(name, x, begin=begin, length=length):
            unit = config.block_size if name.startswith("block") else 1
            return x[:, begin // unit : (begin + length) // unit]

        alone = attend(config, {name: cut(name, x) for name, x in inputs.items()})
        np.testing.assert_allclose(packed[:, begin : begin + length], alone, rtol=2e-5, atol=2e-5)
        begin += length


@pytest.mark.parametrize(
    "config", [AttentionConfig(), AttentionConfig(fusion="softmax", landmarks="off")]
)
def test_window_covers_short_contexts_exactly(config):
    inputs = make_inputs(config, 130, dim=16)
    out = attend(config, inputs)
    np.testing.assert_allclose(
        out, dense_causal(inputs["q"], inputs["k"], inputs["v"]), rtol=2e-5, atol=2e-5
    )
    local = dataclasses.replace(config, top_k=0, landmarks="off")
    alone = attend(local, {name: inputs[name] for name in "qkv"})
    np.testing.assert_array_equal(out, alone)


def test_softmax_fusion_over_all_blocks_is_dense():
    config = dataclasses.replace(SOFTMAX, top_k=32)
    inputs = make_inputs(config, 150, seed=2)
    np.testing.assert_allclose(
        attend(config, inputs), dense_causal(inputs["q"], inputs["k"], inputs["v"]),
        rtol=2e-5, atol=2e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tokens", "lengths"),
    [
        (SMALL, 150, (40, 8, 64, 40)),
        (NEAR, 150, None),
        pytest.param(SOFTMAX, 144, None, marks=pytest.mark.long),
        pytest.param(ALL, 144, (40, 8, 64, 40), marks=pytest.mark.long),
    ],
)
def test_chunks_of_tokens_equal_the_whole(config, tokens, lengths, monkeypatch):
    segment_ids = None if lengths is None else np.repeat(np.arange(4), lengths)[None, :tokens]
    inputs = make_inputs(config, tokens, seed=3)
    cotangent = np.random.default_rng(5).standard_normal(inputs["q"].shape).astype(np.float32)

    def results():
        def f(inputs):
            return attend(config, inputs, segment_ids=segment_ids)

        out, vjp = jax.jit(lambda inputs: jax.vjp(f, inputs))(inputs)
        return out, vjp(cotangent)[0]

    whole = results()
    monkeypatch.setattr(attention, "_CHUNK", 48)
    chex.assert_trees_all_close(results(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (SMALL, (40, 8, 64, 38)),
        (NEAR, None),
        pytest.param(SOFTMAX, None, marks=pytest.mark.long),
        pytest.param(ALL, None, marks=pytest.mark.long),
    ],
)
def test_queries_of_the_last_tokens_get_what_they_get_among_all(config, lengths, monkeypatch):
    tokens, count = 150, 67
    segment_ids = None if lengths is None else np.repeat(np.arange(4), lengths)[None]
    inputs = make_inputs(config, tokens, seed=3)
    cotangent = np.random.default_rng(5).standard_normal(inputs["q"].shape).astype(np.float32)
    cotangent[:, :-count] = 0
    of_queries = {"q", "query_features", "landmark_gate", "dynamic_gate", "recency"} & set(inputs)
    last = inputs | {name: inputs[name][:, -count:] for name in of_queries}

    def results(inputs):
        @jax.jit
        def both(inputs, bar):
            out, pull_back = jax.vjp(lambda x: attend(config, x, segment_ids=segment_ids), inputs)
            return out, pull_back(bar)[0]

        return both(inputs, cotangent[:, -inputs["q"].shape[1] :])

    out, bars = results(inputs)
    expected = out[:, -count:], bars | {name: bars[name][:, -count:] for name in of_queries}
    chex.assert_trees_all_close(results(last), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(attention, "_CHUNK", 48)
    chex.assert_trees_all_close(results(last), expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_tokens_under_shard_map(monkeypatch):
    """A mesh of one device is enough for the rules of what varies over a mesh."""
    monkeypatch.setattr(attention, "_CHUNK", 48)
    inputs = jax.tree.map(jnp.asarray, make_inputs(SMALL, 96, seed=3))
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(inputs["q"].shape), "f4")

    def results(inputs, cotangent):
        out, vjp = jax.vjp(lambda inputs: attend(SMALL, inputs), inputs)
        return out, vjp(cotangent)[0]

    expected = jax.jit(results)(inputs, cotangent)
    heads = jax.P(None, None, "device")
    specs = jax.tree.map(lambda _: heads, inputs)
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(results, mesh=mesh, in_specs=(specs, heads), out_specs=(heads, specs))
    found = jax.jit(sharded)(inputs, cotangent)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "chunk"), [(0, 150), pytest.param(1, 150, marks=pytest.mark.long), (2, 48)]
)
@pytest.mark.parametrize("config", [SMALL, SOFTMAX, ALL, NEAR])
def test_causality_is_strict(config, seed, chunk, monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK", chunk)
    tokens = 150
    rng = np.random.default_rng(seed)
    changed = int(rng.integers(20, tokens))
    before = make_inputs(config, tokens, seed=seed)
    other = make_inputs(config, tokens, seed=seed + 100)
    block = changed // config.block_size  # the first block whose features may change

    def mixed(name, x):
        first = block if name == "block_features" else changed
        return np.concatenate((x[:, :first], other[name][:, first:]), axis=1)

    after = {name: mixed(name, x) for name, x in before.items()}
    f = jax.jit(lambda inputs: attend(config, inputs))
    np.testing.assert_array_equal(f(before)[:, :changed], f(after)[:, :changed])

    limit = remote_end(jnp.arange(tokens, dtype=jnp.int32), 0, config) // config.block_size
    index = [
        np.asarray(select_blocks(x["query_features"], x["block_features"], limit, config.top_k)[0])
        for x in (before, after)
    ]
    np.testing.assert_array_equal(index[0][:, :changed], index[1][:, :changed])


@pytest.mark.parametrize("config", [SMALL, SOFTMAX, ALL, NEAR])
def test_gradients_against_finite_differences(config):
    with jax.enable_x64(True):
        inputs = make_inputs(config, 60, heads=2, kv_heads=1, dim=4, dtype=np.float64)
        if "salience" in inputs:  # no ties: a tiny step would break them
            inputs["salience"] += np.random.default_rng(2).random(inputs["salience"].shape)
        inputs = jax.tree.map(jnp.asarray, inputs)
        rng = np.random.default_rng(1)
        cotangent = rng.standard_normal(inputs["q"].shape)

        @jax.jit
        def f(inputs):
            return jnp.sum(attend(config, inputs) * cotangent)

        gradients = jax.jit(jax.grad(f))(inputs)
        for name, gradient in gradients.items():
            # A random direction of one input at a time; selections do not change over 1e-6.
            direction = rng.standard_normal(gradient.shape)
            low, high = (
                f({**inputs, name: inputs[name] + sign * 1e-6 * direction}) for sign in (-1, 1)
            )
            expected = float(high - low) / 2e-6
            assert abs(expected) > 1e-6 or (name, config.fusion) in {
                ("query_features", "softmax"), ("block_features", "softmax"),
            }  # fmt: skip
            np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("config", [SMALL, SOFTMAX])
def test_gradients_against_the_reference_implementation(config):
    inputs = make_inputs(config, 100, batch=2, seed=4)
    cotangent = np.random.default_rng(5).standard_normal(inputs["q"].shape).astype(np.float32)
    gradients = [
        jax.vjp(lambda x, name=name: attend(config, x, implementation=name), inputs)[1](cotangent)[
            0
        ]
        for name in ("xla", "reference")
    ]
    for name in inputs:
        np.testing.assert_allclose(
            gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4, err_msg=name
        )


@pytest.mark.parametrize(
    "config", [SMALL, *(pytest.param(x, marks=pytest.mark.long) for x in (SOFTMAX, ALL, NEAR))]
)
def test_gradients_of_packed_documents(config):
    lengths = config.block_size * np.random.default_rng(0).integers(1, 12, 24)
    segment_ids = np.repeat(np.arange(24), lengths)[None]
    inputs = make_inputs(config, segment_ids.size, seed=4)
    cotangent = np.random.default_rng(5).standard_normal(inputs["q"].shape).astype(np.float32)

    def gradients(implementation):
        def f(inputs):
            return attend(config, inputs, segment_ids=segment_ids, implementation=implementation)

        return jax.jit(lambda inputs: jax.vjp(f, inputs)[1](cotangent)[0])(inputs)

    chex.assert_trees_all_close(gradients("xla"), gradients("reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, SOFTMAX, ALL])
def test_documents_within_a_block_do_not_leak_under_jit(config):
    lengths = (43, 5, 101, 90)  # starts that no check can see under jit
    segment_ids = np.repeat([0, 1, 2, 3], lengths)[None]
    before = make_inputs(config, sum(lengths), seed=1)
    other = make_inputs(config, sum(lengths), seed=2)
    f = jax.jit(lambda inputs, segment_ids: attend(config, inputs, segment_ids=segment_ids))
    unchanged = np.asarray(f(before, segment_ids))
    begins = np.cumsum((0, *lengths))
    for begin, end in itertools.pairwise(begins):

        def mixed(name, x, begin=begin, end=end):
            position = np.arange(x.shape[1])
            if name == "block_features":  # of a block with one token of another document, too
                first, last = position * config.block_size, (position + 1) * config.block_size
            else:
                first, last = position, position + 1
            own = (begin <= first) & (last <= end)
            return np.where(own.reshape(1, -1, *[1] * (x.ndim - 2)), x, other[name])

        changed = f({name: mixed(name, x) for name, x in before.items()}, segment_ids)
        np.testing.assert_array_equal(changed[:, begin:end], unchanged[:, begin:end])


def test_merging_nothing_with_nothing_has_gradients():
    rng = np.random.default_rng(0)
    shape = (1, 6, 2)
    lse_1, lse_2 = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    lse_1[:, :4] = -np.inf
    lse_2[:, 2:] = -np.inf
    branches = [
        (np.where(lse[..., None] > -np.inf, rng.standard_normal((*shape, 4)), 0).astype(np.float32),
         lse)
        for lse in (lse_1, lse_2)
    ]  # fmt: skip

    def loss(branches):
        out, lse = merge_softmax(*branches)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0))

    out, lse = merge_softmax(*branches)
    both = np.maximum(lse_1, lse_2)  # no query has keys in both
    np.testing.assert_allclose(lse, both)
    np.testing.assert_allclose(out, branches[0][0] + branches[1][0], rtol=1e-6)
    gradients = jax.grad(loss)(branches)
    for (out_bar, lse_bar), (_, lse) in zip(gradients, branches, strict=True):
        assert np.isfinite(out_bar).all()
        alone = np.where(lse > -np.inf, -np.sin(np.where(lse > -np.inf, lse, 0)), 0)
        np.testing.assert_allclose(lse_bar, alone, atol=1e-6)


def test_empty_sequence():
    inputs = make_inputs(SMALL, 0)
    assert attend(SMALL, inputs).shape == inputs["q"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((1, 40, 4))}, "must be \\[batch, token, head, dim\\]"),
        ({"k": np.zeros((1, 41, 2, 8), np.float32)}, "must agree with q"),
        ({"q": np.zeros((1, 40, 3, 8), np.float32)}, "q has 3 heads: use a multiple of the 2"),
        ({"q": np.zeros((1, 41, 4, 8), np.float32)}, "q has 41 tokens, k 40"),
        ({"salience": None}, "salience is missing"),
        ({"block_features": np.zeros((1, 4, 2, 4), np.float32)}, "must be \\(1, 5, 2, 4\\)"),
        ({"v": np.zeros((1, 40, 2, 8), np.int32)}, "must be floating"),
        ({"segment_ids": np.repeat([0, 1], [12, 28])[None]}, "starts at token 12 of row 0"),
        ({"segment_ids": np.zeros((1, 39), int)}, "segment_ids has shape"),
        ({"segment_ids": np.zeros((1, 40))}, "use an integer type"),
        ({"implementation": "cuda"}, "cuda"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_attention(**{**make_inputs(SMALL, 40), "config": SMALL, **change})


def test_unused_arguments_are_refused():
    inputs = make_inputs(SMALL, 40)
    with pytest.raises(ValueError, match="salience is given, but landmarks='off'"):
        sparse_attention(**inputs, config=dataclasses.replace(SMALL, landmarks="off"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 500}, "window=500 must be a multiple of block_size=64: use 448 or 512"),
        ({"segment_length": 192}, "power of two: use 128"),
        ({"fusion": "softmax"}, "count landmark tokens twice"),
        ({"top_k": -1}, "top_k=-1"),
        ({"landmarks": "some"}, "landmarks='some'"),
        ({"block_size": 0}, "block_size=0 must be positive"),
        ({"near_reach": 100}, "near_reach=100 must be a multiple .*: use 64 or 128"),
        ({"near_reach": -64}, "near_reach=-64 must not be negative: use 0"),
        ({"near_reach": 64, "top_k": 1}, "use top_k=2 or more"),
        ({"recency": True, "fusion": "softmax", "landmarks": "off"}, "where blocks have no bias"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(**fields)


def test_unknown_config_field():
    with pytest.raises(TypeError, match="windw"):
        AttentionConfig(windw=64)
