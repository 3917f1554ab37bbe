"""`sparsex train` from end to end."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from sparsex_jax import cli
from sparsex_jax.training import load_model
from tests.test_cli import fail, preset, text

__all__ = ["fail", "preset", "text"]  # fixtures


def test_train_takes_overrides_and_makes_a_model(preset, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    command = ["train", preset, "--run-dir", run_dir, "--data.haystack", text]
    command += ["--stages.0.steps", 1, "--model.attention.top-k", 1]
    assert cli.run([str(word) for word in command]) == 0
    assert str(run_dir) in capsys.readouterr().out.replace("\n", "")
    saved = json.loads((run_dir / "model" / "model.json").read_text())
    assert saved["config"]["attention"]["top_k"] == 1


@pytest.fixture
def trained(preset, text, tmp_path, monkeypatch):
    """The command and the run directory of a run that is finished."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    command = ["train", preset, "--run-dir", run_dir, "--data.haystack", text]
    command = [str(word) for word in command]
    assert cli.run(command) == 0
    return command, run_dir


def test_damaged_files_give_one_line(trained, text):
    command, run_dir = trained
    runs = (
        (run_dir / "checkpoints" / "2", command, "delete it to start again from the beginning"),
        (run_dir / "model", ["demo", "--checkpoint", str(run_dir / "model")], "copy it again"),
    )
    for folder, arguments, way_out in runs:
        largest = max((folder / "arrays" / "d").iterdir(), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        done = subprocess.run(
            [sys.executable, "-m", "sparsex_jax.cli", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"sparsex: {folder} cannot be read"), done.stderr
        assert way_out in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_training_does_not_go_on_with_other_text(trained, text, fail):
    command, _ = trained
    os.utime(text / "file.txt", (1, 1))
    assert cli.run(command) == 0
    (text / "file.txt").write_text("jackdaws love my big sphinx of quartz\n" * 200)
    message = f"the text of haystack={text} has changed since"
    assert message in " ".join(fail(*command).split())


def test_training_that_diverges_saves_nothing(preset, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    command = ["train", preset, "--run-dir", run_dir, "--data.haystack", text]
    command += ["--optimizer.learning-rate", 1e30, "--optimizer.warmup-steps", 0]
    assert cli.run([str(word) for word in command]) == 2
    *_, message = capsys.readouterr().err.splitlines()  # what took long is told before it
    assert message.startswith("sparsex: the state after step 2 is not finite: lower optimizer.le")
    assert not list((run_dir / "checkpoints").iterdir())


def test_a_run_begins_with_the_parameters_of_a_model(trained, tmp_path, fail, capsys):
    command, run_dir = trained
    command = [*command[:3], str(tmp_path / "next"), *command[4:]]
    command += ["--optimizer.learning-rate", "1e-20", "--model.selection-loss", "0.1"]
    assert cli.run([*command, "--init-from", str(run_dir / "model")]) == 0
    before, after = (load_model(path / "model")[1] for path in (run_dir, tmp_path / "next"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before), nnx.state(after))
    capsys.readouterr()
    other = [*command[:3], str(tmp_path / "other"), *command[4:], "--init-from"]
    assert "does not exist: give a directory" in fail(*other, tmp_path / "none")
    wider = [*other, run_dir / "model", "--model.mlp-dim", 24]
    assert "does not hold the arrays of this model" in fail(*wider)
