"""Variants of the needle model, and the table of what they answer."""

import argparse
import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sparsex_jax.benchmarks.results import read_results, write_results
from sparsex_jax.benchmarks.tables.quality import ablations_table
from sparsex_jax.commands.arguments import format_length
from sparsex_jax.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablate_needles.py"
spec = importlib.util.spec_from_file_location("ablate_needles", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_each_variant_changes_what_its_name_says():
    configs = {name: script.variant(name, 1, 0.5) for name in script.VARIANTS}
    full = configs.pop("full")
    assert all(config != full and config.seed == 1 for config in configs.values())
    preset = script.load_preset(script.PRESET)
    assert [x.steps for x in full.stages[-2:]] == [x.steps // 2 for x in preset.stages[-2:]]
    for name, k, size in (("k_4", 4, 32), ("blocks_64", 32, 64), ("blocks_128", 16, 128)):
        attention = configs[name].model.attention
        assert (attention.top_k, attention.block_size) == (k, size)
    assert {x.top_k for x in configs["no_dynamic"].stages} == {0}
    assert max(x.top_k for x in configs["k_4"].stages) == 4


def test_table_has_means_over_seeds(tmp_path):
    def write(name, *accuracies):
        row = {"task": "vt", "tokens": 131072, "accuracy": None}
        rows = [row | {"accuracy": x} for x in accuracies]
        write_results(tmp_path / name / "needle.json", "needle", "", {}, rows)

    write("full-0", 0.5)
    write("full-1", 0.75)
    write("no_landmarks-0", None)
    (tmp_path / "k_4-0").mkdir()  # still being trained
    rows = script.collect(tmp_path)
    assert [(row["ablation"], row["seed"]) for row in rows] == [
        ("full", 0), ("full", 1), ("no_landmarks", 0),
    ]  # fmt: skip
    table = ablations_table(rows, format_length).splitlines()
    assert table[0] == "| ablation | vt |"
    assert table[2:] == ["| full | 62.5 (50.0 to 75.0) |", "| no_landmarks |  |"]


def test_rows_of_other_runs_are_kept(tmp_path):
    def write(name, accuracy, share=0.5):
        folder = tmp_path / name
        row = {"task": "vt", "tokens": 131072, "accuracy": accuracy}
        write_results(folder / name / "needle.json", "needle", "", {}, [row])
        script.write(
            argparse.Namespace(
                run_dir=folder, out=tmp_path / "a.json", share=share, preset=script.PRESET
            )
        )
        rows = read_results(tmp_path / "a.json")["rows"]
        assert all(row["commit"] for row in rows)
        return [(row["ablation"], row["seed"], row["accuracy"]) for row in rows]

    assert write("k_4-0", 0.25) == [("k_4", 0, 0.25)]
    assert write("full-1", 0.5) == [("full", 1, 0.5), ("k_4", 0, 0.25)]
    assert write("k_4-0", 0.75) == [("full", 1, 0.5), ("k_4", 0, 0.75)]
    with pytest.raises(ConfigError, match="another config"):
        write("k_16-0", 1.0, share=0.25)


FAKE = """
import os, pathlib, sys, time
_, folder, *rest = sys.argv
name, gpu = rest[-4], os.environ["CUDA_VISIBLE_DEVICES"]
print(*rest)
pathlib.Path(folder, f"{name} on {gpu}").touch()
time.sleep(60 if "--slow" in rest else 1)
sys.exit(name == "k_4")
"""
RUNS = [("full", 0), ("k_4", 0), ("k_16", 1)]


@pytest.fixture
def run_on(tmp_path, monkeypatch):
    """Runs a script in the place of the real one on GPUs 3 and 5; the folder, and what it says."""
    fake, folder = tmp_path / "fake.py", tmp_path / "runs"
    fake.write_text(FAKE)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run_on(*more):
        given = ["--names", "full", "k_4", "k_16", "--gpus", "3", "5", *more]
        monkeypatch.setattr(sys, "argv", [str(fake), str(folder), *given])
        return script.run_on([3, 5], folder, RUNS)

    yield folder, run_on
    for each in handlers.items():
        signal.signal(*each)


def test_each_gpu_takes_the_next_run(run_on):
    folder, run_on = run_on
    assert run_on() == ["k_4-0"]
    log = (folder / "k_16-1.log").read_text().strip()
    assert log == "--names full k_4 k_16 --gpus 3 5 --names k_16 --seeds 1 --gpus"
    done = [path.name.split(" on ") for path in folder.glob("* on *")]
    assert {name for name, _ in done} == {"full", "k_4", "k_16"}
    assert {gpu for _, gpu in done} == {"3", "5"}


def test_a_signal_ends_the_runs_and_no_other_begins(run_on):
    folder, run_on = run_on

    def stop():
        while len(list(folder.glob("* on *"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        run_on("--slow")
    assert stopped.value.code == 143 and time.monotonic() - began < 30
    assert {path.name.split(" on ")[0] for path in folder.glob("* on *")} == {"full", "k_4"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--names", "k_5"), "invalid choice: 'k_5'"),
        (("--seeds", "x"), "invalid int value: 'x'"),
        (("--gpus", "x"), "invalid int value: 'x'"),
        (("--preset", "nowhere.py"), "preset nowhere.py is not a file"),
        (("--share", "0"), "steps=0"),
        (("--tasks", "single_9"), "invalid choice: 'single_9'"),
        (("--lengths", "1X"), "1X"),
        (("--samples", "0"), "samples=0 must be positive"),
        (("--chunk", "x"), "chunk='x'"),
        (("--run-dir", str(SCRIPT)), "must be a folder: use another"),
        (("--out", str(SCRIPT / "a.json")), "use a file"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments, problem, tmp_path, monkeypatch, capsys):
    command = ["ablate_needles.py", "--run-dir", str(tmp_path), "--out", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and problem in capsys.readouterr().err
