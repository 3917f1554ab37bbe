"""Checkpoints: round trips, and what is said about bad ones."""

import copy
import dataclasses
import errno
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsex_jax import manifest
from sparsex_jax.config import AttentionConfig, OptimizerConfig
from sparsex_jax.training import checkpoints as ckpt
from sparsex_jax.training import (
    export_model,
    load_model,
    loop,
    model_crc32,
    models,
    save_model,
)
from sparsex_jax.training.errors import CheckpointError, TrainingError
from sparsex_jax.training.metrics import truncate_rows
from sparsex_jax.training.parameters import split_model
from tests.training import tiny

MODEL = tiny.CONFIG.model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; copy it before you damage it."""
    run_dir = tmp_path_factory.mktemp("finished")
    tiny.run(run_dir)
    return run_dir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def model():
    return tiny.TinyModel(MODEL, rngs=nnx.Rngs(1))


def load(directory, **options):
    return load_model(directory, model_class=tiny.TinyModel, **options)


def damaged_in_turn(*directories):
    """Cuts each file below directories in half, alters it, removes it; yields what was damaged."""
    for path in sorted(path for directory in directories for path in directory.rglob("*")):
        if path.is_file() and path.stat().st_size:
            content = path.read_bytes()
            half = len(content) // 2
            path.write_bytes(content[:half])
            yield path
            path.write_bytes(content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :])
            yield path
            path.unlink()
            yield path
            path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_model_round_trip(tmp_path, model, dtype):
    save_model(tmp_path / "model", model, MODEL, "tiny", dtype)
    config, loaded = load(tmp_path / "model", tokenizer_fingerprint="tiny", config=MODEL)
    assert config == MODEL
    saved, restored = split_model(model)[1], split_model(loaded)[1]
    assert set(saved) == set(restored)
    for name, value in saved.items():
        kept = dtype if value.ndim >= 2 else "float32"
        assert restored[name].dtype == kept
        np.testing.assert_array_equal(np.asarray(restored[name]), np.asarray(value.astype(kept)))
    wide = split_model(load(tmp_path / "model", dtype="float32")[1])[1]
    assert all(value.dtype == jnp.float32 for value in wide.values())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) < 30  # not several for each array; how many differs from run to run


def test_model_is_replaced_whole(tmp_path, model):
    other = tiny.TinyModel(MODEL, rngs=nnx.Rngs(2))
    save_model(tmp_path / "model", model, MODEL)
    save_model(tmp_path / "model", other, MODEL, dtype="float32")
    _, loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.embedding[...], other.embedding[...])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_old_model_survives_a_replacement_that_fails(tmp_path, model, monkeypatch):
    save_model(tmp_path / "model", model, MODEL, dtype="float32")
    rename = pathlib.Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(CheckpointError, match="could not be written: .*Input/output error"):
        save_model(tmp_path / "model", tiny.TinyModel(MODEL, rngs=nnx.Rngs(2)), MODEL)
    np.testing.assert_array_equal(load(tmp_path / "model")[1].embedding[...], model.embedding[...])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_crc32_names_the_weights(tmp_path, model):
    for seed in (1, 2):
        other = tiny.TinyModel(MODEL, rngs=nnx.Rngs(seed))
        save_model(tmp_path / str(seed), other, MODEL)
    save_model(tmp_path / "again", model, MODEL)
    assert model_crc32(tmp_path / "1") == model_crc32(tmp_path / "again")
    assert model_crc32(tmp_path / "1") != model_crc32(tmp_path / "2")
    with pytest.raises(CheckpointError, match="nowhere cannot be read"):
        model_crc32(tmp_path / "nowhere")


def test_nothing_else_is_replaced(tmp_path, model):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="not a model: choose a new directory"):
        save_model(tmp_path, model, MODEL)
    assert (tmp_path / "precious").read_text() == "mine"


def test_missing_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist: give a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no model .it has no model.json."):
        load(tmp_path)


def test_damaged_model(tmp_path, model, capfd):
    save_model(tmp_path / "model", model, MODEL, dtype="float32")
    noticed = 0
    for _ in damaged_in_turn(tmp_path / "model"):
        try:
            loaded = load(tmp_path / "model")[1]
        except CheckpointError as error:
            assert str(tmp_path / "model") in str(error)
            noticed += 1
        else:  # a file that holds nothing that is needed
            np.testing.assert_array_equal(loaded.embedding[...], model.embedding[...])
    assert noticed >= 9
    assert "Traceback" not in capfd.readouterr().err


def test_changed_bits_are_noticed(tmp_path, model):
    save_model(tmp_path / "model", model, MODEL)
    path = tmp_path / "model" / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "crc32": description["crc32"] ^ 1}))
    with pytest.raises(CheckpointError, match="does not match its checksum: copy it again"):
        load(tmp_path / "model")


def test_another_model_or_tokenizer(tmp_path, model):
    save_model(tmp_path / "model", model, MODEL, "one")
    with pytest.raises(CheckpointError, match="tokenizer one, the one in use is two: use the"):
        load(tmp_path / "model", tokenizer_fingerprint="two")
    wanted = dataclasses.replace(MODEL, layers="ls", attention=AttentionConfig(window=256))
    with pytest.raises(CheckpointError, match="another model: ") as caught:
        load(tmp_path / "model", config=wanted)
    assert "layers is 'llls' there and 'ls' here" in str(caught.value)
    assert "attention.window is 512 there and 256 here" in str(caught.value)
    path = tmp_path / "model" / "model.json"
    description = json.loads(path.read_text())
    description["config"]["attention"]["flavour"] = 3
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="flavour.*use version"):
        load(tmp_path / "model")


def test_arrays_of_another_model(tmp_path, model):
    save_model(tmp_path / "model", model, dataclasses.replace(MODEL, model_dim=16))
    with pytest.raises(CheckpointError, match=r"embedding\[1\] is 8 there and 16 here"):
        load(tmp_path / "model")


def test_full_device_for_a_model(tmp_path, model, monkeypatch):
    save_model(tmp_path / "model", model, MODEL)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models.ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match="model could not be written: no space left"):
        save_model(tmp_path / "model", tiny.TinyModel(MODEL, rngs=nnx.Rngs(2)), MODEL)
    np.testing.assert_array_equal(
        np.asarray(load(tmp_path / "model")[1].embedding[...]),
        np.asarray(model.embedding[...].astype(jnp.bfloat16)),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_device_in_a_run(tmp_path, monkeypatch):
    handler = ckpt.ocp.PyTreeCheckpointHandler
    write, calls = handler.async_save, []

    async def full(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 1:  # what tensorstore says, as measured on a full tmpfs
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")
        return await write(self, *arguments, **options)

    monkeypatch.setattr(handler, "async_save", full)
    with pytest.raises(CheckpointError, match="step 8 .* no space left on the device") as caught:
        tiny.run(tmp_path)
    assert "The one of step 4 is intact: free some space and run the same" in str(caught.value)
    monkeypatch.setattr(handler, "async_save", write)
    assert tiny.run(tmp_path).status == "finished"


def test_the_last_checkpoints_are_kept(tmp_path):
    tiny.run(tmp_path, dataclasses.replace(tiny.CONFIG, keep=3))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"16", "20", "21"}


def test_damaged_checkpoint_of_a_run(copied, capfd):
    folder = copied / "checkpoints" / "21"
    for _ in damaged_in_turn(folder / "arrays", folder / "metadata"):
        with pytest.raises(CheckpointError, match=r"checkpoints/21 cannot be read, .* step 20"):
            tiny.read(copied)
    assert not capfd.readouterr().err
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        tiny.read(copied)
    shutil.rmtree(folder)
    assert tiny.run(copied).step == tiny.CONFIG.total_steps


def test_checkpoint_is_not_complete_before_its_manifest_is(tmp_path, monkeypatch):
    write = manifest.write

    def full(folder):
        if folder.name.startswith("8"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(CheckpointError, match="no space left .* step 4 is intact"):
        tiny.run(tmp_path)
    assert not (tmp_path / "checkpoints" / "8").exists()
    monkeypatch.setattr(manifest, "write", write)
    assert tiny.run(tmp_path).status == "finished"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["20", "21"]


def test_each_process_sums_up_its_part_and_checks_a_share(tmp_path):
    for name in ("a/1/x", "a/2/y", "a/z"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    manifest.write_part(tmp_path, tmp_path / "a" / "1")
    (tmp_path / "a/1/x").write_text("a/1/!")  # not read again
    manifest.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "manifest.json"]
    found = []
    for share in range(4):
        try:
            manifest.verify(tmp_path, share, 4)
        except ValueError as error:
            found.append(str(error))
    assert found == ["a/1/x was altered"]
    with pytest.raises(ValueError, match="a/1/x was altered"):
        manifest.verify(tmp_path)


def test_checkpoint_of_a_run_without_metadata(copied):
    shutil.rmtree(copied / "checkpoints" / "21" / "metadata")
    with pytest.raises(CheckpointError, match="checkpoints/21 cannot be read"):
        tiny.run(copied)


def test_run_of_another_config(copied):
    other = dataclasses.replace(
        tiny.CONFIG,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=6),
        stages=(tiny.CONFIG.stages[0], dataclasses.replace(tiny.CONFIG.stages[1], steps=13)),
    )
    with pytest.raises(TrainingError, match="begun with another config: ") as caught:
        tiny.run(copied, other)
    assert "optimizer.warmup_steps is 5 there and 6 here" in str(caught.value)
    assert "stages[1].steps is 12 there and 13 here" in str(caught.value)
    allowed = dataclasses.replace(tiny.CONFIG, keep=1, log_every=1, checkpoint_every=1)
    assert tiny.run(copied, allowed).status == "finished"


def test_run_with_another_tokenizer(copied):
    with pytest.raises(CheckpointError, match="tokenizer tiny, the one in use is other"):
        tiny.run(copied, tokenizer_fingerprint="other")


def test_metadata_do_not_change_while_they_are_written(tmp_path, monkeypatch):
    save, saved = ckpt.RunCheckpoints.save, []

    def remember(self, step, arrays, metadata):
        saved.append((metadata, copy.deepcopy(metadata)))
        save(self, step, arrays, metadata)

    monkeypatch.setattr(ckpt.RunCheckpoints, "save", remember)
    tiny.run(tmp_path)
    assert any(metadata["window"] for metadata, _ in saved)
    assert all(metadata == before for metadata, before in saved)


def test_run_with_other_text(tmp_path):
    tiny.run(tmp_path, data_fingerprint="one", max_minutes=0)
    tiny.run(tmp_path, data_fingerprint="one")
    with pytest.raises(TrainingError, match="text of haystack=the standard library has changed"):
        tiny.run(tmp_path, data_fingerprint="other")


def test_export_of_a_run(finished, tmp_path):
    assert export_model(finished, tmp_path / "model") == tiny.CONFIG.total_steps
    config, exported = load(tmp_path / "model", tokenizer_fingerprint="tiny")
    _, shipped = load(finished / "model", config=config)
    np.testing.assert_array_equal(exported.embedding[...], shipped.embedding[...])
    with pytest.raises(CheckpointError, match="does not exist: give the run_dir"):
        export_model(tmp_path, tmp_path / "other")


def test_run_dir_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", "/proc/run"):
        with pytest.raises(TrainingError, match=f"run_dir={run_dir} cannot be used .*: give a"):
            tiny.run(run_dir)


def test_loss_that_is_not_finite(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=1e30))
    with pytest.raises(TrainingError, match=r"loss of step \d+ is (nan|inf): lower optimizer"):
        tiny.run(tmp_path, config)


def test_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    # The loss of the first step is that of the parameters before it.
    monkeypatch.setattr(loop, "make_optimizer", lambda *_: optax.adamw(1e-3, b1=1.0))
    config = dataclasses.replace(tiny.CONFIG, checkpoint_every=1)
    with pytest.raises(TrainingError, match="state after step 1 is not finite.* no checkpoint was"):
        tiny.run(tmp_path, config)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_rows(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_rows(tmp_path / "missing.jsonl", 2)
