"""Training steps compiled for TPUs that are not here, with the kernels."""

import dataclasses
import json
import runpy

import jax
import pytest

from pallas_kernels.ahead_of_time import MemoryExceededError
from sparsex_jax.benchmarks import plan as plans
from sparsex_jax.benchmarks import planned
from sparsex_jax.benchmarks.operations import count_operations
from sparsex_jax.benchmarks.plan import longest_stage, make_plan, way_out
from sparsex_jax.benchmarks.planned import Prefill, TrainingStep, trace
from sparsex_jax.config import ModelConfig, StageConfig, TrainConfig
from tests.pallas_kernels.test_tpu import KERNELS

CUT = """
import dataclasses, runpy
config = runpy.run_path({preset!r})["config"]
attention = dataclasses.replace(config.model.attention, landmarks="off")
config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, layers="s", vocab_size=256, attention=attention),
    stages=(dataclasses.replace(config.stages[0], length=256, batch_size=4, top_k=4),),
)
"""


def preset(project, name):
    return runpy.run_path(str(project / "configs" / f"{name}.py"))["config"]


@pytest.mark.long
def test_nano_with_one_layer(project, tmp_path, run):
    """What is quick to compile: its sparse layer, few words, no landmarks, short sequences."""
    path, out = tmp_path / "cut.py", tmp_path / "plan.json"
    path.write_text(CUT.format(preset=str(project / "configs" / "nano.py")))
    status, shown = run("plan", path, "--target", "v5e:2x2", "--out", out)
    assert status == 0 and not shown.err
    assert "  range_forward 1\n" in shown.out and "  fits, of 15.75\n" in shown.out
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert results["benchmark"] == "plan" and results["config"]["model"]["layers"] == "s"
    assert row["status"] == "compiled" and row["problem"] is None
    assert {each.rsplit(" ", 1)[0] for each in row["kernels"].split(", ")} == KERNELS
    assert (row["devices"], row["sequences"], row["tokens"]) == (4, 1, 256)
    assert row["batch_bytes"] == 3 * 4 * 256
    # All but vectors is spread over the four chips.
    assert 1 <= row["parameter_bytes"] / row["parameters"] < 1.01
    assert 2 <= row["optimizer_bytes"] / row["parameter_bytes"] < 2.01
    # At least the parameters of all chips, and one gradient.
    assert 4 * row["parameters"] < row["temporary_bytes"] < row["total_bytes"] < 2**28
    # Three quarters of the gradients go to other chips, and parts of parameters to three of them.
    assert "  all-gather " in shown.out and row["collective_permute_bytes"] == 0
    scattered = row["reduce_scatter_bytes"] + row["all_reduce_bytes"]
    assert 0.7 < scattered / (3 * row["parameters"]) < 2.2
    assert 0.4 < row["all_gather_bytes"] / (3 * row["parameters"]) < 1.5


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "target", "devices"),
    [
        ("nano", "v5e:2x2", 2),
        ("needle", "v5e:2x2", 2),
        ("billion", "v5e:2x4", 8),
        ("billion_4m", "v5e:16x16", 256),
    ],
)
def test_presets_fit(project, name, target, devices):
    config = preset(project, name)
    plan = make_plan(config, target, devices)
    assert plan.problem is None and plan.devices == devices and plan.sequences == 1
    assert set(plan.kernels) == KERNELS
    assert plan.total_bytes <= plan.chip_bytes
    # Once for a layer's window and once for its landmarks; what repeats is there once.
    assert plan.kernels["range_query_gradient"] == (3 if name.startswith("billion") else 5)


