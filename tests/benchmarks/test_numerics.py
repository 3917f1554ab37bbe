import json

import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax import cli
from sparsex_jax.benchmarks import numerics
from sparsex_jax.benchmarks.names import LOGITS, PRECISIONS
from sparsex_jax.benchmarks.tables import quality
from sparsex_jax.commands.arguments import format_length
from sparsex_jax.fusion import SoftmaxSum, merge_softmax
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture

TINY = ["--lengths", "4K", "--queries", "8", "--head-dim", "64", "--block", "1K"]


def bench(out, *arguments):
    return cli.run(["bench", "numerics", *TINY, "--out", str(out), *arguments])


def read(out):
    return json.loads(out.read_text())["rows"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file with all rows."""
    out = tmp_path_factory.mktemp("results") / "cpu" / "numerics.json"
    bench(out)
    return out


def test_reference_is_the_definition(monkeypatch):
    monkeypatch.setattr(numerics, "KEYS_AT_ONCE", 100)  # does not divide 1024
    inputs = numerics.make_inputs(1024, 8, 16, jnp.dtype(jnp.float32))
    for logits in LOGITS:
        q, k, v = (np.asarray(x)[0] for x in inputs.of(logits))
        out, lse, top = numerics.attend_exactly(q[0], k[:, 0], v[:, 0])
        # Extended precision where there is one (x86), and no shift: e^30 is no problem there.
        q, k, v = (x.astype(np.longdouble) for x in (q[0], k[:, 0], v[:, 0]))
        products = q @ k.T / np.sqrt(np.longdouble(16))
        weights = np.exp(products)
        total = weights.sum(axis=1)
        np.testing.assert_allclose(out, weights @ v / total[:, None], rtol=1e-11)
        np.testing.assert_allclose(lse, np.log(total), rtol=1e-14)
        np.testing.assert_allclose(top, products.max(axis=1), rtol=1e-13)


def test_kinds_of_logits():
    inputs = numerics.make_inputs(4096, 8, 64, jnp.dtype(jnp.float32))
    products = {}
    for logits in LOGITS:
        q, k, _ = (np.asarray(x)[0].astype(np.float64) for x in inputs.of(logits))
        products[logits] = np.sort(q[0] @ k[:, 0].T / 8, axis=1)
    assert products["normal"].std() == pytest.approx(1, rel=0.1)
    assert products["large"].std() == pytest.approx(6, rel=0.1)
    np.testing.assert_allclose(products["peaked"][:, -1], 20, rtol=1e-5)
    assert products["peaked"][:, -2].max() < 12


def test_bfloat16_operands_are_rounded_ones():
    wide, half = (
        numerics.make_inputs(1024, 8, 16, jnp.dtype(x)) for x in (jnp.float32, jnp.bfloat16)
    )
    for logits in LOGITS:
        for one, other in zip(wide.of(logits), half.of(logits), strict=True):
            assert other.dtype == jnp.bfloat16
            np.testing.assert_array_equal(one.astype(jnp.bfloat16), other)


def test_rows(measured):
    rows = read(measured)
    assert [(x["system"], x["logits"]) for x in rows] == [
        (system, logits)
        for systems in (PRECISIONS[:-1], PRECISIONS[-1:])
        for logits in LOGITS
        for system in systems
    ]
    for row in rows:
        assert (row["tokens"], row["queries"], row["head_dim"]) == (4096, 8, 64)
        assert row["implementation"] == "xla"
        assert row["block"] == (1024 if row["system"] in ("f32_merged", "f32_summed") else None)
        bar = 2e-2 if row["system"] == "bf16" else 1e-6 if row["logits"] != "large" else 2e-5
        assert 0 < row["output_error"] < bar and 0 < row["output_error_max"] < bar
        assert 0 < row["lse_relative_error"] < 1e-6 and row["lse_error"] > 0
        over = row["output_error_max"] > 1e-6 and row["system"] != "bf16"
        assert row["status"] == ("wrong" if over else "measured")
        assert (row["note"] is None) == (not over)
    saved = json.loads(measured.read_text())
    assert saved["benchmark"] == "numerics"
    assert saved["command"].startswith("sparsex bench numerics --lengths 4K")


def test_a_broken_merge_is_wrong(tmp_path, monkeypatch, capsys):
    def a_little_off(first, second):
        out, lse = merge_softmax(first, second)
        return out * (1 + 3e-6), lse

    monkeypatch.setattr(numerics, "merge_softmax", a_little_off)
    out = tmp_path / "numerics.json"
    command = ["--logits", "normal", "--systems", "f32", "f32_merged", "f32_summed"]
    assert bench(out, *command) == 1
    assert [row["status"] for row in read(out)] == ["measured", "wrong", "measured"]
    assert read(out)[1]["output_error"] > 5e-6
    assert "f32_merged normal: wrong: a relative error of" in capsys.readouterr().out
    monkeypatch.setattr(numerics, "merge_softmax", lambda first, second: first)
    assert bench(out, *command[:3], "f32_merged") == 1
    assert read(out)[0]["output_error"] > 0.1


def test_what_is_no_number_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(
        numerics, "attend", lambda q, k, v, *_: (q * jnp.nan, jnp.sum(q, axis=-1))
    )  # fmt: skip
    out = tmp_path / "numerics.json"
    assert bench(out, "--logits", "normal", "--systems", "bf16") == 1
    (row,) = read(out)
    assert row["status"] == "wrong" and row["output_error"] is None


def test_resume_measures_what_is_missing(measured, tmp_path, monkeypatch, capsys):
    out = tmp_path / "numerics.json"
    saved = json.loads(measured.read_text())
    kept = saved["rows"]
    saved["rows"] = [row for row in kept if row["system"] != "bf16"]
    out.write_text(json.dumps(saved))
    done = []
    real = numerics.attend

    def note(q, k, v, system, *arguments):
        done.append(system)
        return real(q, k, v, system, *arguments)

    monkeypatch.setattr(numerics, "attend", note)
    assert bench(out, "--resume") == 0
    assert done == ["bf16"] * 3 and read(out) == kept
    assert "9 rows are in" in capsys.readouterr().out


def test_summing_many_branches_is_one_softmax():
    rng = np.random.default_rng(0)
    branches = [
        (rng.standard_normal((1, 3, 2, 4)), 5 * rng.standard_normal((1, 3, 2))) for _ in range(9)
    ]
    branches[0][1][0, :2] = branches[4][1][0, 1:] = -np.inf
    for out, lse in branches:
        lse[0, 0] = -np.inf
        out[np.isneginf(lse)] = 0
    lse = np.stack([x for _, x in branches])
    weights = np.exp(lse)[:, 0, 1:]
    total = weights.sum(axis=0)
    values = np.einsum("nth,nthd->thd", weights, np.stack([x[0, 1:] for x, _ in branches]))
    narrow = [tuple(jnp.asarray(x, jnp.float32) for x in branch) for branch in branches]
    added = SoftmaxSum.of(narrow[0])
    for branch in narrow[1:]:
        added = added.add(branch)
    out, lse = added.branch(jnp.dtype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and not np.any(out[0, 0]) and np.isneginf(lse[0, 0]).all()
    np.testing.assert_allclose(out[0, 1:], values / total[..., None], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(lse[0, 1:], np.log(total), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1000"], "length=1000 must be a multiple of 64"),
        (["--lengths", "64", "--queries", "100"], "at least queries=100: use 128"),
        (["--lengths", "1Q"], "length='1Q'"),
        (["--lengths"], "lengths must name at least one"),
        (["--logits"], "logits must name at least one"),
        (["--systems", "f64"], "f64"),
        (["--queries", "0"], "queries=0 must be positive"),
        (["--head-dim", "-1"], "head_dim=-1 must be positive"),
        (["--block", "0"], "block='0'"),
        (["--seed", "-1"], "seed=-1"),
        (["--implementation", "cuda"], "'cuda' is not an implementation"),
        (["--implementation", "mosaic_gpu"], "cannot run range_attention on cpu"),
    ],
)
def test_wrong_arguments(arguments, message, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail("bench", "numerics", *arguments)
    assert not list(tmp_path.iterdir())


def test_report(measured, capsys):
    assert cli.run(["report", "--results", str(measured.parents[1])]) == 0
    shown = capsys.readouterr().out
    assert "| logits | system | 4K keys |" in shown
    assert shown.count("(xla, 8 queries, D = 64)") == len(LOGITS) * len(PRECISIONS)
    assert "png" not in shown and not (measured.parent / "plots").exists()


def test_table_of_the_docs(project):
    rows = json.loads((project / "results" / "cpu" / "numerics.json").read_text())["rows"]
    assert quality.numerics_table(rows, format_length) in (project / "docs" / "math.md").read_text()
