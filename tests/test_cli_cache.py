import json

import pytest

from sparsex_jax import cli
from sparsex_jax.benchmarks import decode
from sparsex_jax.cache import store
from tests.test_cli import fail, model, text

__all__ = ["fail", "model", "text"]  # fixtures


def run(*arguments):
    return cli.run([str(argument) for argument in arguments])


def test_documents_are_read_once_and_asked_about(model, text, tmp_path, capsys, fail, monkeypatch):
    (text / "picture.png").write_bytes(b"\x89PNG\0\0")
    out = tmp_path / "library"
    ingest = ["ingest", text, "--out", out, "--model", model, "--chunk", "512"]
    ingest += ["--save-every", "512", "--room", "128"]
    with monkeypatch.context() as patch:
        save = store.CacheDirectory.save

        def killed(self, *arguments):
            if self.length:
                raise KeyboardInterrupt
            save(self, *arguments)

        patch.setattr(store.CacheDirectory, "save", killed)
        assert run(*ingest) == 130
    capsys.readouterr()
    assert run(*ingest) == 0
    shown = capsys.readouterr().out
    assert "512 of" in shown and "sparsex ask" in shown
    assert len(list((out / "parts").iterdir())) > 2
    asked = ["ask", out, "the quick brown", "--model", model, "--max-new-tokens", 4]
    assert run(*asked) == 0
    shown = capsys.readouterr().out
    assert "parts" not in shown and f"  {text / 'file.txt'}:" in shown
    assert "sources=-1 is negative" in fail(*asked, "--sources", -1)
    assert "in tier='device' only, not 'host'" in fail(*asked, "--sources", 1, "--tier", "host")
    assert "tier='device', not 'compressed'" in fail(*asked, "--tier", "compressed")
    assert "tier='device', not 'host'" in fail(*ingest, "--tier", "host")
    (text / "more.txt").write_text("one more file\n" * 400)
    with monkeypatch.context() as patch:
        added = []

        def killed_later(self, *arguments):
            if added:
                raise KeyboardInterrupt
            added.append(save(self, *arguments))

        patch.setattr(store.CacheDirectory, "save", killed_later)
        assert run(*ingest) == 130
    capsys.readouterr()
    assert run(*asked) == 0 and added  # each token that was read has its line
    (text / "file.txt").write_text("something else\n" * 2000)
    assert "was made from other text" in fail(*ingest)


def test_prompts_are_continued(model, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    command = ["generate", "--model", model, "--prompt", "the quick brown fox", "--file"]
    command += [tmp_path / "prompt.txt", "--max-new-tokens", 5, "--temperature", "1.5"]
    texts = []
    for seed in (1, 2):
        assert run(*command, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert texts[0].startswith("--- 1\n") and "--- 2\n" in texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "nothing to continue: give --prompt"),
        (["generate", "--prompt", ""], "has no tokens"),
        (["generate", "--prompt", "a", "--top-p", "0.5"], "no effect at temperature=0"),
        (["ingest", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["ingest", "nowhere", "--out", "x", "--save-every", "1Q"], "save_every='1Q'"),
        (["ingest", "nowhere", "--out", "x", "--tier", "disk"], "disk"),
        (["ask", "nowhere", "why?"], "nowhere does not exist: run `sparsex ingest`"),
        (["bench", "decode", "--lengths", "1000"], "length=1000 must be a multiple of 64"),
        (["bench", "decode", "--steps", "0"], "steps=0 must be positive"),
        (["bench", "decode", "--steps", "65"], "steps=65 must be a multiple of the block size"),
        (["bench", "prefill", "--lengths", "4096M"], "must be below 2^31"),
        (["bench", "prefill", "--layers", "lsl"], "layers='lsl' is for a preset"),
        (["bench", "prefill", "--chunk", "x"], "chunk='x'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fail(*arguments)


def test_decoding_is_compared_and_timed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "decode.json"
    command = ["bench", "decode", "--lengths", "2K", "--query-heads", 2, "--kv-heads", 1]
    command += ["--head-dim", 8, "--steps", 2, "--samples", 1, "--seconds", "0.1", "--out", out]
    assert run(*command, "--parts", "op") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["system"], row["part"]) for row in rows] == [
        ("dense_xla", "op"), ("sparsex", "op"),
    ]  # fmt: skip
    assert all(row["status"] == "measured" and row["max_error"] < 0.02 for row in rows)
    assert rows[1]["speedup_over_dense"] == rows[0]["milliseconds"] / rows[1]["milliseconds"]
    assert run(*command, "--parts", "writing", "--steps", 64) == 0
    assert json.loads(out.read_text())["rows"][0]["status"] == "measured"
    monkeypatch.setattr(decode, "relative_error", lambda *_: float("nan"))
    assert run(*command, "--parts", "selection") == 1
    assert json.loads(out.read_text())["rows"][0]["milliseconds"] is None
    assert "differs from the reference" in capsys.readouterr().out


def test_a_prefill_is_compared_and_timed(model, tmp_path, capsys):
    out = tmp_path / "prefill.json"
    command = ["bench", "prefill", "--checkpoint", model, "--lengths", "1K", "--chunk", "256"]
    command += ["--tiers", "device", "--check-length", "512", "--samples", 1, "--out", out]
    assert run(*command) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "measured" and row["max_error"] < 0.05
    assert row["tokens_per_second"] == pytest.approx(1024e3 / row["milliseconds"])
    assert (
        row["cache_bytes"] > 2 * 1024 * 8 * 4
        and "sparse layers 0 tokens of a chunk attend, 0 of the last" in row["note"]
    )
