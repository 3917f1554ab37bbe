"""Variants of the needle model, and the table of what they answer."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sparsex_jax.benchmarks.results import write_results
from sparsex_jax.benchmarks.tables.quality import ablations_table
from sparsex_jax.commands.arguments import format_length

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


FAKE = """
import os, pathlib, sys, time
_, folder, *rest = sys.argv
name, gpu = rest[-3], os.environ["CUDA_VISIBLE_DEVICES"]
print(*rest)
pathlib.Path(folder, f"{name} on {gpu}").touch()
time.sleep(1)
sys.exit(name == "k_4")
"""


def test_each_gpu_takes_the_next_run(tmp_path, monkeypatch):
    fake, folder = tmp_path / "fake.py", tmp_path / "runs"
    fake.write_text(FAKE)
    names = ["--names", "full", "k_4", "k_16"]
    monkeypatch.setattr(sys, "argv", [str(fake), str(folder), *names, "--gpus", "3", "5", "--a"])
    runs = [("full", 0), ("k_4", 0), ("k_16", 1)]
    with pytest.raises(SystemExit, match="not complete: k_4-0: their logs in .*runs say why"):
        script.run_on(["3", "5"], folder, runs)
    log = (folder / "k_16-1.log").read_text().strip()
    assert log == "--names full k_4 k_16 --a --names k_16 --seeds 1"
    done = [path.name.split(" on ") for path in folder.glob("* on *")]
    assert {name for name, _ in done} == {"full", "k_4", "k_16"}
    assert {gpu for _, gpu in done} == {"3", "5"}