@pytest.mark.long
@pytest.mark.parametrize("least", [0, 2**34])
def test_gpus(project, tmp_path, monkeypatch, run, least):
    path, out = tmp_path / "cut.py", tmp_path / "plan.json"
    path.write_text(CUT.format(preset=str(project / "configs" / "nano.py")))
    monkeypatch.setitem(plans._CHIP_BYTES, "h200", least)
    status, shown = run("plan", path, "--target", "h200x4", "--out", out)
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert results["hardware"]["driver"].startswith("jax-cuda13-plugin ")
    assert "range_forward" in row["kernels"] and row["devices"] == 4
    assert row["reduce_scatter_bytes"] > 0.7 * 3 * row["parameters"] and row["links_seconds"] > 0
    if least:
        assert status == 0 and "  fits, of 16.00\n" in shown.out
    else:
        assert status == 1 and "GiB are more than the 0.00 GiB of an H200" in shown.out


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_4m_tokens_fit_on_8_gpus_where_repetitions_are_recomputed(project):
    config = preset(project, "billion_4m")
    model = dataclasses.replace(config.model, remat="repetition")
    plan = make_plan(dataclasses.replace(config, model=model), "h100x8")
    assert plan.problem is None and plan.devices == 8 and plan.tokens == 2**19


@pytest.mark.long
def test_64m_tokens_are_read_by_256_gpus(project):
    plan = make_plan(preset(project, "billion_4m"), "h100x256", prefill=2**26)
    assert plan.problem is None and plan.tokens == 2**18
    # Keys, values and more of four sparse layers with two KV heads of width 128.
    kept = 4 * 2**18 * 2 * 2 * 128 * 2
    assert kept < plan.cache_bytes < 1.1 * kept


def test_billion_has_a_billion_parameters(project):
    config = preset(project, "billion")
    state = TrainingStep(config, longest_stage(config), None).state()
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    assert 1e9 < count < 1.1e9


def test_what_a_prefill_computes(project):
    """Two operations per token and parameter of matrices but logits, and the attention's."""
    config = preset(project, "nano")
    work = Prefill(config, 4096, None)
    state = work.state()
    assert work.batch().shape == (1, 4096)
    assert all(x.dtype == ("bfloat16" if x.ndim > 1 else "float32") for x in jax.tree.leaves(state))
    embedding = config.model.vocab_size * config.model.model_dim
    matrices = sum(x.size for x in jax.tree.leaves(state) if x.ndim == 2) - embedding
    # Attention to windows of 128 tokens takes tiles of 512.
    assert 1.2 < count_operations(trace(work)) / (2 * 4096 * matrices) < 2.5


@pytest.mark.long
def test_a_prefill_on_gpus(project, tmp_path, run):
    path, out = tmp_path / "cut.py", tmp_path / "plan.json"
    path.write_text(CUT.format(preset=str(project / "configs" / "nano.py")))
    split = "--mesh.seq", 4, "--mesh.fsdp", 1
    status, shown = run("plan", path, "--target", "h200x4", "--prefill", "4K", *split, "--out", out)
    assert status == 0 and ", a prefill on 4 chips of h200x4" in shown.out
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["work"], row["stage"], row["tokens"], row["optimizer_bytes"]) == (
        "prefill", None, 1024, 0,
    )  # fmt: skip
    model = json.loads(out.read_text())["config"]["model"]
    keys = 2 * 1024 * model["num_kv_heads"] * model["head_dim"] * 2
    assert keys < row["cache_bytes"] < 1.2 * keys
    assert row["problem"] is None and "block_sparse" in row["kernels"]


def test_what_one_device_computes(project):
    """Six operations per token and parameter of matrices, and the attention's."""
    config = preset(project, "nano")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="l"))
    step = TrainingStep(config, 0, None)
    count = count_operations(trace(step))
    matrices = sum(x.size for x in jax.tree.leaves(step.state()["params"]) if x.ndim == 2)
    tokens = 64 * 1024
    dense = 6 * tokens * matrices
    # The logits are computed twice.
    again = 2 * tokens * config.model.vocab_size * config.model.model_dim
    assert 1 < count / (dense + again) < 1.5


def stub(monkeypatch, problem):
    """No compilation, but its outcome."""

    def compile_for(*_, **__):
        raise MemoryExceededError(problem)

    monkeypatch.setattr(plans, "compile_for", compile_for)


def test_says_what_to_do_where_it_does_not_fit(project, tmp_path, monkeypatch, run):
    stub(monkeypatch, "v5e:2x2 has too little memory for this: 20.01G exceed 15.75G")
    path, out = tmp_path / "cut.py", tmp_path / "plan.json"
    path.write_text(CUT.format(preset=str(project / "configs" / "nano.py")))
    status, shown = run("plan", path, "--target", "v5e:2x2", "--devices", 2, "--out", out)
    assert status == 1
    assert "  does not fit, of 15.75\n" in shown.out and "20.01G exceed" in shown.out
    assert shown.out.endswith("use --accumulation 2\n")
    (row,) = json.loads(out.read_text())["rows"]
    assert row["temporary_bytes"] is None and row["total_bytes"] is None and row["kernels"] == ""
    assert row["sequences"] == 2 and "20.01G" in row["problem"]


