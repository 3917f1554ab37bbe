"""Perplexity: the sequences, what is computed of them, the rows."""

import json
import math

import numpy as np
import pytest
from flax import nnx

from sparsex_jax import cli
from sparsex_jax.benchmarks.tables.quality import perplexity_table
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import load
from sparsex_jax.tasks.perplexity import cut, make_row, sequence_losses
from sparsex_jax.training import save_model
from tests.modules.test_transformer import make, make_tokens
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture


def test_every_token_but_the_first_is_predicted_once():
    sequences = cut(np.arange(100), 30)
    assert sequences.shape == (3, 31)
    np.testing.assert_array_equal(sequences[:, 1:].ravel(), np.arange(1, 91))
    spread = cut(np.arange(1000), 30, most=4)
    np.testing.assert_array_equal(spread[:, 0], [0, 8 * 30, 16 * 30, 24 * 30])
    assert len(cut(np.arange(100), 30, most=7)) == 3
    np.testing.assert_array_equal(cut(np.arange(100), 30, stride=10)[:, 0], np.arange(0, 70, 10))
    assert len(cut(np.arange(61), 30)) == 2
    with pytest.raises(ValueError, match="has 60 tokens: lengths must be at most 29 .* not 30"):
        cut(np.arange(60), 30)


def test_losses_are_means_over_tokens():
    model, tokens = make(), make_tokens(2, 41)
    logits = np.asarray(model.logits(model(tokens[:, :-1])), np.float64)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    expected = (np.log(np.exp(logits).sum(-1)) - chosen).mean(axis=1)
    np.testing.assert_allclose(list(sequence_losses(model, tokens)), expected, rtol=1e-4)


def test_rows_compare_sequence_by_sequence():
    losses = np.array([1.0, 2.0, 3.0, 4.0])
    row = make_row("sparsex", "a", 4096, losses, None)
    assert row["perplexity"] == pytest.approx(math.exp(2.5)) and row["ratio"] is None
    assert row["high"] / row["perplexity"] == pytest.approx(
        math.exp(1.959964 * math.sqrt(5 / 3) / 2)
    )
    other = make_row("dense", "b", 4096, losses + 0.01, losses)
    # the sequences differ much, the models by the same everywhere
    for name in ("ratio", "ratio_low", "ratio_high"):
        assert other[name] == pytest.approx(math.exp(0.01))
    full = make_row("dense", "b", 32768, np.zeros(0), losses, "out_of_memory", "9 bytes")
    assert full["perplexity"] is None and full["ratio"] is None and full["note"] == "9 bytes"
    lines = perplexity_table([row, other, full], str).splitlines()
    assert lines[0] == "| system | checkpoint | 4096 tokens | 32768 tokens |"
    assert lines[2].startswith("| sparsex | a | 12.182 (") and lines[2].endswith(") |  |")
    assert "; +1.01 % (+1.01 to +1.01) | out of memory |" in lines[3]


def test_command(folder, tmp_path, fail, capsys):
    paths = []
    for layers in ("s", "d"):
        config = ModelConfig(
            vocab_size=4096, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
            layers=layers, attention=AttentionConfig(window=64, top_k=2, score_dim=8),
        )  # fmt: skip
        paths.append(tmp_path / layers)
        model = Transformer(config, rngs=nnx.Rngs(0))
        save_model(paths[-1], model, config, load().fingerprint)
    out = tmp_path / "results" / "cpu" / "perplexity.json"
    command = ["eval", "perplexity", "--checkpoints", *paths, "--haystack", folder]
    command += ["--lengths", "256", "512", "--out", out]
    assert cli.run([str(word) for word in (*command, "--sequences", 3)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["system"], row["tokens"], row["sequences"]) for row in rows] == [
        ("sparsex", 256, 3), ("sparsex", 512, 3), ("dense", 256, 3), ("dense", 512, 3),
    ]  # fmt: skip
    for row, ratio in zip(rows, (None, None, 1, 1), strict=True):
        assert 4096 < row["perplexity"] < 10000  # of 4096 tokens, without any training
        assert row["ratio"] is None if ratio is None else row["ratio"] == pytest.approx(1, rel=0.2)
    assert cli.run(["report", "--results", str(tmp_path / "results")]) == 0
    assert f"| dense | {paths[1]} | " in capsys.readouterr().out
    assert "sequences=1 leave no interval: use at least 2" in fail(*command, "--sequences", 1)
    assert "lengths must be at most" in fail(*command[:-4], "--lengths", "1M", "--out", out)
