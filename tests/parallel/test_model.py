"""A model on meshes of all shapes, against the same on one device, and against its cache."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsex_jax.cache import Engine
from sparsex_jax.cache.model import extend
from sparsex_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig
from sparsex_jax.modules import Transformer, layers
from sparsex_jax.parallel.mesh import make_mesh
from sparsex_jax.parallel.prefill import make_prefill
from sparsex_jax.parallel.rules import partitions
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import gradients_of, place_batch, place_state
from tests.parallel.devices import COUNT, compile_quickly, on_devices

MODEL = ModelConfig(
    vocab_size=32, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, layers="s",
    attention=AttentionConfig(
        window=16, block_size=8, top_k=2, segment_length=16, landmarks_per_segment=2,
        nodes_per_level=2, score_dim=4, near_reach=24, recency=True,
    ),
    loss_chunk=64, dtype="float32", remat="layer", qk_scale=True,
    ngrams=(1, 6),
)  # fmt: skip
LENGTH = 32 * COUNT
ALL = [(2, 2, 1, 2, "auto", 2)] + [
    (*shape, strategy, 1)
    for shape in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(shape) == COUNT
    for strategy in (("ring", "dispatch") if shape[2] > 1 else ("auto",))
]


def model_for(tensor):
    """With as many KV heads as there are parts of them."""
    return dataclasses.replace(MODEL, num_heads=2 * max(2, tensor), num_kv_heads=max(2, tensor))


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (COUNT, LENGTH + 1)).astype(np.int32)
    lengths = rng.permuted(np.tile((40, 24, 8, 88, 32, 64), (COUNT, 1)), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": rng.random((COUNT, LENGTH), dtype=np.float32),
        "segment_ids": np.stack([np.repeat(np.arange(6), x) for x in lengths]).astype(np.int32),
    }


@functools.cache
def make_model(config):
    """With parameters that matter: gates and scores are not what they begin with."""
    skeleton, params = split_model(Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    for name in params:
        params[name] = params[name] + 0.1 * rng.standard_normal(params[name].shape, np.float32)
    return skeleton, params


def results(config, shape=None, strategy="auto", accumulation=1):
    """(nll, weight, gradients)."""
    skeleton, params = make_model(config)
    mesh = None if shape is None else make_mesh(MeshConfig(*shape))
    summed = gradients_of(skeleton, None, mesh, "reference", strategy)
    operands = (
        place_state({"params": params}, skeleton, mesh)["params"],
        place_batch(make_batch(), accumulation, mesh),
    )
    return jax.device_get(compile_quickly(jax.jit(summed).lower(*operands))(*operands))


@functools.cache
def expected(config):
    return results(config)


def compare(shape, strategy, accumulation, **changes):
    config = dataclasses.replace(model_for(shape[3]), **changes)
    nll, weight, gradients = expected(config)
    found = results(config, shape, strategy, accumulation)
    np.testing.assert_allclose(found[:2], (nll, weight), rtol=1e-6)
    assert 1 < nll / weight < 10
    for name, value in gradients.items():
        scale = np.abs(value).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(
            found[2][name], value, rtol=1e-4, atol=2e-5 * scale, err_msg=name
        )


@on_devices
def test_loss_and_gradients_equal_one_device():
    compare((1, 2, 2, 2), "dispatch", 1)


@pytest.mark.long
@on_devices
def test_scores_learn_the_same_on_every_mesh_of_whole_sequences():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "TOGETHER", 100)  # some tokens after the others in SwiGLU
        compare((2, 2, 1, 2), "auto", 2, selection_loss=0.5)


@pytest.mark.long
@pytest.mark.parametrize(("data", "fsdp", "seq", "tensor", "strategy", "accumulation"), ALL)
@on_devices
def test_every_mesh_equals_one_device(data, fsdp, seq, tensor, strategy, accumulation):
    compare((data, fsdp, seq, tensor), strategy, accumulation)


@on_devices
def test_reading_in_chunks_equals_the_forward_pass_of_a_split_sequence():
    tokens = make_batch()["tokens"][:1]
    skeleton, params = make_model(model_for(1))
    mesh = make_mesh(MeshConfig(1, 1, COUNT, 1))

    def logits(params, tokens):
        model = skeleton.build(params)
        return model.logits(model(tokens, implementation="reference", sequence_strategy="ring"))

    specs = partitions(params, skeleton.axes, mesh.shape)
    forward = jax.shard_map(
        logits, mesh=mesh, in_specs=(specs, P(None, "seq")), out_specs=P(None, "seq")
    )
    operands = place_state({"params": params}, skeleton, mesh)["params"], tokens
    whole = np.asarray(compile_quickly(jax.jit(forward).lower(*operands))(*operands))

    model, greedy = skeleton.build(params), whole[0].argmax(-1)
    engine = Engine(model, capacity=2 * LENGTH, chunk=64)
    cache = engine.prefill(tokens[:, :200])
    step = jax.jit(lambda *x: extend(model, *x)[0])
    part = tokens[:, 200:249], np.int32(200), np.int32(49)
    np.testing.assert_allclose(step(cache.layers, *part), whole[:, 248], rtol=2e-4, atol=2e-4)
    for place in (200, 230, 255):
        assert engine.answer(cache, tokens[:, 200 : place + 1], 1)[0, 0] == greedy[place]


@on_devices
def test_a_context_that_devices_share_leaves_what_one_would_remember():
    config, tokens = dataclasses.replace(model_for(2), layers="ls"), make_batch()["tokens"][:2]
    in_nodes = dataclasses.replace(config.attention, search_node_size=8, search_beam=1)
    config = dataclasses.replace(config, attention=in_nodes)
    skeleton, params = make_model(config)
    found = {}
    for shape in (None, (2, 1, 2, 2)):
        mesh = None if shape is None else make_mesh(MeshConfig(*shape))
        prefill = make_prefill(skeleton, config, mesh, "reference", "ring")
        operands = place_state({"params": params}, skeleton, mesh)["params"], tokens
        found[shape] = jax.device_get(compile_quickly(prefill.lower(*operands))(*operands))
    one, many = found.values()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), many, one)

    engine = Engine(skeleton.build(params), capacity=LENGTH, batch_size=2, chunk=64)
    cache = engine.prefill(tokens).layers
    remote = cache[1].remote
    logits, (local, sparse) = one
    assert logits.shape == (2, 32) and local.k.shape == (2, 16, 2, 8)
    for remembered, layer in zip((local, sparse), cache, strict=True):
        np.testing.assert_allclose(remembered.history, layer.recent.history, rtol=2e-4, atol=2e-5)
        assert (remembered.tokens is None) == (remembered is local)
        np.testing.assert_array_equal(remembered.tokens, layer.recent.tokens)
    for kept, wanted in (
        *((getattr(remote, name), getattr(sparse, name)) for name in ("k", "v", "salience")),
        *zip(remote.blocks, sparse.blocks, strict=True),
    ):
        part = np.asarray(kept)[:, : wanted.shape[1]]
        np.testing.assert_allclose(part, wanted, rtol=2e-4, atol=2e-5)


def test_baselines_are_not_prefilled_on_a_mesh():
    with pytest.raises(ConfigError, match="layers='ld' has layers of baselines"):
        make_prefill(None, dataclasses.replace(MODEL, layers="ld"), None)


@on_devices
def test_the_last_tokens_of_split_sequences_cannot_count_alone():
    skeleton, params = make_model(MODEL)
    mesh = make_mesh(MeshConfig(1, COUNT // 2, 2, 1))
    step = gradients_of(skeleton, None, mesh, "reference", "auto", loss_tokens=8)
    state = place_state({"params": params}, skeleton, mesh)["params"]
    with pytest.raises(ConfigError, match="loss_tokens=8 needs whole sequences: use mesh.seq=1"):
        jax.eval_shape(step, state, place_batch(make_batch(), 1, mesh))
