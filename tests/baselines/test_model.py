"""Models of baselines: parameters, gradients, the cache, what is refused."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.cache import Engine
from sparsex_jax.cache.layer import empty_layers
from sparsex_jax.cache.memory import Bytes, CacheMemoryError, Shape, check_fits
from sparsex_jax.cache.model import extend
from sparsex_jax.cache.store import CacheDirectory, CacheError
from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import BaselineConfig, ConfigError
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel.mesh import check_model
from tests.cache.test_engine import greedy
from tests.modules.test_transformer import TINY, make, make_tokens, predict

BASELINE = BaselineConfig(window=16, global_tokens=8, random_blocks=2)
CONFIGS = {
    layers: dataclasses.replace(TINY, layers=layers, baseline=BASELINE)
    for layers in ("ld", "fl", "lb", "dfb")
}
WINDOW = dataclasses.replace(BASELINE, rope="window")
CONFIGS["dfb, window"] = dataclasses.replace(TINY, layers="dfb", baseline=WINDOW)


def count(config):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("preset", ["nano", "billion"])
def test_as_many_parameters_as_the_sparse_model(preset, project):
    config = load_preset(project / "configs" / f"{preset}.py").model
    ours = count(config)
    for kind in "dfb":
        other = count(dataclasses.replace(config, layers=config.layers.replace("s", kind)))
        assert abs(other - ours) / ours < 0.002, (kind, other, ours)


def test_every_parameter_has_a_gradient():
    model, tokens = make(CONFIGS["dfb"]), make_tokens(2, 129)
    weights = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    gradients = nnx.jit(nnx.grad(lambda m: m.loss(tokens[:, :-1], tokens[:, 1:], weights)[0]))(
        model
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("layers", ["dfb", pytest.param("dfb, window", marks=pytest.mark.long)])
def test_any_chunking_equals_the_forward_pass(layers):
    model, tokens = make(CONFIGS[layers]), make_tokens(2, 150)
    expected = np.asarray(predict(model, tokens))
    step = nnx.jit(extend)
    cache, read = empty_layers(model.config, 150, 2, 64), 0
    for chunk in (29,) * 4 + (1,) * 3:
        part = tokens[:, read : read + chunk]
        logits, cache = step(model, cache, part, jnp.int32(read), jnp.int32(chunk))
        read += chunk
        np.testing.assert_allclose(logits, expected[:, read - 1], rtol=2e-4, atol=2e-4)


def test_answers_equal_the_forward_pass_and_keep_the_cache():
    model, tokens = make(CONFIGS["dfb"]), make_tokens(2, 100)
    expected = greedy(model, tokens, 6)
    engine = Engine(model, capacity=128, batch_size=2, chunk=32)
    cache = engine.prefill(tokens[:, :90])
    for _ in range(2):
        np.testing.assert_array_equal(engine.answer(cache, tokens[:, 90:], 6), expected)
    # Of different lengths: the second sequence begins later.
    found = engine.generate([tokens[0], tokens[1, :3]], 6)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], greedy(model, tokens[1:, :3], 6)[0])


def test_longformer_keeps_a_window_and_its_global_tokens_only():
    def size(layers, tokens):
        return Shape(CONFIGS[layers], tokens, 1, 64).cache_bytes("device")

    assert size("fl", 1 << 14) == size("fl", 1 << 20)
    token = 2 * TINY.num_kv_heads * TINY.head_dim * 4
    for layers in ("ld", "lb"):
        assert size(layers, 1 << 20) - size(layers, 1 << 14) == ((1 << 20) - (1 << 14)) * token


def test_what_is_refused(tmp_path):
    for layers, names in (("ld", "dense"), ("dfb", "dense and longformer and bigbird")):
        for tier in ("host", "compressed"):
            with pytest.raises(ConfigError, match=f"tier='{tier}' .* {names} ones: use tier='dev"):
                Engine(make(CONFIGS[layers]), capacity=64, tier=tier)
    with pytest.raises(CacheMemoryError, match="no tier would fit"):
        check_fits(Shape(CONFIGS["ld"], 1 << 20, 1, 64), "device", Bytes(1 << 20, 1 << 40))
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "seq": 2, "tensor": 1})
    with pytest.raises(ConfigError, match="mesh.seq=2 splits .* longformer .*: use mesh.seq=1"):
        check_model(CONFIGS["fl"], mesh)
    engine = Engine(make(CONFIGS["lb"]), capacity=64)
    with pytest.raises(CacheError, match="caches of bigbird layers cannot be kept on disk"):
        CacheDirectory(tmp_path / "new", {}).save(engine, engine.empty(), make_tokens(1, 0)[0])


def test_names_of_systems():
    names = {"llls": "sparsex", "lld": "dense", "ff": "longformer", "b": "bigbird", "l": "local"}
    for layers, name in (names | {"sd": "sparsex+dense"}).items():
        assert dataclasses.replace(TINY, layers=layers, baseline=BASELINE).system == name
