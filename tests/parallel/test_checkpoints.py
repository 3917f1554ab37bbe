"""A run goes on, on other devices and another mesh, from the checkpoint that it wrote."""

import dataclasses
import functools
import itertools
import json
import math
import types

import jax
import numpy as np
import optax
import pytest
import tensorstore
from flax import nnx
from jax.sharding import PartitionSpec as P

from sparsex_jax.config import ConfigError, MeshConfig, StageConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel import mesh as meshes
from sparsex_jax.training import checkpoints as ckpt
from sparsex_jax.training import loop
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import first_state, state_like
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
    expected, found = (tiny.read(tmp_path / name) for name in ("one", "many"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-4)


def zarrays(checkpoint):
    """What is stored of each array of a checkpoint, by name: shape, chunks, ..."""
    base = f"file://{checkpoint.absolute()}/arrays/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [key.decode() for key in store.list().result() if key.endswith(b"/.zarray")]
    return {key.removesuffix("/.zarray"): json.loads(store[key]) for key in keys}


def flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@on_devices
def test_state_moves_between_meshes_shard_by_shard_and_bit_for_bit(tmp_path):
    skeleton, params = split_model(Transformer(MODEL, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-3)
    meshes_ = [
        meshes.make_mesh(config, jax.devices()[:devices])
        for config, devices in (
            (MeshConfig(fsdp=8), 8), (MeshConfig(fsdp=2, tensor=2), 4), (MeshConfig(seq=2), 2),
            (MeshConfig(), 1), (MeshConfig(fsdp=4, seq=2), 8),
        )
    ]  # fmt: skip
    state = first_state(params, optimizer, skeleton, meshes_[0])
    moments = state["optimizer"][0]._replace(mu=jax.tree.map(lambda x: x * 3, state["params"]))
    state = {**state, "optimizer": (moments, *state["optimizer"][1:])}
    expected = jax.device_get(flat(state))
    manager = ckpt.RunCheckpoints(tmp_path, 10)
    for number, mesh in enumerate(meshes_):
        manager.save(number, flat(state), {})
        manager.wait()
        for name, stored in zarrays(tmp_path / str(number)).items():
            shard = flat(state)[name].addressable_shards[0].data
            assert math.prod(stored["chunks"]) <= shard.size, name  # copies are shared out, too
        like = state_like(params, optimizer, skeleton, mesh)
        restored = manager.restore(number, flat(like))
        for name, wanted in flat(like).items():
            assert restored[name].sharding == wanted.sharding
            assert restored[name].dtype == expected[name].dtype
            assert np.asarray(restored[name]).tobytes() == expected[name].tobytes(), name
        state = jax.tree.unflatten(jax.tree.structure(like), [restored[n] for n in flat(like)])
        if mesh is not None:
            kernel = state["optimizer"][0].mu["blocks.0.mlp.up.kernel"]
            part = kernel.addressable_shards[0].data.size
            parts = mesh.shape["fsdp"] * mesh.shape["seq"] * mesh.shape["tensor"]
            assert part * parts == kernel.size
    manager.close()


@on_devices
def test_the_step_may_consume_what_is_being_written(tmp_path):
    mesh = meshes.make_mesh(MeshConfig())
    value = np.random.default_rng(0).standard_normal(1 << 22, np.float32)  # takes a while to write
    change = jax.jit(lambda x: -x, donate_argnums=0)
    manager = ckpt.RunCheckpoints(tmp_path, 1)
    for step, split in enumerate((P("fsdp"), P())):
        x = jax.device_put(value, jax.sharding.NamedSharding(mesh, split))
        manager.save(step, {"x": x}, {})
        for _ in range(3):
            x = change(x)
        x.block_until_ready()
        manager.wait()
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        np.testing.assert_array_equal(manager.restore(step, like)["x"], value)
    manager.close()


@on_devices
def test_other_models_take_whole_parameters(tmp_path):
    with pytest.raises(ConfigError, match="which TinyModel does not support: use 1 for both"):
        run(tmp_path, 4, MeshConfig(tensor=2), None)
