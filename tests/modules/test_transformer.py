"""The model: loss, packing, causality, sharding metadata."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.config import AttentionConfig, BaselineConfig, ConfigError, ModelConfig
from sparsex_jax.modules import Transformer, layers
from sparsex_jax.modules.attending import attending_for_loss

ATTENTION = AttentionConfig(
    window=16, block_size=8, top_k=2, segment_length=16, landmarks_per_segment=2,
    nodes_per_level=2, score_dim=8,
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=64, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, layers="ls",
    ngrams=(2, 5), attention=ATTENTION, dtype="float32", loss_chunk=32,
)  # fmt: skip


def make(config=TINY, seed=0):
    """A model whose parameters are all random: with those of the start the gates are all 1."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param):
            scale = 0.3 if "kernel" not in path else parameter.shape[0] ** -0.5
            noise = scale * rng.standard_normal(parameter.shape).astype(np.float32)
            parameter[...] = parameter[...] + noise
    return model


def make_tokens(batch, tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 64, (batch, tokens), dtype=np.int32)


@nnx.jit
def hidden_states(model, tokens, segment_ids=None):
    """As one program: the model's steps one by one would be hundreds, each compiled."""
    return model(tokens, segment_ids)


@nnx.jit
def predict(model, tokens):
    """Logits after each token, likewise."""
    return model.logits(model(tokens))


def test_each_query_head_learns_a_scale():
    x = np.random.default_rng(0).standard_normal((1, 40, TINY.model_dim), np.float32)
    for number in range(2):  # of a local and a sparse layer
        layer = Transformer(dataclasses.replace(TINY, qk_scale=True), rngs=nnx.Rngs(0))
        attention = layer.blocks[number].attention
        before = attention.query_side(x, x).q
        np.testing.assert_allclose(np.square(before).mean(axis=3), 1, rtol=1e-3)
        attention.qk_log_scale[...] = np.log([1.0, 2.0, 3.0, 0.5]).astype(np.float32)
        after = attention.query_side(x, x).q
        np.testing.assert_allclose(
            after, before * np.array([1, 2, 3, 0.5])[:, None], rtol=1e-6, atol=1e-6
        )


def test_chunked_loss_equals_plain_loss():
    model, tokens = make(), make_tokens(2, 51)
    weights = np.random.default_rng(1).random((2, 50), np.float32)
    total, count = nnx.jit(lambda m: m.loss(tokens[:, :-1], tokens[:, 1:], weights))(model)
    logits = np.asarray(predict(model, tokens[:, :-1]), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, tokens[:, 1:, None], axis=-1
    )[..., 0]  # fmt: skip
    np.testing.assert_allclose(total, np.sum(nll * weights), rtol=1e-5)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("layers", "documents", "remat"),
    [
        ("sl", (56, 104, 24), "none"),
        pytest.param("ls", None, "layer", marks=pytest.mark.long),
        ("ld", (56, 104, 24), "none"),
        ("b", None, "none"),
    ],
)
def test_loss_of_the_last_tokens_alone(layers, documents, remat):
    length, counted = 184, 37
    config = dataclasses.replace(
        TINY, layers=layers, selection_loss=0.5 * ("s" in layers),
        attention=dataclasses.replace(ATTENTION, landmarks="off"),
        baseline=BaselineConfig(window=16, global_tokens=8, random_blocks=2),
    )  # fmt: skip
    tokens = make_tokens(2, length + 1)
    ids = None if documents is None else np.tile(np.repeat(np.arange(3), documents), (2, 1))
    weights = np.random.default_rng(1).random((2, length), np.float32)
    weights[:, :-counted] = 0

    def results(config, **options):
        def loss(model):
            shifted = tokens[:, :-1], tokens[:, 1:]
            return model.loss(
                *shifted, weights, ids, top_k=3, implementation="reference", **options
            )[0]

        loss, gradient = nnx.jit(nnx.value_and_grad(loss))(make(config))
        return loss, nnx.to_pure_dict(gradient)

    # Scores learn from all tokens that count, here: from the same queries.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.selection_loss.SAMPLE", counted)
        expected = results(config)
        found = results(dataclasses.replace(config, remat=remat), loss_tokens=counted)
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-5)


