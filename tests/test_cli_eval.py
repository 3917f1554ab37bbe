import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from sparsex_jax import cli
from sparsex_jax.cache import Engine
from sparsex_jax.commands import answering, eval_needle
from sparsex_jax.commands.model import open_haystack
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import load
from sparsex_jax.tasks.corpus import Corpus
from sparsex_jax.training import load_model, model_crc32, save_model
from tests.test_cli import fail, model, text

__all__ = ["fail", "model", "text"]  # fixtures


@pytest.mark.parametrize("name", ["a file/needle.json", "a folder"])
def test_out_is_checked_before_any_work(name, model, text, tmp_path, fail, monkeypatch):
    (tmp_path / "a file").write_text("")
    (tmp_path / "a folder").mkdir()
    monkeypatch.setattr(eval_needle, "make_console", lambda: pytest.fail("the work has begun"))
    out = tmp_path / name
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    message = fail(*command, "--lengths", "1K", "--samples", 1)
    assert f"out='{out}'" in message and "use a file" in message and "Errno" not in message
    assert not list((tmp_path / "a folder").iterdir())


def test_a_task_that_does_not_fit_is_a_row(model, text, tmp_path, capsys, monkeypatch):
    def answer(self, *arguments):
        if self.capacity > 1024:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(self, *arguments)

    real = Engine.answer
    monkeypatch.setattr(Engine, "answer", answer)
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "2K", "--samples", 2, "--tasks", "single_2", "single_3"]
    assert cli.run([str(word) for word in command]) == 0
    results = json.loads(out.read_text())
    assert results["config"]["model_crc32"] == model_crc32(model)
    measured, full = results["rows"][:2], results["rows"][2:]
    assert [row["status"] for row in measured] == ["measured"] * 2
    assert [(row["task"], row["tokens"], row["status"]) for row in full] == [
        ("single_2", 2048, "out_of_memory"), ("single_3", 2048, "out_of_memory"),
    ]  # fmt: skip
    assert full[0]["accuracy"] is None and "allocating 9 bytes" in full[0]["note"]
    assert "single_3 at 2K: out of memory" in capsys.readouterr().out


