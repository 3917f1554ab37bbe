"""A run goes on, on other devices and another mesh, from the checkpoint that it wrote."""

import dataclasses
import functools
import itertools
import types

import jax
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.config import ConfigError, MeshConfig, StageConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel import mesh as meshes
from sparsex_jax.training import loop
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import fetch, place_state
from tests.parallel.devices import on_devices
from tests.parallel.test_model import MODEL
from tests.training import tiny

CONFIG = dataclasses.replace(
    tiny.CONFIG, stages=(StageConfig(steps=6, length=16, batch_size=8),), checkpoint_every=2
)


def run(run_dir, devices, mesh, steps):
    """Goes on until so many more steps are taken, or to the end."""
    with pytest.MonkeyPatch.context() as patch:
        make = functools.partial(meshes.make_mesh, devices=jax.devices()[:devices])
        patch.setattr(loop, "make_mesh", make)
        clock = types.SimpleNamespace(monotonic=itertools.count().__next__)  # a second per look
        patch.setattr("sparsex_jax.training.stop.time", clock)
        config = dataclasses.replace(CONFIG, mesh=mesh)
        limit = None if steps is None else (steps + 1) / 60
        return tiny.run(run_dir, config, max_minutes=limit)


@on_devices
def test_written_on_four_devices_restored_on_two_and_on_eight(tmp_path):
    one = run(tmp_path / "one", 1, MeshConfig(), None)
    assert run(tmp_path / "many", 4, MeshConfig(data=2, fsdp=2), 2).step == 2
    assert run(tmp_path / "many", 2, MeshConfig(), 2).step == 4
    many = run(tmp_path / "many", 8, MeshConfig(data=4), None)
    assert one.status == many.status == "finished" and many.step == 6
    expected, found = (_last(tmp_path / name) for name in ("one", "many"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-4)


def _last(run_dir):
    manager = loop.ckpt.RunCheckpoints(run_dir / "checkpoints", keep=None)
    try:
        return manager.restore(manager.latest)[1]
    finally:
        manager.close()


@on_devices
def test_state_moves_between_meshes_bit_for_bit():
    skeleton, params = split_model(Transformer(MODEL, rngs=nnx.Rngs(0)))
    state = {"params": params, "optimizer": {"mu": params}, "step": np.int32(3)}
    here = jax.device_get(state)
    for config, devices in (
        (MeshConfig(fsdp=2, tensor=2), 4), (MeshConfig(seq=2), 2), (MeshConfig(fsdp=4, seq=2), 8),
    ):  # fmt: skip
        mesh = meshes.make_mesh(config, jax.devices()[:devices])
        placed = place_state(here, skeleton, mesh)
        kernel = placed["optimizer"]["mu"]["blocks.0.mlp.up.kernel"]
        part = kernel.addressable_shards[0].data.size
        assert part * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size
        here = jax.tree.map(fetch, placed)
    jax.tree.map(np.testing.assert_array_equal, here, jax.device_get(state))


@on_devices
def test_other_models_take_whole_parameters(tmp_path):
    with pytest.raises(ConfigError, match="which TinyModel does not support: use 1 for both"):
        run(tmp_path, 4, MeshConfig(tensor=2), None)
