import json

import jax
import pytest

from sparsex_jax import cli
from sparsex_jax.benchmarks import attention, cases, results, timing
from sparsex_jax.benchmarks.names import PARTS
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture

TINY = ["--query-heads", "2", "--kv-heads", "1", "--head-dim", "16", "--seconds", "0.05"]


def bench(out, *arguments):
    command = ["bench", "attention", *TINY, "--check-length", "0", "--out", str(out), *arguments]
    return cli.run(command)


def read(out):
    return json.loads(out.read_text())["rows"]


def name(row):
    return row["system"], row["part"], row["direction"], row["tokens"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file with all parts."""
    out = tmp_path_factory.mktemp("results") / "cpu" / "attention.json"
    assert bench(out, "--lengths", "1K", "--selection", "correlated") == 0
    return out


def test_rows_of_all_parts(measured):
    rows = read(measured)
    systems = {"dense_xla": ["op"], "window_xla": ["local"], "sparsex": PARTS}
    expected = {
        (system, part, direction, 1024)
        for system, parts in systems.items()
        for part in parts
        for direction in ("forward", "forward_backward")
        if (part, direction) != ("scoring", "forward_backward")
    }
    assert {name(row) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        assert row["status"] == "measured"
        assert (row["query_heads"], row["kv_heads"], row["head_dim"]) == (2, 1, 16)
        assert 0 < row["milliseconds_q1"] <= row["milliseconds"] <= row["milliseconds_q3"]
        assert row["max_error"] < 0.03 and row["peak_bytes"] >= 0 and row["samples"] >= 1
        assert row["teraflops_per_second"] > 0 and row["gigabytes_per_second"] > 0
        assert row["roofline_share"] is None  # of an unknown chip
        assert (row["gradient_error"] is None) == (row["direction"] == "forward")
        assert (row["speedup_over_dense"] is None) == (row["part"] != "op")
        dynamic = row["system"] == "sparsex" and row["part"] in (
            "op", "scoring", "selection", "selection_in_nodes", "dynamic",
        )  # fmt: skip
        assert (row["recall"] is None) == (row["part"] != "selection_in_nodes")
        assert row["selection"] == ("correlated" if dynamic else None)


def test_the_file_says_what_was_run(measured):
    saved = json.loads(measured.read_text())
    assert saved["benchmark"] == "attention"
    assert saved["command"].startswith("sparsex bench attention --query-heads 2")
    assert saved["config"]["attention"]["window"] == 512


def test_speedup_is_that_of_the_row(measured):
    rows = {name(row): row for row in read(measured)}
    for direction in ("forward", "forward_backward"):
        dense = rows["dense_xla", "op", direction, 1024]["milliseconds"]
        row = rows["sparsex", "op", direction, 1024]
        assert row["speedup_over_dense"] == pytest.approx(dense / row["milliseconds"])


def test_resume_measures_what_is_missing(measured, tmp_path, capsys, monkeypatch):
    out = tmp_path / "attention.json"
    kept = read(measured)
    saved = json.loads(measured.read_text())
    saved["rows"] = [row for row in kept if row["part"] != "rotary"]
    out.write_text(json.dumps(saved))
    done = []
    real = attention.measure_case

    def note(case, *arguments):
        done.append(case.part)
        return real(case, *arguments)

    monkeypatch.setattr(attention, "measure_case", note)
    assert bench(out, "--lengths", "1K", "--selection", "correlated", "--resume") == 0
    assert done == ["rotary", "rotary"]
    assert sorted(map(name, read(out))) == sorted(map(name, kept))
    assert f"{len(saved['rows'])} rows are in" in capsys.readouterr().out
    done.clear()
    monkeypatch.setattr(attention, "measure_case", note)
    # Another selection changes those parts only that depend on it.
    assert bench(out, "--lengths", "1K", "--directions", "forward", "--resume") == 0
    assert done == ["op", "scoring", "selection", "selection_in_nodes", "dynamic"]


def test_resume_refuses_another_run(measured, tmp_path, fail):
    command = ["bench", "attention", "--resume", "--lengths", "1K", "--check-length", "0", *TINY]
    message = fail(*command, "--seed", "1", "--out", measured)
    assert "config.seed is 0 there and 1 here" in message and "without --resume" in message
    other = tmp_path / "other.json"
    saved = json.loads(measured.read_text())
    saved["commit"] = "0123"
    other.write_text(json.dumps(saved))
    assert "commit is '0123' there" in fail(*command, "--out", other)
    other.write_text("[]")
    assert "is not a results file" in fail(*command, "--out", other)


def test_resume_without_a_file_starts(tmp_path):
    out = tmp_path / "attention.json"
    assert bench(out, "--lengths", "1K", "--parts", "rotary", "--resume") == 0
    assert len(read(out)) == 2


def rotary_is(monkeypatch, function):
    real = cases._all_cases
    monkeypatch.setattr(
        cases, "_all_cases",
        lambda: [
            x._replace(function=function) if x.part == "rotary" else x for x in real()
        ],
    )  # fmt: skip


def test_wrong_rows_have_no_time(tmp_path, monkeypatch, capsys):
    rotary_is(monkeypatch, lambda work, inputs: ((inputs["q"], inputs["k"]), ()))
    out = tmp_path / "attention.json"
    assert bench(out, "--lengths", "1K", "--parts", "rotary", "fusion") == 1
    for row in read(out):
        if row["part"] == "fusion":
            assert row["status"] == "measured"
        else:
            assert row["status"] == "wrong" and row["milliseconds"] is None
            assert row["max_error"] > 0.5 and "differ from the reference" in row["note"]
    assert "rotary, forward: wrong: outputs differ" in capsys.readouterr().out


def test_what_is_wrong_at_the_short_length_is_not_timed(tmp_path, monkeypatch):
    def wrong_when_short(work, inputs):
        correct, indices = cases._rotary(work, inputs)
        return tuple(x * (2 if work.tokens == 1024 else 1) for x in correct), indices

    rotary_is(monkeypatch, wrong_when_short)
    out = tmp_path / "attention.json"
    command = ["--lengths", "2K", "--parts", "rotary", "--directions", "forward"]
    assert bench(out, *command) == 0  # nothing was compared at 1K
    assert bench(out, *command, "--check-length", "1K") == 1
    (row,) = read(out)
    assert row["status"] == "wrong" and row["note"].startswith("at 1024 tokens: outputs differ")


def test_lengths_that_do_not_fit_are_rows_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    real = timing.measure

    def full(call, samples, seconds):
        if len(read(out) if out.exists() else []) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(call, samples, seconds)

    out = tmp_path / "attention.json"
    monkeypatch.setattr(attention, "measure", full)
    command = ["--lengths", "1K", "2K", "4K", "--parts", "fusion", "--directions", "forward"]
    assert bench(out, *command) == 0
    assert [row["status"] for row in read(out)] == ["measured", "out_of_memory", "measured"]
    assert read(out)[1]["milliseconds"] is None
    assert "out of memory: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    monkeypatch.setattr(timing, "device_memory", lambda: 2**10)
    assert bench(out, *command) == 0
    assert {row["status"] for row in read(out)} == {"out_of_memory"}


def test_a_failure_costs_one_row(tmp_path, monkeypatch):
    def broken(work, inputs):
        raise NotImplementedError("no such kernel\nat all")

    rotary_is(monkeypatch, broken)
    out = tmp_path / "attention.json"
    command = ["--lengths", "1K", "--parts", "rotary", "fusion", "--directions", "forward"]
    assert bench(out, *command) == 1
    failed, measured = read(out)
    assert failed["status"] == "failed"
    assert failed["note"] == "NotImplementedError: no such kernel at all"
    assert measured["status"] == "measured"
    rotary_is(monkeypatch, cases._rotary)
    assert bench(out, *command, "--resume") == 0
    assert [(x["part"], x["status"]) for x in read(out)] == [
        ("fusion", "measured"), ("rotary", "measured"),
    ]  # fmt: skip
    rotary_is(monkeypatch, broken)
    monkeypatch.setenv("SPARSEX_DEBUG", "1")
    with pytest.raises(NotImplementedError):
        bench(out, *command)


def test_long_dense_attention_is_measured_with_one_head(tmp_path):
    out = tmp_path / "attention.json"
    command = ["--lengths", "1K", "2K", "--parts", "op", "--directions", "forward"]
    assert bench(out, *command, "--dense-seconds", "1e-9") == 0
    short, _, long, ours = read(out)
    assert short["measured_heads"] == 2 and short["note"] is None
    assert long["measured_heads"] == 1 and "1 of 2 query heads" in long["note"]
    assert long["query_heads"] == 2
    # 4 D H N^2 / 2 for both heads
    operations = long["teraflops_per_second"] * long["milliseconds"] * 1e9
    assert operations == pytest.approx(4 * 16 * 2 * 2048 * 2049 / 2)
    ratio = long["milliseconds"] / ours["milliseconds"]
    assert ours["speedup_over_dense"] == pytest.approx(ratio)


def test_rows_are_in_the_file_when_a_later_one_is_interrupted(tmp_path, monkeypatch):
    real = attention.measure_case

    def interrupted(case, *arguments):
        if case.part == "fusion":
            raise KeyboardInterrupt
        return real(case, *arguments)

    monkeypatch.setattr(attention, "measure_case", interrupted)
    out = tmp_path / "attention.json"
    command = ["--lengths", "1K", "--parts", "rotary", "fusion", "--directions", "forward"]
    assert bench(out, *command) == 130
    assert [row["part"] for row in read(out)] == ["rotary"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "use attention, numerics, decode, prefill, traffic or scaling"),
        (["bench", "atention"], "'atention'"),
        (["bench", "attention", "--lengths", "1000"], "length=1000 must be a multiple of 64"),
        (["bench", "attention", "--lengths"], "lengths must name at least one"),
        (["bench", "attention", "--lengths", "1Q"], "length='1Q'"),
        (["bench", "attention", "--parts"], "parts must name at least one"),
        (["bench", "attention", "--parts", "all"], "all"),
        (["bench", "attention", "--query-heads", "3"], "multiple of kv_heads=2"),
        (["bench", "attention", "--seconds", "0"], "seconds=0.0 must be positive"),
        (["bench", "attention", "--samples", "0"], "samples=0 must be positive"),
        (["bench", "attention", "--check-length", "100"], "length=100 must be a multiple"),
        (["bench", "attention", "--seed", "-1"], "seed=-1"),
        (["bench", "attention", "--implementation", "cuda"], "'cuda' is not an implementation"),
    ],
)
def test_wrong_arguments(arguments, message, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments)
    assert not list(tmp_path.iterdir())


def test_out_is_checked_before_any_work(tmp_path, fail):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "attention.json"):
        message = fail("bench", "attention", "--lengths", "1K", "--out", path)
        assert f"out='{path}'" in message and "use a file" in message


def test_default_path_and_help(capsys):
    assert str(results.default_path("attention")) == "results/cpu/attention.json"
    assert cli.run(["bench", "--help"]) == 0
    assert "sparsex bench attention" in capsys.readouterr().out