def test_ways_out():
    config = TrainConfig(stages=(StageConfig(steps=1, length=64, batch_size=18),), accumulation=2)
    plan = dataclasses.replace(_plan(), sequences=9)
    assert way_out(config, plan) == "use --accumulation 6"
    plan = _plan()
    assert way_out(config, plan) == "use --model.remat layer"
    config = dataclasses.replace(config, model=ModelConfig(remat="layer"))
    assert "--model.remat repetition, where layers repeat" in way_out(config, plan)
    config = dataclasses.replace(config, model=ModelConfig(remat="repetition"))
    assert "shorter sequences" in way_out(config, plan)
    assert way_out(config, plan, prefill=True).startswith("use a shorter context")


def _plan():
    sizes = 64, 1, 0, 0, 0, 0, 0, None, None
    return plans.Plan("TPU v5 lite", 2**34, 1, *sizes, {}, 394 * 10**12, {}, "too large")


def test_bottlenecks():
    plan = _plan()
    assert plan.least_seconds() == {"arithmetic": 2}
    sent = {"all-gather": 10**11, "all-to-all": 3 * 10**11}
    plan = dataclasses.replace(plan, sent_bytes=sent, devices=16)
    assert plan.least_seconds() == {"arithmetic": 2, "links": 0.5 + 6}
    for devices, links in ((8, 4e11 / 450e9), (16, 4e11 / 50e9)):  # the network between hosts
        plan = dataclasses.replace(plan, chip="NVIDIA H200", devices=devices)
        assert plan.least_seconds()["links"] == links


def test_longest_stage():
    lengths = (64, 256, 128, 256)
    stages = tuple(StageConfig(steps=1, length=n, batch_size=1) for n in lengths)
    assert longest_stage(TrainConfig(stages=stages)) == 3


def test_refuses(project, run, monkeypatch):
    nano = project / "configs" / "nano.py"
    for arguments, message in (
        ((), "the first argument of plan must be a preset"),
        ((nano,), "--target"),
        ((nano, "--target", "v5e:3x3"), "target='v5e:3x3' must be a slice, v5e:2x2, v5e:2x4"),
        ((nano, "--target", "h200"), "target='h200' must be a slice, v5e:2x2"),
        ((nano, "--target", "h200x0"), "target='h200x0': devices=0 must be 1 to 8"),
        ((nano, "--target", "h100x12"), "target='h100x12': devices=12 must be 1 to 8, or a"),
        ((nano, "--target", "h100x8", "--devices", 2), "devices=2 is for slices: h100x8 says"),
        ((nano, "--target", "v5e:2x2", "--devices", 5), "devices=5 must be 1 to 4"),
        ((nano, "--target", "v5e:2x2", "--stage", 5), "stage=5 must be one of the preset's: 0"),
        ((nano, "--target", "v5e:2x2", "--stage", 1, "--prefill", "1M"), "leave it out with pre"),
        ((nano, "--target", "v5e:2x2", "--prefill", "1X"), "prefill='1X'"),
        (
            (nano, "--target", "v5e:2x2", "--prefill", "1000", "--mesh.seq", 4, "--mesh.fsdp", 1),
            "prefill.length=1000 must be mesh.seq=4 times a multiple of",
        ),
        (
            (nano, "--target", "v5e:2x4"),
            "batch_size=2 must be a multiple of",
        ),
    ):
        status, shown = run("plan", *arguments)
        assert status == 2 and message in shown.err and shown.err.count("\n") == 1

    def missing(*_):
        raise RuntimeError("compiling for v5e:2x2 needs libtpu")

    monkeypatch.setattr(planned, "target_mesh", missing)
    status, shown = run("plan", nano, "--target", "v5e:2x2")
    assert status == 2 and "needs libtpu" in shown.err