def test_layers_compute_no_more_than_the_last_tokens_need():
    # Windows of 16 begin at blocks of 8, and a convolution reaches 3 further back.
    def count(layers, tokens, outputs):
        return attending_for_loss(dataclasses.replace(TINY, layers=layers), tokens, outputs)

    assert count("llsl", 184, 37) == [184, 184, 64, 37]
    assert count("slll", 184, 37) == [128, 96, 64, 37]
    assert count("lld", 184, 37) == [184, 184, 37]
    assert count("ls", 64, 64) == [64, 64]


def test_remat_changes_no_gradient():
    tokens, gradients = make_tokens(1, 65), []
    for remat in ("none", "layer"):
        model = make(dataclasses.replace(TINY, remat=remat, ngrams=()))
        graph, state = nnx.split(model)
        forward = jax.make_jaxpr(lambda x, graph=graph: nnx.merge(graph, x)(tokens))(state)
        recomputed = sum("remat" in each.primitive.name for each in forward.eqns)
        assert recomputed == (len(TINY.layers) if remat == "layer" else 0)
        weights = np.ones((1, 64), np.float32)

        @nnx.jit
        def gradient(model, weights=weights):
            return nnx.grad(lambda m: m.loss(tokens[:, :-1], tokens[:, 1:], weights)[0])(model)

        gradients.append(nnx.to_pure_dict(gradient(model)))
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-5)


def test_feed_forward_of_some_tokens_at_a_time(monkeypatch):
    mlp = make().blocks[0].mlp
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 45, TINY.model_dim)), jnp.float32)

    def run():
        gradient = nnx.grad(lambda mlp, x: jnp.sum(jnp.sin(mlp(x))), argnums=(0, 1))
        return mlp(x), *jax.tree.leaves(gradient(mlp, x))

    whole = run()
    monkeypatch.setattr(layers, "TOGETHER", 16)
    monkeypatch.setattr(layers, "_ROWS", 4)
    assert "scan" in str(jax.make_jaxpr(mlp)(x))
    chex.assert_trees_all_close(run(), whole, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient():
    model, tokens = make(), make_tokens(2, 129)
    weights = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    gradients = nnx.jit(nnx.grad(lambda m: m.loss(tokens[:, :-1], tokens[:, 1:], weights)[0]))(
        model
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_causality_is_strict():
    model, tokens, other = make(), make_tokens(1, 100), make_tokens(1, 100, seed=1)
    f = nnx.jit(lambda m, x: m(x))
    for changed in (1, 37, 64, 99):
        mixed = np.concatenate((tokens[:, :changed], other[:, changed:]), axis=1)
        np.testing.assert_array_equal(f(model, tokens)[:, :changed], f(model, mixed)[:, :changed])


def test_packed_documents_equal_separate_ones():
    model, tokens = make(), make_tokens(1, 120)
    segment_ids = np.repeat([0, 1], [48, 72])[None]
    packed = hidden_states(model, tokens, segment_ids)
    for begin, end in ((0, 48), (48, 120)):
        np.testing.assert_allclose(
            packed[:, begin:end], hidden_states(model, tokens[:, begin:end]), rtol=1e-4, atol=1e-5
        )


def test_one_token():
    assert make()(make_tokens(1, 1)).shape == (1, 1, 32)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_no_token(implementation):
    model, tokens = make(), make_tokens(2, 0)
    for segment_ids in (None, tokens):
        assert model(tokens, segment_ids, implementation=implementation).shape == (2, 0, 32)
    total, count = model.loss(tokens, tokens, np.zeros((2, 0), np.float32))
    assert total == count == 0


def test_parameters_are_f32_and_name_their_axes():
    for path, parameter in nnx.iter_graph(make()):
        if isinstance(parameter, nnx.Param):
            assert parameter[...].dtype == jnp.float32, path
            assert len(parameter.axis_names) == parameter[...].ndim, path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must be a multiple of num_kv_heads=2: use 4 or 6"),
        ({"head_dim": 7}, "head_dim=7 must be even: use 8"),
        ({"layers": "lx"}, "layers='lx'"),
        ({"layers": ""}, "layers=''"),
        ({"remat": "all"}, "remat='all'"),
        ({"ngrams": (2, 0)}, r"ngrams=\(2, 0\) must be positive sizes: use \(4, 8, 16, 32\), say"),
        ({"ngrams": (2, 0.5)}, r"ngrams=\(2, 0.5\)"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **fields)
