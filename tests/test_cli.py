import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from sparsex_jax import cli
from sparsex_jax.commands import eval_needle
from sparsex_jax.commands.arguments import format_length, parse_length
from sparsex_jax.config import AttentionConfig, ModelConfig
from sparsex_jax.demo import Finding, draw_heat_map
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import TASKS, load
from sparsex_jax.training import save_model

PRESET = """
from sparsex_jax.config import AttentionConfig, ModelConfig, StageConfig, TrainConfig
config = TrainConfig(
    model=ModelConfig(
        model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, layers="s",
        attention=AttentionConfig(window=64, top_k=2, score_dim=8),
    ),
    stages=(StageConfig(steps=2, length=256, batch_size=2),),
)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that knows nothing."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = ModelConfig(
        vocab_size=4096, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
        layers="s", attention=AttentionConfig(window=64, top_k=2, score_dim=8),
    )  # fmt: skip
    save_model(path, Transformer(config, rngs=nnx.Rngs(0)), config, load().fingerprint)
    return path


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "file.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return folder


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.py"
    path.write_text(PRESET)
    return path


@pytest.fixture
def fail(capsys):
    """Runs a command that must fail with one line, and returns that line."""

    def fail(*arguments):
        assert cli.run([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("sparsex: ")
        assert message.count("\n") == 1 and message.endswith("\n")
        return message

    return fail


def test_lengths():
    for text, tokens in (("1", 1), ("16K", 16384), ("1m", 1 << 20), ("1000", 1000)):
        assert parse_length(text) == tokens
        assert parse_length(format_length(tokens)) == tokens
    for text in ("", "0", "-1", "1.5K", "K", "16KB", "1e6"):
        with pytest.raises(ValueError, match="must be a number of tokens"):
            parse_length(text)


def test_evaluation_knows_every_task():
    assert set(eval_needle.Task.__args__) == set(TASKS)


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["train"], ["plan"], ["eval"], ["eval", "needle"], ["ingest"], ["ask"]],
)
def test_help(command, capsys):
    try:
        status = cli.run([*command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert not status
    assert "usage: sparsex" in capsys.readouterr().out


def test_help_names_every_command_and_needs_no_jax():
    code = (
        "import sys; from sparsex_jax.cli import run; run(['--help']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)


def test_help_of_a_preset_shows_its_values(preset, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["train", str(preset), "--help"])
    assert not stop.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--model.num-kv-heads INT heads of keys and values" in shown and "(default: 1)" in shown
    assert "--seed INT decides the initial parameters and the data; from 0 to 2^32 - 1" in shown
    assert "--optimizer.warmup-steps INT optimizer steps of linear warm-up" in shown
    assert "SIGTERM, Ctrl-C and --max-minutes" in shown and "exit with status 0" in shown


def test_info(capsys):
    assert cli.run(["info"]) == 0
    shown = capsys.readouterr().out
    assert "jax" in shown
    assert "range_attention: xla" in shown


def test_demo(model, text, tmp_path, capsys):
    out = tmp_path / "made" / "out"
    command = ["demo", "--length", "1K", "2048", "--haystack", text, "--checkpoint", model]
    assert cli.run([*map(str, command), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 20
    assert [row[0].strip() for row in rows] == ["1K"] * 10 + ["2K"] * 10
    assert rows[0][1].strip() == "0 %" and rows[9][1].strip() == "100 %"
    assert all(row[2].strip() and row[4].strip() == "no" for row in rows)
    assert f"1 files in {text}" in shown
    assert (out / "needles.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "demo.json").read_text())
    assert written["config"]["model"]["dtype"] == "float32"  # the CPU's, whatever the checkpoint's
    assert written["command"].startswith("sparsex demo --length 1K")
    assert [row["tokens"] for row in written["rows"]] == [1024] * 10 + [2048] * 10
    assert {"depth", "expected", "answered", "correct", "seconds"} < set(written["rows"][0])


def test_heat_map_of_one_cell(tmp_path):
    path = tmp_path / "map.png"
    draw_heat_map([Finding(16, 50, "1", "It is 1.", 0.1)], path)
    assert path.stat().st_size > 1000


def test_finding_is_correct_if_the_value_is_in_the_answer():
    assert Finding(16, 50, "12ab", "is 12AB.", 0.1).correct
    assert not Finding(16, 50, "12ab", "is 12a.", 0.1).correct


def test_eval_needle_writes_results(model, text, tmp_path, capsys):
    out = tmp_path / "made" / "needle.json"
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    command += ["--tasks", "single_2", "vt", "--lengths", "1K", "--samples", 3, "--batch-size", 2]
    assert cli.run([str(word) for word in command]) == 0
    results = json.loads(out.read_text())
    assert list(results) == [
        "benchmark", "command", "config", "commit", "date", "hardware", "versions", "rows",
    ]  # fmt: skip
    assert set(results["hardware"]) == {"kind", "count", "driver"}
    assert [(row["task"], row["tokens"]) for row in results["rows"]] == [
        ("single_2", 1024), ("vt", 1024),
    ]  # fmt: skip
    for row in results["rows"]:
        assert row["samples"] == 3 and row["correct"] == 0
        np.testing.assert_allclose(row["high"], 0.5615, atol=1e-4)  # Wilson: z^2 / (n + z^2)
    shown = capsys.readouterr().out
    assert str(out) in shown.replace("\n", "")
    assert "0.0% to 56.1%" in shown
    assert results["command"].startswith("sparsex eval needle --checkpoint")
    assert {path.name for path in out.parent.iterdir()} == {out.name, "needle.answers.jsonl"}


def test_unknown_command(fail):
    assert "'tarin' is not known: use demo, train" in fail("tarin")


def test_eval_of_nothing(fail):
    assert "use needle" in fail("eval")
    assert "'needel'" in fail("eval", "needel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--length", "16Q"], "length='16Q' must be a number of tokens"),
        (["demo", "--length"], "at least one"),
        (["demo", "--lenth", "16K"], "Unrecognized options: --lenth"),
        (["demo", "--checkpoint", "nowhere"], "nowhere does not exist"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", "-1"], "seed=-1 must lie in [0, 2^32)"),
        (["eval", "needle", "--seed", "-1"], "seed=-1 must lie in [0, 2^32)"),
        (["eval", "needle", "--tasks", "single_9"], "single_9"),
        (["eval", "needle", "--tasks"], "at least one"),
        (["eval", "needle", "--samples", "0"], "samples=0 must be positive"),
        (["eval", "needle", "--batch-size", "0"], "batch_size=0 must be positive"),
        (["eval", "needle", "--batch-size", "some"], "--batch-size"),
        (["info", "more"], "more"),
        (["train"], "must be a preset"),
        (["train", "nowhere.py"], "nowhere.py is not a file"),
    ],
)
def test_wrong_arguments(arguments, message, fail):
    assert message in fail(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.attention.window", "500"], "block_size=64: use 448 or 512"),
        (["--model.attention.widow", "512"], "Unrecognized options: --model.attention.widow"),
        (["--model.attention.fusion", "product"], "'sum', 'softmax'"),
        (["--seed", "-1"], "seed=-1 must lie in [0, 2^32)"),
        (["--optimizer.beta1", "1.0"], "beta1=1.0 must lie in [0, 1)"),
        (["--optimizer.learning-rate", "0.0"], "must be positive: use a number above 0"),
        (["--max-minutes", "-1"], "max_minutes=-1.0 must not be negative"),
        (["junk"], "Unrecognized options: junk"),
    ],
)
def test_wrong_override(preset, arguments, message, fail):
    assert message in fail("train", preset, *arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("config = 3", "must define `config = TrainConfig(...)`"),
        ("config = ", "does not run: SyntaxError"),
        ("import no_such_module", "does not run: ModuleNotFoundError"),
        (PRESET.replace("steps=2", "stesp=2"), "unexpected keyword argument 'stesp'"),
        (PRESET.replace("window=64", "window=65"), "window=65 must be a multiple"),
    ],
)
def test_wrong_preset(source, message, preset, fail):
    preset.write_text(source)
    assert message in fail("train", preset)


def test_wrong_haystack(model, tmp_path, fail):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    command = ["demo", "--checkpoint", model, "--out", tmp_path / "out", "--haystack"]
    assert f"haystack='{missing}' must be a folder that can be read" in fail(*command, missing)
    assert "must hold text files" in fail(*command, empty)


def test_length_that_cannot_hold_the_needles(model, text, tmp_path, fail):
    out = tmp_path / "out"
    command = ["--checkpoint", model, "--haystack", text, "--out", out]
    assert "use at least" in fail("demo", *command, "--length", "100")
    assert "use at least" in fail("eval", "needle", *command, "--lengths", "50")
    assert not list(out.iterdir())


def test_out_that_is_a_file(model, text, tmp_path, fail):
    out = tmp_path / "out"
    out.write_text("")
    fail("demo", "--checkpoint", model, "--haystack", text, "--out", out)


def test_no_shipped_model(fail, monkeypatch, tmp_path):
    from sparsex_jax.commands import demo, model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "SHIPPED_MODEL", tmp_path / "needle")
    command = demo.Arguments(checkpoint=tmp_path / "needle")
    monkeypatch.setattr(demo, "parse", lambda *arguments: command)
    assert "comes without its model: give --checkpoint DIR" in fail("demo")
    assert not list(tmp_path.iterdir())


def test_compute_dtype_is_the_callers(model):
    from sparsex_jax.training import load_model

    for dtype in ("bfloat16", "float32"):
        config, loaded = load_model(model, dtype, compute_dtype=dtype)
        assert config.dtype == dtype == loaded(np.zeros((1, 4), np.int32)).dtype


def test_results_name_the_weights(tmp_path):
    from sparsex_jax.benchmarks.results import write_results

    config = {"seed": 0}
    write_results(tmp_path / "with.json", "needle", "sparsex", config, [], model_crc32=7)
    assert json.loads((tmp_path / "with.json").read_text())["config"] == {
        "seed": 0, "model_crc32": 7,
    }  # fmt: skip
    write_results(tmp_path / "without.json", "needle", "sparsex", config, [])
    assert json.loads((tmp_path / "without.json").read_text())["config"] == config == {"seed": 0}


def test_no_space_for_results(model, text, tmp_path, fail, monkeypatch):
    from sparsex_jax.benchmarks import results

    real = results.Path.write_text

    def full(self, text):
        if self.suffix == ".jsonl":
            return real(self, text)
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    out = tmp_path / "needle.json"
    out.write_text("before")
    monkeypatch.setattr(results.Path, "write_text", full)
    command = ["eval", "needle", "--checkpoint", model, "--haystack", text, "--out", out]
    assert "No space left on device" in fail(*command, "--lengths", "1K", "--samples", 1)
    assert out.read_text() == "before"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"needle.json", "needle.answers.jsonl", "text"}


def test_out_of_memory_is_one_line(monkeypatch, fail):
    from sparsex_jax.commands import info

    def overflow(arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand much more")

    monkeypatch.setattr(info, "main", overflow)
    assert "the device's memory is full: use a smaller" in fail("info")


def test_results_outside_git_have_no_commit(monkeypatch):
    from sparsex_jax.benchmarks import results

    monkeypatch.delenv("SPARSEX_COMMIT", raising=False)
    monkeypatch.setattr(results, "_output", lambda *command: None)
    assert results.commit() == "unknown"
    monkeypatch.setenv("SPARSEX_COMMIT", "0123abc")
    assert results.commit() == "0123abc"
    assert str(results.default_path("needle")) == "results/cpu/needle.json"


def test_module_runs_without_the_console_script():
    command = [sys.executable, "-m", "sparsex_jax.cli", "train", "nowhere.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "sparsex: preset nowhere.py is not a file: use one of configs/, say\n"


@pytest.mark.parametrize(
    "program",
    [
        "cli.usage = lambda: 'much'",
        "info.main = lambda _: print('at once', flush=True)",
        "info.main = lambda _: make_console().print('by rich')",
    ],
)
def test_output_that_nobody_reads_is_no_error(program):
    program = (
        "import sys; from sparsex_jax import cli; from sparsex_jax.commands import info;"
        f"from sparsex_jax.commands.arguments import make_console; {program};"
        f"sys.argv[1:] = ['{'--help' if 'usage' in program else 'info'}']; cli.main()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_errors_of_others_and_debug_keep_their_traceback(monkeypatch):
    from sparsex_jax.commands import info

    monkeypatch.setattr(info, "main", lambda arguments: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.run(["info"])
    monkeypatch.setenv("SPARSEX_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.run(["train", "nowhere.py"])


def test_interruption(monkeypatch, capsys):
    from sparsex_jax.commands import info

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupt)
    assert cli.run(["info"]) == 130
    assert capsys.readouterr().err == "sparsex: interrupted\n"
