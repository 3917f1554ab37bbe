"""Meshes: sizes of their axes, what does not fit, and how arrays lie on them."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsex_jax.config import AttentionConfig, ConfigError, MeshConfig, ModelConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel.mesh import (
    axis_sizes,
    batch_share,
    batch_spec,
    check_batch,
    check_model,
    make_mesh,
)
from sparsex_jax.parallel.rules import partitions
from sparsex_jax.training.parameters import split_model
from tests.parallel.devices import on_devices

MODEL = ModelConfig(num_heads=8, num_kv_heads=4, mlp_dim=768, model_dim=256)


def mesh(*sizes):
    axes = ("data", "fsdp", "seq", "tensor")
    return jax.sharding.AbstractMesh(sizes, axes)


def test_one_axis_takes_what_the_others_leave():
    assert list(axis_sizes(MeshConfig(), 8).values()) == [1, 8, 1, 1]
    assert list(axis_sizes(MeshConfig(2, 1, -1, 2), 16).values()) == [2, 1, 4, 2]
    assert list(axis_sizes(MeshConfig(2, 2, 1, 2), 8).values()) == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(seq=3), 8,
            r"the axes of mesh data=1, fsdp=-1, seq=3, tensor=1 must divide the 8 devices: use"
            r" seq=1 or 2 or 4 or 8, or another number",
        ),
        (
            MeshConfig(fsdp=2, seq=2), 8,
            r"must multiply to the 8 devices: use fsdp=1 or 2 or 4 or seq=1 or 2 or 4, or -1",
        ),
        (MeshConfig(fsdp=1), 8, "must multiply to the 8 devices: use fsdp=8, or -1 for one axis"),
    ],
)  # fmt: skip
def test_names_sizes_that_devices_allow(config, devices, message):
    with pytest.raises(ConfigError, match=message):
        axis_sizes(config, devices)


def test_config_refuses():
    with pytest.raises(ConfigError, match="seq=0 must be at least 1, or -1"):
        MeshConfig(seq=0)
    with pytest.raises(ConfigError, match="fsdp=-1 and seq=-1: only one axis"):
        MeshConfig(seq=-1)
    with pytest.raises(ConfigError, match="sequence_strategy='both' must be one of 'auto', 'ring'"):
        MeshConfig(sequence_strategy="both")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 1, 8), r"tensor=8 must divide model.num_kv_heads=4: use tensor of 1 or 2 or 4, or"),
        (
            (1, 3, 1, 1),
            r"fsdp=3 must divide model.model_dim=256: use .* 1 or 2, or model_dim=258",
        ),
        (
            (1, 2, 3, 1),
            r"mesh.fsdp=2 times mesh.seq=3 must divide model.model_dim=256: use fsdp times seq of"
            r" 1 or 2 or 4, or model_dim=258",
        ),
    ],
)
def test_names_sizes_that_a_model_allows(sizes, message):
    check_model(MODEL, mesh(2, 4, 2, 4))
    with pytest.raises(ConfigError, match=message):
        check_model(MODEL, mesh(*sizes))


@pytest.mark.parametrize(
    ("sizes", "length", "batch", "model", "message"),
    [
        ((2, 2, 1, 1), 4096, 12, MODEL, r"batch_size=12 .* accumulation=2 .*: use 8 or 16, or"),
        ((1, 1, 4, 1), 4096 + 512, 2, MODEL,
         r"length=4608 must be mesh.seq=4 times .* segment_length=512, .* 4096 or 6144, or"
         r" seq of 1 or 3$"),
        ((1, 1, 4, 1), 2048, 2, MODEL, r"block_size = 576: use .* 4096 or 6144, or seq of 1 or 2$"),
        ((1, 1, 2, 1), 1160, 2, dataclasses.replace(MODEL, layers="l"),
         r"a multiple of block_size=64, .*: use length 1152 or 1280, or seq of 1$"),
    ],
)  # fmt: skip
def test_names_sizes_that_sequences_allow(sizes, length, batch, model, message):
    check_batch("stages[1]", 16, 8192, 2, MODEL, mesh(2, 2, 4, 1))
    check_batch("stages[1]", 7, 100, 1, MODEL, None)
    with pytest.raises(ConfigError, match=r"stages\[1\]\..*" + message):
        check_batch("stages[1]", batch, length, 2, model, mesh(*sizes))


def test_parameters_and_moments_lie_alike():
    config = ModelConfig(
        vocab_size=8, model_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, layers="s",
        attention=AttentionConfig(score_dim=4),
    )  # fmt: skip
    skeleton, params = split_model(Transformer(config, rngs=nnx.Rngs(0)))
    state = {"params": params, "optimizer": ({"mu": params}, np.int32(0)), "step": np.int32(0)}
    specs = partitions(state, skeleton.axes, mesh(1, 2, 2, 2).shape)
    assert specs["optimizer"] == ({"mu": specs["params"]}, P()) and specs["step"] == P()
    found = specs["params"]
    both = "fsdp", "seq"
    assert found["embedding"] == P(None, both)
    assert found["blocks.0.attention.query.kernel"] == P(both, "tensor")
    assert found["blocks.0.attention.output.kernel"] == P("tensor", both)
    assert found["blocks.0.attention.log_scale"] == P("tensor")
    assert found["blocks.0.attention.gates.kernel"] == P(both, None)
    assert found["blocks.0.mlp.down.kernel"] == P("tensor", both)
    assert found["final_norm.scale"] == P(None)
    alone = partitions(params, skeleton.axes, mesh(8, 1, 1, 1).shape)
    assert all(not any(spec) for spec in alone.values())


def test_batches_are_split_along_axes_with_several_devices():
    assert batch_spec(mesh(2, 2, 2, 2)) == P(None, ("data", "fsdp"), "seq")
    assert batch_spec(mesh(2, 1, 1, 4)) == P(None, ("data",), None)


@pytest.mark.parametrize(
    ("sizes", "processes", "share"),
    [
        ((4, 1, 1, 1), 2, (1, 2)),  # of process 1: half of the sequences
        ((1, 2, 2, 1), 4, (0, 2)),  # a half of half of them
        ((1, 1, 4, 1), 2, (0, 1)),  # a part of all
    ],
)
def test_what_a_process_feeds(sizes, processes, share, monkeypatch):
    count = int(np.prod(sizes))
    devices = [types.SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    grid = types.SimpleNamespace(
        shape=dict(zip(("data", "fsdp", "seq", "tensor"), sizes, strict=True)),
        devices=np.array(devices).reshape(sizes),
    )
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert batch_share(grid) == share


@on_devices
def test_mesh_has_all_axes():
    found = make_mesh(MeshConfig(fsdp=2, seq=-1, tensor=2))
    assert dict(found.shape) == {"data": 1, "fsdp": 2, "seq": 2, "tensor": 2}
    assert make_mesh(MeshConfig(), jax.devices()[:1]) is None