def test_other_errors_of_the_device_are_not_hidden(model, text, tmp_path, monkeypatch):
    def answer(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(Engine, "answer", answer)
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--lengths", "1K"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        cli.run([*map(str, command), "--out", str(tmp_path / "needle.json")])


def test_haystack_is_not_claimed_to_be_new_to_every_model():
    description = open_haystack(None, load())[1]
    assert "held-out split" in description and "never" not in description


def test_of_a_folder_what_training_on_it_leaves_out_is_read(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}\n" * 9)
    tokenizer = load()
    everything = open_haystack(tmp_path, tokenizer)[0].all_tokens()
    corpus, description = open_haystack(tmp_path, tokenizer, held_out=True)
    left_out = corpus.all_tokens()
    trained = Corpus(tmp_path, tokenizer=tokenizer, split="train").all_tokens()
    assert description.endswith("the held-out split") and 0 < len(left_out) < len(everything) / 2
    assert len(left_out) + len(trained) == len(everything)
    lines = [set(tokenizer.decode(x).splitlines()) for x in (left_out, trained)]
    assert not lines[0] & lines[1]


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    """A dense model that knows nothing."""
    path = tmp_path_factory.mktemp("model") / "dense"
    config = ModelConfig(
        vocab_size=4096, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
        layers="ld", attention=AttentionConfig(window=64, top_k=2, score_dim=8),
    )  # fmt: skip
    save_model(path, Transformer(config, rngs=nnx.Rngs(0)), config, load().fingerprint)
    return path


def test_baselines_have_rows_of_their_own_name(dense_model, text, tmp_path, fail):
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", dense_model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "--samples", 1, "--tasks", "single_2"]
    assert cli.run([str(word) for word in command]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["system"], row["status"]) == ("dense", "measured") and row["seconds"] > 0
    message = fail(*command, "--tiers", "device", "host")
    assert "this model has dense ones: use --tiers device" in message


def test_what_takes_too_long_is_a_row_that_shows_it(
    dense_model, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(answering, "_STRETCH", 1)
    monkeypatch.setattr(answering, "_PROOF", 0)
    seconds = itertools.count()
    monkeypatch.setattr(answering.time, "perf_counter", lambda: 100.0 * next(seconds))
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", dense_model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "16K", "--samples", 1, "--tasks", "single_2"]
    assert cli.run([str(word) for word in command]) == 0
    short, long = json.loads(out.read_text())["rows"]
    assert short["status"] == "measured"
    # 2048 of 16K tokens took 100 s behind the stretch that compiles
    assert (long["status"], long["accuracy"], long["samples"]) == ("too_slow", None, 0)
    assert long["seconds"] == pytest.approx(100 * 16368 / 2048)
    assert "takes at least 799 s, more than the 600 s allowed: 2048 tokens" in long["note"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "single_2 at 16K: too slow (a sample of 16368 tokens takes at least 799 s" in shown


def test_answers_within_the_limit_are_those_of_the_engine(dense_model, monkeypatch):
    monkeypatch.setattr(answering, "_STRETCH", 2)
    _, model = load_model(dense_model, "float32", compute_dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 4096, (2, 700))
    engine = Engine(model, 1024, batch_size=2, chunk=64)
    expected = engine.generate(tokens, 4)
    found = answering.generate_within(engine, tokens, 4, (), limit=1e9)
    np.testing.assert_array_equal(found, expected)


def test_blocks_are_searched_otherwise(model, dense_model, text, tmp_path, fail):
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--haystack", text, "--out", out, "--lengths", "2K"]
    command += ["--samples", 1, "--tasks", "single_2", "--search-beam", 1]
    in_nodes = [*command, "--checkpoint", model, "--search-node-size", 8]
    assert cli.run([str(word) for word in in_nodes]) == 0
    results = json.loads(out.read_text())
    assert results["rows"][0]["system"] == "sparsex, nodes of 8, beam 1"
    assert results["config"]["model"]["attention"]["search_node_size"] == 8
    assert "a beam is of nodes" in fail(*command, "--checkpoint", model)
    assert "searches no blocks" in fail(*in_nodes, "--tiers", "compressed")
    dense = [*command, "--checkpoint", dense_model, "--search-node-size", 8]
    assert "layers='ld' search no blocks" in fail(*dense)
    wrong = fail(*command, "--checkpoint", model, "--search-node-size", 9)
    assert "search_node_size=9 must be a multiple of 8" in wrong


@pytest.mark.parametrize("which", ["model", "dense_model"])
def test_misses_are_diagnosed(which, request, text, tmp_path, capsys, fail):
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", request.getfixturevalue(which)]
    command += ["--haystack", text, "--out", out, "--lengths", "1K", "--samples", 3]
    command += ["--batch-size", 2, "--tasks", "single_2", "multiquery", "--diagnose"]
    assert cli.run([str(word) for word in command]) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert row["correct"] == 0
        counts = [row[name] for name in ("not_selected", "not_attended", "not_copied")]
        assert sum(counts) == row["samples"] == 3
        if which == "dense_model":
            assert counts == [0, 3, 0]  # sees all, and knows nothing
    shown = " ".join(capsys.readouterr().out.split())
    assert "multiquery at 1K: 0 of 3 right (" in shown and " not " in shown
    message = fail(*command, "--tiers", "device", "compressed")
    assert "diagnose looks into the cache of the tier device: use --tiers device" in message


def test_depths_have_rows_and_answers_are_kept(model, text, tmp_path, fail, monkeypatch, capsys):
    out, log = tmp_path / "needle.json", tmp_path / "needle.answers.jsonl"
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "--batch-size", 2, "--tasks", "single_2", "multiquery"]
    command += ["--depths", 3, "--chunk", 512]
    monkeypatch.setattr(eval_needle, "_TELL", -1)

    def run(*more):
        assert cli.run([str(word) for word in (*command, *more)]) == 0
        return json.loads(out.read_text())["rows"]

    rows = run("--samples", 6)
    names = [(row["task"], row["depth"], row["samples"]) for row in rows]
    assert names == [
        ("single_2", None, 6), ("single_2", 0, 2), ("single_2", 50, 2), ("single_2", 100, 2),
        ("multiquery", None, 6),
    ]  # fmt: skip
    assert json.loads(out.read_text())["config"]["chunk"] == 512
    assert "single_2, 1K: 0 of 4 right, 6 in all" in capsys.readouterr().out
    lines = log.read_text().splitlines()
    answers = [x for line in lines[1:] for x in json.loads(line)["answers"]]
    assert [x["index"] for x in answers] == [*range(6)] * 2
    # killed while the third batch of the second task was written
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    asked = []
    real = Engine.answer
    monkeypatch.setattr(
        Engine, "answer", lambda self, *rest: asked.append(len(rest[1])) or real(self, *rest)
    )
    assert run("--samples", 6, "--resume") == rows_but_seconds(rows, out)
    assert asked == [2] and len(log.read_text().splitlines()) == len(lines)
    asked.clear()
    assert [row["samples"] for row in run("--samples", 9, "--resume")] == [9, 3, 3, 3, 9]
    assert asked == [2, 2] * 2
    with monkeypatch.context() as patch:  # which is told before any text is read
        patch.setattr(Corpus, "all_tokens", lambda _: pytest.fail("the text was read"))
        message = fail(*command, "--samples", 6, "--resume", "--seed", 1)
    assert "are of another run (config.seed is 0 there and 1 here)" in message
    assert "samples=7 must be a multiple of depths=3: use 9" in fail(*command, "--samples", 7)
    log.write_text("nonsense\n")
    assert "is no log of answers" in fail(*command, "--samples", 6, "--resume")
    run("--samples", 3)
    assert len(log.read_text().splitlines()) == 5


def rows_but_seconds(rows, out):
    """Rows with the times of those in a file."""
    found = json.loads(out.read_text())["rows"]
    return [row | {"seconds": new["seconds"]} for row, new in zip(rows, found, strict=True)]


def test_what_takes_too_long_is_not_tried_again(dense_model, text, tmp_path, monkeypatch):
    out = tmp_path / "needle.json"
    command = ["eval", "needle", "--checkpoint", dense_model, "--haystack", text, "--out", out]
    command += ["--lengths", "1K", "--samples", 1, "--tasks", "single_2"]

    def generate(*arguments):
        raise answering.TooSlow("much too slow", 700.0)

    monkeypatch.setattr(answering, "generate_within", generate)
    for more in ([], ["--resume"]):
        assert cli.run([*map(str, command), *more]) == 0
        (row,) = json.loads(out.read_text())["rows"]
        assert (row["status"], row["seconds"], row["note"]) == ("too_slow", 700, "much too slow")
        monkeypatch.setattr(answering, "generate_within", lambda *x: pytest.fail("tried again"))
