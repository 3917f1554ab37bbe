"""Loss by position: buckets, less context, the rows and the command."""

import json

import numpy as np
import pytest

from sparsex_jax import cli
from sparsex_jax.cache import Engine
from sparsex_jax.tasks.position_loss import buckets, losses_with, make_rows
from tests.modules.test_transformer import make, make_tokens
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture


def test_buckets_are_powers_of_two():
    assert buckets(5000) == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]
    assert buckets(4096)[-1] == (2048, 4096) and buckets(300) == [(0, 300)]
    assert buckets(1 << 21)[-1] == (1 << 20, 1 << 21)


def test_less_context_is_that_of_windows(context=33):
    language_model, (tokens,) = make(), make_tokens(1, 151)
    engine = Engine(language_model, context + 1, batch_size=3, chunk=16)
    done = []
    found = losses_with(engine, tokens, context, done.append)
    assert found.shape == (150,) and np.isfinite(found).all() and done[-1] == 150
    single = Engine(language_model, context + 1, chunk=16)
    for place in (0, 32, 40, 77, 149):
        # The window that ends last among those whose second half has the token.
        step = context // 2
        begin = min(max(0, place // step - 1) * step, 150 - context)
        window = tokens[None, begin : begin + context + 1]
        expected = single.losses(window)[0, place - begin]
        assert place < context or place - begin >= step
        assert found[place] == pytest.approx(expected, rel=1e-4)


def test_rows_compare_sequence_by_sequence():
    losses = np.array([[1.0, 0.5], [2.0, 1.5], [3.0, 2.0]])
    whole = make_rows("sparsex", "a", 2048, 2048, losses, None, 2048)
    assert [(row["begin"], row["end"], row["loss"]) for row in whole] == [
        (0, 1024, 2.0), (1024, 2048, pytest.approx(4 / 3)),
    ]  # fmt: skip
    less = make_rows("sparsex", "a", 2048, 512, losses + 0.25, losses, 2048)
    for row in less:
        assert [row[name] for name in ("more", "more_low", "more_high")] == pytest.approx(
            [0.25] * 3
        )
    # Overlapping by three quarters of a bucket, four sequences say as much as one.
    near = make_rows("sparsex", "a", 2048, 2048, losses, None, 256)
    for row, other in zip(near, whole, strict=True):
        assert row["high"] - row["loss"] == pytest.approx(2 * (other["high"] - other["loss"]))
    full = make_rows(
        "dense", "b", 2048, 2048, np.zeros(0), losses, 2048, "out_of_memory", "9 bytes"
    )
    assert all(row["loss"] is None and row["note"] == "9 bytes" for row in full)


def test_command(model, folder, tmp_path, fail, capsys):
    out = tmp_path / "results" / "cpu" / "lm.json"
    command = ["eval", "lm", "--data", folder, "--checkpoints", model, "--out", out]
    command += ["--length", "2K", "--chunk", 512]
    short = [*command, "--contexts", "512", "--sequences", 2]
    assert cli.run([str(word) for word in short]) == 0
    results = json.loads(out.read_text())
    rows = results["rows"]
    assert [(row["context"], row["end"], row["sequences"]) for row in rows] == [
        (2048, 1024, 2), (2048, 2048, 2), (512, 1024, 2), (512, 2048, 2),
    ]  # fmt: skip
    for row in rows:
        assert 5 < row["low"] <= row["loss"] <= row["high"] < 9
        assert (row["more"] is None) == (row["context"] == 2048)
    assert results["config"]["sequences"] == 2
    assert cli.run(["report", "--results", str(tmp_path / "results")]) == 0
    shown = capsys.readouterr().out
    assert (
        "![lm-loss-2K](" in shown
        and "Nats per token by position" in shown
        and "| checkpoint | context | to 1K |" in shown
    )
    assert "contexts=4096 must lie between 2 and length=2048" in fail(*command, "--contexts", "4K")
    assert "sequences=1 leave no interval" in fail(*short[:-1], 1)
    assert cli.run([str(word) for word in (*short, "--stride", "1K")]) == 0
    assert json.loads(out.read_text())["config"]["stride"] == 1024
    assert "stride=4096 leaves text out" in fail(*short, "--stride", "4K")
    assert "lengths must be at most" in fail(*short, "--length", "1M")
