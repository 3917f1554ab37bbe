"""Steps that are compiled in the background, and a stop while one is."""

import dataclasses
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from sparsex_jax.config import StageConfig
from sparsex_jax.training import loop, metrics
from sparsex_jax.training.compilation import StepCompiler
from tests.training import tiny


def batch(*shape):
    return {"tokens": jnp.ones(shape)}


def test_step_is_compiled_once_for_each_shape():
    made = []

    def make(stage):
        made.append(stage)
        return jax.jit(lambda state, batch: state + stage.top_k * batch["tokens"].sum())

    compiler = StepCompiler(make, jnp.zeros(()))
    stage = StageConfig(steps=1, length=4, batch_size=1, top_k=3)
    part = dataclasses.replace(stage, loss_tokens=2)
    for _ in range(2):
        assert compiler.prepare(stage, batch(1, 4)).result()(jnp.ones(()), batch(1, 4)) == 13
    assert compiler.prepare(stage, batch(2, 4)).result()(jnp.ones(()), batch(2, 4)) == 25
    assert compiler.prepare(part, batch(1, 4)).result()(jnp.ones(()), batch(1, 4)) == 13
    assert made == [stage, stage, part]
    compiler.close()


@pytest.mark.parametrize(("cores", "processes", "together"), [(8, 1, 2), (8, 2, 1), (2, 1, 1)])
def test_steps_are_compiled_together_where_there_are_cores(cores, processes, together, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    running, most, all_run = 0, [], threading.Barrier(together)

    def make(stage):
        nonlocal running
        running += 1
        all_run.wait(60)
        most.append(running)
        running -= 1
        return jax.jit(lambda state, batch: state)

    compiler = StepCompiler(make, jnp.zeros(()))
    stage = StageConfig(steps=1, length=4, batch_size=1)
    found = [compiler.prepare(stage, batch(1, size)) for size in (4, 8)]
    assert all(x.result() for x in found) and max(most) == together
    compiler.close()


def test_steps_of_later_stages_are_compiled_while_the_first_trains(tmp_path, monkeypatch):
    prepared = []
    original = StepCompiler.prepare

    def prepare(self, stage, batch):
        prepared.append((stage.top_k, batch["tokens"].shape))
        return original(self, stage, batch)

    monkeypatch.setattr(StepCompiler, "prepare", prepare)
    assert tiny.run(tmp_path).status == "finished"
    # The second stage's, of (1, 2, 32), before the second step.
    assert prepared[:3] == [(2, (1, 4, 16)), (None, (1, 2, 32)), (2, (1, 4, 16))]


def test_what_steps_wait_for_long_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_LONG", -1)
    assert tiny.run(tmp_path).status == "finished"
    shown = capsys.readouterr().err
    for what in ("the batch of step 1", "the step of stage 0 to be compiled"):
        assert f"s for {what}" in shown
    monkeypatch.setattr(metrics, "_LONG", 1000)
    assert tiny.run(tmp_path / "silent").status == "finished"
    assert "waited" not in capsys.readouterr().err


@pytest.mark.parametrize("stops", [True, False])
def test_signal_that_ends_the_compiler_is_a_stop(tmp_path, monkeypatch, stops):
    def fail(*_):
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 15")

    monkeypatch.setattr(loop, "make_step", fail)
    if not stops:
        with pytest.raises(jax.errors.JaxRuntimeError, match="ptxas"):
            tiny.run(tmp_path)
        return
    result = tiny.run(tmp_path)
    assert (result.status, result.step) == ("interrupted", 0) and "SIGTERM" in result.message
