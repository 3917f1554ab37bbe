"""The attention op compiled for TPUs: what its rows say, and the model of its time."""

import json

import numpy as np
import pytest

from pallas_kernels.tpu_schedule import Region, Schedule
from sparsex_jax import cli
from sparsex_jax.benchmarks import compiled, trips
from sparsex_jax.benchmarks.names import PARTS
from sparsex_jax.benchmarks.workload import Workload
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture

HBM = 15.75 * 2**30
HEADS = ["--query-heads", "8", "--kv-heads", "2"]


def bench(out, *arguments):
    command = ["bench", "attention", *HEADS, "--out", str(out), *arguments]
    assert cli.run(command) == 0
    return json.loads(out.read_text())


def check(row):
    """What holds for any row that was compiled and has kernels."""
    assert row["status"] == "compiled" and row["note"] == "compiled, not run"
    assert row["milliseconds"] is None
    assert 0 < row["argument_bytes"] <= row["peak_bytes"] < HBM
    assert 0 < row["roofline_milliseconds"] < row["modelled_milliseconds"]
    together = row["kernel_milliseconds"] + row["xla_milliseconds"]
    assert row["modelled_milliseconds"] == pytest.approx(together)
    assert row["bundles"] > 1000 and row["kernel_milliseconds"] > 0


