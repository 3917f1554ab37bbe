"""What chips send that share a sequence: the command, and the counts of compiled programs."""

import json
import types

import pytest

from sparsex_jax.benchmarks import traffic
from tests.benchmarks.test_hlo import SENDING


def test_rows_and_their_table(run, tmp_path, monkeypatch):
    """Loops whose trips are not known run as often as there are rounds."""
    out = tmp_path / "tpu" / "traffic.json"
    compilation = types.SimpleNamespace(
        executable=types.SimpleNamespace(as_text=lambda: SENDING), temporary_bytes=7
    )
    monkeypatch.setattr(traffic, "compile_op", lambda *_: compilation)
    targets = ("--targets", "v5e:2x2", "v5e:4x8")
    status, shown = run("bench", "traffic", *targets, "--tokens", "16K", "--out", out)
    assert status == 0 and "32 chips send" in shown.out
    results = json.loads(out.read_text())
    assert results["config"]["direction"] == "forward_backward"
    rows = results["rows"]
    assert [(row["chips"], row["strategy"]) for row in rows] == [
        (4, "ring"), (4, "dispatch"), (32, "ring"), (32, "dispatch"),
    ]  # fmt: skip
    assert [row["rounds"] for row in rows] == [0, 2, 0, 5]
    assert [row["collective_permute_bytes"] for row in rows] == [32, 64, 32, 160]
    for row in rows:
        kinds = [row[name] for name in traffic.FIELDS]
        assert row["total_bytes"] == sum(kinds) and row["status"] == "compiled"
    assert rows[2]["rule_bytes"] == 8 * rows[0]["rule_bytes"] == 2 << 30
    status, shown = run("report", "--results", tmp_path)
    assert status == 0 and "| ring | 32 | 16K | " in shown.out and not shown.err
    assert shown.out.count("| 2,048 |") == 1


def test_refuses(run):
    for arguments, message in (
        (("--targets", "v5e:3x3"), "target='v5e:3x3' must be one of v5e:2x2"),
        (("--targets",), "targets must name at least one"),
        (("--strategies", "auto"), "auto"),
        (("--tokens", "1Q"), "tokens='1Q'"),
    ):
        status, shown = run("bench", "traffic", *arguments)
        assert status == 2 and message in shown.err and shown.err.count("\n") == 1


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["ring", "dispatch"])
def test_compiled_programs_send_what_the_rule_says(strategy, tmp_path):
    settings = traffic.Settings(("v5e:2x4",), (strategy,), 16384, 16, 2, 128)
    benchmark = traffic.Benchmark(settings, tmp_path / "traffic.json", "")
    row = benchmark.measure(benchmark.steps()[0])
    assert row["status"] == "compiled", row["note"]
    assert 0.9 < row["total_bytes"] / row["rule_bytes"] < 1.1
