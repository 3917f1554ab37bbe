"""An interrupted run ends with the bits of an uninterrupted one."""

import itertools
import json
import os
import random
import signal
import time
import types

import numpy as np
import pytest

from sparsex_jax.training.metrics import TIME_FIELDS
from tests.training import tiny
from tests.training.zygote import Zygote

LAST = tiny.CONFIG.total_steps


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    zygote = Zygote(
        tmp_path_factory.mktemp("output"),
        {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compilation")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert tiny.run(run_dir).status == "finished"
    return run_dir


@pytest.fixture
def start(zygote):
    """Starts runs as processes, in a process group of their own."""
    processes = []

    def start(run_dir, environment=(), **options):
        processes.append(zygote.start([str(run_dir), json.dumps(options)], dict(environment)))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process, condition, seconds=120):
    """Polls until the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rows(run_dir):
    """Rows of the metrics without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIME_FIELDS}
        for line in lines
    ]


def assert_same_run(run_dir, other):
    """Parameters, optimizer state, step and metrics, bit for bit."""
    ours, theirs = tiny.read(run_dir, LAST), tiny.read(other, LAST)
    assert set(ours) == set(theirs) and any("mu" in name for name in ours)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert value.tobytes() == theirs[name].tobytes(), name
    assert rows(run_dir) == rows(other)


def assert_close_run(run_dir, other):
    """Parameters and losses but for the order in which devices add."""
    ours, theirs = tiny.read(run_dir, LAST), tiny.read(other, LAST)
    for name in ours:
        if name.startswith("params/"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-4)
    for one, another in zip(rows(run_dir), rows(other), strict=True):
        np.testing.assert_allclose(one["loss"], another["loss"], rtol=1e-4)


def complete(run_dir):
    """Names of complete checkpoints, and whether there is an incomplete one."""
    names = {path.name for path in (run_dir / "checkpoints").glob("*")}
    return {int(name) for name in names if name.isdigit()}, any("tmp" in name for name in names)


def test_rows_hold_what_was_trained(whole):
    found = rows(whole)
    assert [row["step"] for row in found] == [5, 9, 10, 15, 20, 21]
    assert [row["stage"] for row in found] == [0, 0, 1, 1, 1, 1]
    assert found[-1]["tokens"] == 9 * 4 * 16 + 12 * 2 * 32
    assert found[-1]["loss"] < found[2]["loss"]
    assert complete(whole) == ({20, 21}, False)


def test_sigterm_saves_and_resumes(start, whole, tmp_path):
    process = start(tmp_path, slow=0.1)
    wait_for(process, (tmp_path / "checkpoints" / "4").is_dir)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith("interrupted") and "SIGTERM" in output and "resume" in output
    assert max(complete(tmp_path)[0]) == int(output.split()[1]) < LAST
    assert tiny.run(tmp_path).status == "finished"
    assert_same_run(tmp_path, whole)


def test_sigkill_at_random_moments(start, whole, tmp_path):
    moments, rows_file = random.Random(0), tmp_path / "metrics.jsonl"
    for _ in range(3):
        begin = time.time()
        process = start(tmp_path, slow=0.2)  # longer than all moments together
        wait_for(
            process,
            lambda begin=begin: rows_file.exists() and rows_file.stat().st_mtime > begin,
        )
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate(timeout=30)
    assert tiny.run(tmp_path).status == "finished"
    assert_same_run(tmp_path, whole)


def test_sigkill_during_a_save(start, whole, tmp_path):
    for _ in range(5):
        process = start(tmp_path, slow=0.1, checkpoint_every=2)
        had = complete(tmp_path)[0]
        wait_for(
            process,
            lambda had=had: complete(tmp_path)[0] != had and complete(tmp_path)[1],
        )
        process.kill()
        process.wait()
        if complete(tmp_path)[1]:
            break
    steps, torn = complete(tmp_path)
    assert torn and steps and max(steps) < LAST
    assert tiny.run(tmp_path).status == "finished"
    assert_same_run(tmp_path, whole)
    assert not complete(tmp_path)[1]


def test_ctrl_c(start, whole, tmp_path):
    process = start(tmp_path, slow=0.05)
    wait_for(process, (tmp_path / "checkpoints" / "4").is_dir)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith("interrupted") and "SIGINT" in output
    assert tiny.run(tmp_path).status == "finished"
    assert_same_run(tmp_path, whole)


def test_time_limit_saves_and_resumes(whole, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=itertools.count().__next__)  # a second per look
    monkeypatch.setattr("sparsex_jax.training.stop.time", clock)
    result = tiny.run(tmp_path, max_minutes=0)
    assert result.step == 0 and "before the first step, nothing is saved" in result.message
    for step in (6, 12):
        result = tiny.run(tmp_path, max_minutes=7 / 60)
        assert (result.status, result.step) == ("interrupted", step)
        assert "stopped by max_minutes" in result.message and "to resume" in result.message
    assert tiny.run(tmp_path).status == "finished"
    assert_same_run(tmp_path, whole)
    again = tiny.run(tmp_path)
    assert again.status == "finished" and again.loss is None and "all 21 steps" in again.message


def test_devices_share_a_batch(start, whole, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    process = start(tmp_path, environment=flags)
    assert process.wait() == 0, process.communicate()[1]
    assert_close_run(tmp_path, whole)