@pytest.mark.long
def test_rows_of_a_target(tmp_path, capsys):
    out = tmp_path / "tpu-v5e" / "attention.json"
    command = ["--target", "v5e", "--lengths", "1K", "--head-dim", "64"]
    saved = bench(out, *command, "--parts", "op", "local", "--directions", "forward_backward")
    assert "local, forward_backward, v5e:2x4: peak 0." in capsys.readouterr().out
    assert saved["hardware"]["kind"].endswith("compiled ahead of time, not run")
    assert saved["hardware"]["count"] is None and "libtpu" in saved["hardware"]["driver"]
    assert "not measured" in saved["config"]["method"]
    op, local = saved["rows"]
    for row, part in ((op, "op"), (local, "local")):
        check(row)
        assert (row["part"], row["target"], row["chips"]) == (part, "v5e:2x4", 8)
    assert op["implementation"] == local["implementation"] == "mosaic_tpu"
    assert op["kernel_milliseconds"] > local["kernel_milliseconds"]
    # Rows of other targets join the file.
    command = ["--target", "v5e:2x2", "--lengths", "1K", "--head-dim", "64", "--resume"]
    command += ["--implementation", "mosaic_tpu"]  # which would be taken anyway
    saved = bench(out, *command, "--parts", "local", "--directions", "forward_backward")
    *before, last = saved["rows"]
    assert before == [op, local] and (last["target"], last["chips"]) == ("v5e:2x2", 4)
    same = {"target", "chips"}
    assert all(last[name] == local[name] for name in local if name not in same)

    capsys.readouterr()
    assert cli.run(["report", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "on TPU v5 lite, compiled ahead of time, not run" in shown
    assert "Compiled, not run. Memory is a chip's. Times are modelled, not measured." in shown
    assert "| forward and backward | 1K | local | 4 | 0.00 GiB |" in shown
    assert "| direction | length | system |" not in shown  # the table of what was measured
    assert list(out.parent.iterdir()) == [out]  # no pictures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v5e:3x4"], "target='v5e:3x4' must be v5e or one of v5e:2x2, v5e:2x4"),
        (["--target", "h100"], "target='h100' must be v5e or one of"),
        (["--target", "v5e", "--samples", "3"], "samples=3 is of no use with target='v5e'"),
        (["--target", "v5e", "--selection", "correlated"], "selection=correlated is of no use"),
        (["--target", "v5e", "--implementation", "mosaic_gpu"], "cannot run range_attention on t"),
        (["--target", "v5e", "--parts"], "parts must name at least one"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail("bench", "attention", *arguments)
    assert not list(tmp_path.iterdir())


def test_without_libtpu(fail, monkeypatch):
    def missing(target):
        raise RuntimeError(f"compiling for {target} needs libtpu")

    monkeypatch.setattr(compiled.ahead_of_time, "target_mesh", missing)
    message = fail("bench", "attention", "--target", "v5e")
    assert "target='v5e:2x4': compiling for v5e:2x4 needs libtpu" in message


def walking(grid, other=0, whole=0, masked=0, rest=0):
    """A kernel that walks over tiles, with so many bundles in its parts."""
    steps = Region("branch", whole), Region("branch", masked)
    walk = Region("loop", rest, (Region("branch", 0), *steps))
    inner = Region("branch", other, (Region("branch", 0, (walk,)),))
    return Schedule(grid, Region("kernel", 0, (Region("loop", 0, (inner,)),)), 0, 0)


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_steps_of_local_walks_are_those_of_the_window(tokens):
    work = Workload(tokens, 8, 2, 64)
    position = np.arange(tokens)
    start = np.maximum((position - 511) // 64, 0) * 64
    key = np.arange(tokens)
    seen = (start[:, None] <= key) & (key <= position[:, None])
    tiles = seen.reshape(tokens // 256, 256, tokens // 256, 256).swapaxes(1, 2)
    some, every = tiles.any(axis=(2, 3)).sum(), tiles.all(axis=(2, 3)).sum()
    operands = [(2, 4, 64, tokens), (2, 64, tokens), (2, 64, tokens), (1, 2, tokens)]

    for name in ("range_forward", "range_query_gradient", "range_key_gradients"):

        def cycles(name=name, **bundles):
            schedule = walking((2, tokens // 256), **bundles)
            return trips.count_cycles(name, schedule, operands, work)

        assert cycles(other=1) == 2 * tokens // 256
        assert cycles(rest=1, whole=1, masked=1) == 2 * 2 * some
        assert cycles(whole=2, masked=1) == 2 * (some + every)
        assert cycles(whole=1, masked=2) == 2 * (2 * some - every)


def test_steps_of_a_chunk():
    """Of the op, with keys that begin in the middle of a tile: four steps, none seen whole."""
    steps, whole = trips._count_walks(Workload(2**19, 8, 2, 64), 2**16, 2**16 + 768, False, False)
    assert (steps, whole) == (2 * 256 * 4, 0)


def selecting(**bundles):
    """The kernel of selection with so many bundles in its parts, for 32K blocks or fewer."""
    names = ("best", "look", "step", "whole", "masked")
    best, look, step, whole, masked = (bundles.get(name, 0) for name in names)
    scoring = Region("loop", step, (Region("branch", whole), Region("branch", masked)))
    take = Region("loop", best)
    gather = Region("loop", 0, (Region("branch", 0, (Region("loop", look),)),))
    loops = Region("branch", 0, (scoring,)), take, gather, take, gather, take
    chunk = Region("branch", 0, (Region("loop", bundles.get("chunk", 0), loops),))
    return Schedule((1, 2, 64), Region("kernel", 0, (Region("loop", 0, (chunk,)),)), 0, 0)


def test_steps_of_selection():
    work = Workload(2**19, 8, 2, 64)  # 8192 blocks
    operands = [(64, 1, 4), (1, 2, 64, 2**15), (1, 2, 2**15), (1, 2, 2**13, 64)]

    def cycles(**bundles):
        return trips.count_cycles("block_selection", selecting(**bundles), operands, work)

    # On average over the 16 calls; each has 64 tiles of 512 queries for each of 2 KV heads.
    limit = np.maximum((np.arange(2**19) - 511) // 64, 0).reshape(-1, 512)
    steps = 2 * (-(-limit.max(axis=1) // 512)).sum() / 16
    whole = 2 * (limit.min(axis=1) // 512).sum() / 16
    chunks = 2 * (limit.max(axis=1) > 0).sum() / 16
    assert cycles(step=1, whole=1, masked=1) == pytest.approx(2 * steps)
    assert cycles(whole=1, masked=2) == pytest.approx(2 * steps - whole)
    assert cycles(chunk=1) == pytest.approx(chunks)
    assert cycles(best=1) == pytest.approx(3 * 16 * chunks)
    looks = 2 * np.ceil(np.ceil(limit.max(axis=1) / 512) / 8).sum() / 16
    assert cycles(look=1) == pytest.approx(4 * (steps + looks))


def test_other_code_is_refused():
    operands = [(2, 4, 64, 1024), (2, 64, 1024)]
    empty = Schedule((2, 4), Region("kernel", 9, (Region("loop", 9),)), 0, 0)
    work = Workload(1024, 8, 2, 64)
    with pytest.raises(ValueError, match="how often"):
        trips.count_cycles("another", empty, operands, work)
    with pytest.raises(ValueError, match="not as it was"):
        trips.count_cycles("range_forward", empty, operands, work)
    assert trips.count_cycles("block_sparse_attention_sum", empty, operands, work) == 9 + 8 * 9


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("head_dim", ["64", "128"])
@pytest.mark.parametrize("length", ["16K", "512K"])
@pytest.mark.parametrize("target", ["v5e:2x4", "v5e:8x8", "v5e:16x16"])
def test_op_fits(target, length, head_dim, tmp_path):
    command = ["--target", target, "--lengths", length, "--head-dim", head_dim]
    saved = bench(
        tmp_path / "attention.json", *command, "--parts", "op", "--directions", "forward_backward"
    )
    (row,) = saved["rows"]
    check(row)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_all_parts_have_rows(tmp_path):
    command = ["--target", "v5e", "--lengths", "2K", "--head-dim", "64"]
    rows = bench(tmp_path / "attention.json", *command)["rows"]
    assert {row["part"] for row in rows if row["direction"] == "forward"} == set(PARTS)
    for row in rows:
        assert row["status"] == "compiled" and row["modelled_milliseconds"] > 0
        assert row["roofline_milliseconds"] < row["modelled_milliseconds"]
