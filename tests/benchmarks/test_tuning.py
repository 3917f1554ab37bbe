"""`sparsex tune`: the candidates are compared, timed by a clock that is told, and stored."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.block_selection import mosaic_gpu as selection
from sparsex_jax import cli
from sparsex_jax.benchmarks import tuning as tuner
from sparsex_jax.benchmarks.kernel_cases import make_case
from sparsex_jax.benchmarks.timing import Timing
from sparsex_jax.benchmarks.tuning import Settings, Trial, choose_best
from sparsex_jax.config import AttentionConfig
from tests.pallas_kernels.hopper_interpreter import HOPPER, interpret
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture

# A kernel that waits for ever does not listen to signals.
pytestmark = pytest.mark.timeout(300, method="thread")

FILE = "interpreted_hopper_gpu.json"
TINY = ["--length", "192", "--query-heads", "8", "--kv-heads", "1", "--head-dims", "64"]
KERNEL = selection.KERNELS["select"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """An attention that a short sequence exercises; a folder of its own for tuned configs."""
    monkeypatch.setattr(tuner, "ATTENTION", AttentionConfig(window=64, top_k=3))
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))


@pytest.fixture
def clock(monkeypatch):
    """Three candidates; those with 1 place take 3 ms, with 2 places 1 ms, others 2 ms."""
    candidates = [selection.Config(2, places, programs=2) for places in (3, 1, 2)]
    monkeypatch.setattr(tuning.Kernel, "candidates", lambda *_: candidates)
    real = tuner.Tuner._try

    def tell(self, case, config):
        def measure(call, samples, seconds):
            times = {1: 3.0, 2: 1.0}.get(config.places, 2.0) * np.linspace(0.9, 1.1, samples)
            return Timing(times / 1e3, 1)

        monkeypatch.setattr(tuner, "measure", measure)
        return real(self, case, config)

    monkeypatch.setattr(tuner.Tuner, "_try", tell)


def tune(*arguments):
    return cli.run(["tune", *TINY, "--kernels", "block_selection", *arguments])


def entries(folder):
    return json.loads((folder / FILE).read_text())["entries"]


def plainly(change=lambda config, index, score: (index, score)):
    """Takes the place of the kernel: plain JAX, whose results may be changed."""

    def select(u, c, limit, start, *, count, config):
        return change(config, *selection.xla.select_blocks(u, c, limit, start, count))

    return select


@pytest.mark.parametrize(
    "name",
    [
        x if x.startswith("range") else pytest.param(x, marks=pytest.mark.long)
        for x in tuning.kernels()
    ],
)
def test_kernels_alone_agree_with_plain_jax(name):
    settings = Settings((name,), (64,), 192, query_heads=8, kv_heads=1)
    (step,) = settings.steps()
    case = make_case(step.kernel, settings.workload(step))
    config = dataclasses.replace(step.kernel.default(64), programs=2)
    with interpret():
        found = jax.jit(functools.partial(case.run, config))(*case.operands)
    errors = case.compare(found)
    assert errors and all(error.value <= error.tolerance / 2 for error in errors)
    # And the comparison sees what is wrong.
    leaves, tree = jax.tree.flatten(found)
    for number in range(len(leaves)):
        changed = [x + (i == number) * (x + 1) for i, x in enumerate(leaves)]
        errors = case.compare(jax.tree.unflatten(tree, changed))
        assert any(error.value > error.tolerance for error in errors), number


def test_the_fastest_right_candidate_is_stored(clock, tmp_path, capsys):
    with interpret():
        assert tune("--samples", "5") == 0
    (entry,) = entries(tmp_path)
    assert (entry["kernel"], entry["head_dim"]) == ("block_selection.select", 64)
    assert entry["config"] == {"stages": 2, "places": 2, "programs": 2}
    evidence = entry["evidence"]
    assert evidence["milliseconds"] == pytest.approx(1) and evidence["samples"] == 5
    assert evidence["milliseconds_q1"] < 1 < evidence["milliseconds_q3"]
    assert evidence["default"]["config"] == {"stages": 2, "places": 3, "programs": 2}
    assert evidence["default"]["milliseconds"] == pytest.approx(2)
    assert evidence["candidates"] == {"measured": 3} and evidence["tokens"] == 192
    assert evidence["command"].startswith("sparsex tune --length 192")
    assert {"commit", "date", "hardware", "versions"} < evidence.keys()
    shown = capsys.readouterr().out
    assert "select at 64, stages=2 places=1 programs=2: 3 ms (2.85 to 3.15)" in shown
    assert "select at 64: stages=2 places=2 programs=2, 2 times as fast as the default" in shown
    with dispatch.targeting(HOPPER):
        assert selection.config_for(64) == selection.Config(2, programs=2)


def test_candidates_that_are_wrong_or_fail_are_never_stored(clock, tmp_path, capsys, monkeypatch):
    def broken(config, index, score):
        if config.places == 1:
            raise ValueError("no such\ninstruction")
        return index, score * (2 if config.places == 2 else 1)

    monkeypatch.setattr(selection, "select", plainly(broken))
    with dispatch.targeting(HOPPER):
        assert tune() == 0
    (entry,) = entries(tmp_path)
    assert entry["config"] == {"stages": 2, "places": 3, "programs": 2}
    assert entry["evidence"]["candidates"] == {"measured": 1, "failed": 1, "wrong": 1}
    shown = capsys.readouterr().out
    assert "stages=2 places=1 programs=2: failed: ValueError: no such instruction" in shown
    assert "stages=2 places=2 programs=2: wrong: outputs differ" in shown
    assert "select at 64: the default stands" in shown


def test_a_default_that_is_wrong_gives_way(clock, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        selection, "select",
        plainly(lambda config, index, score: (index - (config.places == 3), score)),
    )  # fmt: skip
    with dispatch.targeting(HOPPER):
        assert tune() == 0
    (entry,) = entries(tmp_path)
    assert entry["config"]["places"] == 2
    assert entry["evidence"]["default"]["milliseconds"] is None
    assert "since the default has no time" in capsys.readouterr().out


def test_nothing_is_stored_when_nothing_is_right(clock, tmp_path, monkeypatch, capsys):
    def full(config, index, score):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(selection, "select", plainly(full))
    with dispatch.targeting(HOPPER):
        assert tune() == 1
    assert not (tmp_path / FILE).exists()
    shown = capsys.readouterr().out
    assert "stages=2 places=3 programs=2: out of memory: RESOURCE_EXHAUSTED" in shown
    assert "no config is right; nothing was stored" in shown


def test_an_interruption_loses_one_kernel_and_resume_keeps_the_others(
    clock, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(selection, "select", plainly())
    real, done = tuner.make_case, []

    def interrupted(kernel, work):
        done.append(work.head_dim)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(kernel, work)

    monkeypatch.setattr(tuner, "make_case", interrupted)
    out = tmp_path / "elsewhere"
    command = ["--head-dims", "64", "128", "--out", str(out)]
    with dispatch.targeting(HOPPER):
        assert tune(*command) == 130
        before = entries(out)
        assert [entry["head_dim"] for entry in before] == [64]
        assert tune(*command, "--resume") == 0
    assert done == [64, 128, 128]
    assert entries(out)[0] == before[0]
    assert [entry["head_dim"] for entry in entries(out)] == [64, 128]
    shown = capsys.readouterr().out
    assert "1 entries are in" in shown and f"with SPARSEX_TUNED={out}" in shown


def trial(*milliseconds):
    return Trial(None, "measured", None, milliseconds or None, 3)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([trial(9, 10, 11), trial(7, 8, 8.9)], 1),
        ([trial(9, 10, 11), trial(7, 8, 9)], 0),  # within the spread
        ([trial(9, 10, 11), trial(7, 8, 8.9), trial(5, 6, 7), trial()], 2),
        ([trial(), trial(9, 10, 11)], 1),
    ],
)
def test_faster_by_more_than_the_spread(trials, best):
    assert choose_best(trials) is trials[best]
    assert choose_best([trial()]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tuning needs a GPU of compute capability 9.x (Hopper), not cpu"),
        (["--kernels"], "kernels must name at least one"),
        (["--kernels", "forward"], "kernels='forward' is not known: use range_attention, "),
        (["--head-dims"], "head_dims must name at least one"),
        (["--head-dims", "96"], "head_dims=96 is taken by none of the kernels: use 64, 128, 256"),
        (["--head-dims", "x"], "--head-dims"),
        (["--length", "1000"], "length=1000 must be a multiple of 64"),
        (["--length", "1Q"], "length='1Q'"),
        (["--query-heads", "3"], "query_heads=3 must be a multiple of kv_heads=2"),
        (["--query-heads", "8"], "query_heads=8 are 4 for each of kv_heads=2, but block_sparse"),
        (["--kv-heads", "0"], "kv_heads=0 must be positive"),
        (["--samples", "0"], "samples=0 must be positive"),
        (["--seconds", "nan"], "seconds=nan must be positive"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_wrong_arguments(arguments, message, fail, tmp_path):
    assert message in fail("tune", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_checked_before_any_work(fail, tmp_path, monkeypatch):
    with dispatch.targeting(HOPPER):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in fail("tune", *TINY, "--out", tmp_path / "file" / "tuned")
        (tmp_path / FILE).write_text("[]")
        assert "remove the file" in fail("tune", *TINY)
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "none"))
    assert "SPARSEX_TUNED" in fail("tune", *TINY)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["tune", "--help"])
    assert not stop.value.code
    assert "usage: sparsex tune" in capsys.readouterr().out
