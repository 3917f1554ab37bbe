import json
import subprocess
import sys

import numpy as np
import pytest

from sparsex_jax import cli
from sparsex_jax.benchmarks import plots
from sparsex_jax.benchmarks.tables import speed
from sparsex_jax.commands.arguments import format_length
from sparsex_jax.tasks import make_row
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture


def row(system, part, tokens, milliseconds, **fields):
    return {
        "system": system, "part": part, "direction": "forward", "tokens": tokens,
        "query_heads": 16, "kv_heads": 2, "head_dim": 128, "milliseconds": milliseconds,
        "status": "measured", **fields,
    }  # fmt: skip


def attention_rows():
    rows = []
    for tokens in (32768, 131072, 1048576):
        dense, ours = (tokens / 32768) ** 2, (tokens / 32768) ** 1.1
        rows.append(row("dense_cudnn", "op", tokens, dense, speedup_over_dense=1))
        for selection in ("random", "correlated"):
            chosen = {"selection": selection, "implementation": "mosaic_gpu, xla"}
            speedup = dense / ours
            fields = {"speedup_over_dense": speedup, "milliseconds_q1": ours, **chosen}
            rows.append(row("sparsex", "op", tokens, ours, milliseconds_q3=2 * ours, **fields))
            rows += [row("sparsex", part, tokens, ours / 6, **chosen) for part in speed.ADDED_PARTS]
        rows.append(row("window_cudnn", "local", tokens, ours / 9))
    rows[0]["note"] = "measured with 1 of 16 query heads"
    rows.append(row("sparsex", "op", 4194304, None, status="out_of_memory"))
    return rows


def write(path, benchmark, rows, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"benchmark": benchmark, "command": "sparsex ...", "rows": rows, **fields}
    path.write_text(json.dumps(results))


def report(*arguments):
    return cli.run(["report", *map(str, arguments)])


def test_losses(tmp_path, capsys):
    rows = [
        {"implementation": name, "step": step, "loss": 3 - step / 10 + (name == "xla") * 1e-3}
        for name in ("mosaic_gpu", "xla")
        for step in range(1, 13)
    ]
    write(tmp_path / "h200" / "losses.json", "losses", rows)
    assert report("--results", tmp_path) == 0
    shown = capsys.readouterr().out
    for line in (
        "| step | mosaic_gpu | xla |",
        "| 1 | 2.9000 | 2.9010 |",
        "| 12 | 1.8000 | 1.8010 |",
    ):
        assert line in shown


def test_tables_and_pictures(tmp_path, capsys):
    write(tmp_path / "h200" / "attention.json", "attention", attention_rows())
    needle = [
        make_row("sparsex", "single_2", 16384, [1.0] * 99 + [0.0]),
        make_row("sparsex", "single_2", 131072, [], status="out_of_memory"),
        make_row("sparsex", "name_to_definition", 16384, [1.0] * 20) | {"provenance": 0.95},
    ]
    write(tmp_path / "cpu" / "needle.json", "needle", needle)
    assert report("--results", tmp_path) == 0
    shown = capsys.readouterr().out
    for line in (
        "| forward | 32K | dense_cudnn | 1 [1] | 1 |  |  |  |  |",
        "| forward | 1M | sparsex (mosaic_gpu, xla, random) | 45.3 (45.3 to 90.5) | 22.6 |"
        "  |  |  |  |",
        "| forward | 4M | sparsex | out of memory |  |  |  |  |  |",
        "[1] measured with 1 of 16 query heads",
        "| task | 16K tokens | 128K tokens |",
        "| single_2 | 99 % (94.6 to 99.8; 100 samples) | out of memory |",
        "| name_to_definition | 100 % (83.9 to 100.0; 20 samples; provenance 95.0 %) |  |",
    ):
        assert f"{line}\n" in shown, line
    head = next(line for line in shown.splitlines() if line.startswith("| length | selection"))
    assert head.count("local: ") == 3 and "local: window_cudnn" in head
    pictures = {path.name for path in (tmp_path / "h200" / "plots").iterdir()}
    assert pictures == {
        "attention-time.png", "attention-speedup.png", "attention-parts-random.png",
        "attention-parts-correlated.png",
    }  # fmt: skip
    for name in pictures:
        path = tmp_path / "h200" / "plots" / name
        assert path.read_bytes().startswith(b"\x89PNG") and f"({path})" in shown
    assert not (tmp_path / "cpu" / "plots").exists()


def test_pictures_elsewhere_and_of_several_shapes(tmp_path, capsys):
    rows = attention_rows()
    other = [{**row("fla_nsa", "op", 32768, 2.0), "kv_heads": 1}]
    write(tmp_path / "results" / "h200" / "attention.json", "attention", rows)
    write(tmp_path / "results" / "h200" / "attention_peers.json", "attention_peers", other)
    write(tmp_path / "results" / "h200" / "decode.json", "decode", attention_rows())
    out = tmp_path / "pictures"
    assert report("--results", tmp_path / "results", "--out", out) == 0
    names = {path.name for path in (out / "h200").iterdir()}
    assert {"attention-time-16-2-128.png", "attention-time-16-1-128.png"} <= names
    assert {"decode-time.png", "decode-speedup.png"} <= names
    assert not (tmp_path / "results" / "h200" / "plots").exists()


def test_exponents_are_those_of_the_longest_lengths():
    points = [(2**i, 5.0 * 2 ** (1.3 * i)) for i in range(10, 15)]
    assert plots.fit_exponent(points) == pytest.approx(1.3)
    figure = plots._lines(attention_rows(), "milliseconds", format_length, "ms", fitted=True)
    (axes,) = figure.axes
    labels = [line.get_label() for line in axes.lines]
    assert labels[0] == "dense_cudnn: N^2.00 (32K to 1M)"
    assert labels[1] == "sparsex (mosaic_gpu, xla, random): N^1.10 (32K to 1M)"


def test_bars_add_up_and_lengths_without_a_part_are_left_out():
    rows = [x for x in attention_rows() if x["status"] == "measured" and x["system"] == "sparsex"]
    rows = [x for x in rows if (x["part"], x["tokens"]) != ("local", 131072)]
    (axes,) = plots._stacks(rows, "random", format_length).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["32K", "1M"]
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(6, 2)
    np.testing.assert_allclose(heights.sum(axis=0), 100)
    assert axes.texts[0].get_text() == "sum 1 ms\nop 1 ms"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold files like"),
        ("{", "is not a results file"),
        ("[1]", "is not a results file"),
        ('{"rows": 3}', "is not a results file"),
        ('{"rows": [3]}', "is not a results file"),
        ('{"rows": []}', "benchmark=None"),
        ('{"benchmark": "attention", "rows": [{"system": "x"}]}', "row 0 lacks part, direction"),
        ('{"benchmark": "needle", "rows": [{"system": "x"}]}', "row 0 lacks task"),
    ],
)
def test_foreign_results(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "h200").mkdir()
        (tmp_path / "h200" / "some.json").write_text(content)
    assert report("--results", tmp_path) == 2
    said = capsys.readouterr().err.splitlines()
    assert any(message in line for line in said)
    assert "must hold files like" in said[-1] and len(said) <= 2


def test_foreign_files_do_not_hide_the_others(tmp_path, capsys):
    write(tmp_path / "h200" / "attention.json", "attention", attention_rows())
    (tmp_path / "h200" / "other.json").write_text("\x00")
    assert report("--results", tmp_path) == 0
    captured = capsys.readouterr()
    assert "other.json" in captured.err and "dense_cudnn" in captured.out


def test_missing_folder(fail, tmp_path):
    assert "nowhere" in fail("report", "--results", tmp_path / "nowhere")


def test_results_of_the_project(project, tmp_path, capsys):
    assert report("--results", project / "results", "--out", tmp_path) == 0
    assert "| single_2 |" in capsys.readouterr().out


def test_peers_that_are_not_installed_are_rows(project, tmp_path):
    out = tmp_path / "results" / "cpu" / "attention_peers.json"
    # Whatever is installed here: the script must run where PyTorch is missing.
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = project / "scripts" / "bench_peers.py"
    command = [sys.executable, "-c", code, script, "--lengths", "1K", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [x["system"] for x in rows] == ["dense_torch", "flex_window", "fla_nsa"] * 2
    assert {x["status"] for x in rows} == {"not_installed"}
    assert report("--results", tmp_path / "results") == 0


def test_plans(tmp_path, capsys):
    fits = {
        "preset": "configs/billion.py", "target": "v5e:2x4", "devices": 8, "tokens": 16384,
        "sequences": 1, "parameters": 10**9, "parameter_bytes": 2**29, "optimizer_bytes": 2**30,
        "temporary_bytes": 2**33, "program_bytes": 2**28, "total_bytes": 39 * 2**28,
        "problem": None, "status": "compiled",
    }  # fmt: skip
    too_large = {**fits, "temporary_bytes": None, "total_bytes": None, "problem": "too large"}
    write(tmp_path / "tpu-v5e" / "plan.json", "plan", [fits, too_large])
    assert report("--results", tmp_path) in (0, None)
    shown = capsys.readouterr().out
    line = "| `configs/billion.py` | training step | 8 chips of v5e:2x4 | 1 x 16K | "
    line += "0.50 | 1.00 | 0.00 | "
    assert f"{line}8.00 | 0.25 | 9.75 | fits |" in shown
    assert f"{line}not known | 0.25 | not known | does not fit |" in shown
    assert "Compiled and not run" in shown


def test_scaling(tmp_path, capsys):
    kinds = ("arithmetic", "links", "all_gather", "all_reduce", "reduce_scatter", "all_to_all")
    common = {"work": "prefill", "tokens": 1024, **dict.fromkeys([f"{x}_seconds" for x in kinds])}
    common |= {"collective_permute_seconds": None, "status": "failed"}
    few = common | {f"{x}_seconds": 0.0 for x in kinds} | {"chips": 16, "length": 16384}
    few |= {"collective_permute_seconds": 1.0, "links_seconds": 1.0, "arithmetic_seconds": 2.0}
    few["status"] = "modelled"
    many = few | {"chips": 32, "length": 32768, "all_to_all_seconds": 4.0, "links_seconds": 4.0}
    failed = common | {"chips": 8, "length": 8192}
    write(tmp_path / "tpu-v5e" / "scaling.json", "scaling", [many, failed, few])
    assert report("--results", tmp_path) in (0, None)
    shown = capsys.readouterr().out
    assert "| prefill | 8 | 8K | failed |" in shown
    assert "| prefill | 16 | 16K | 2 | 1 | arithmetic | 100 % | 100 % |" in shown
    assert "| prefill | 32 | 32K | 2 | 4 | all-to-all | 50 % | 50 % |" in shown


def test_decode_prefill_and_tiers(tmp_path, capsys):
    step = {"speedup_over_dense": None, "implementation": "xla"}
    decode = [
        row("dense_cudnn", "op", 1048576, 0.5, speedup_over_dense=1),
        row("sparsex", "op", 1048576, 0.02, **{**step, "speedup_over_dense": 25}),
        row("sparsex", "selection", 1048576, 0.01, **step),
    ]
    prefill = {
        "tokens": 67108864, "layers": "llls", "chunk": 16384, "tier": "host",
        "milliseconds": 64000.0, "tokens_per_second": 1048576.0, "cache_bytes": 2**30,
        "peak_bytes": None, "status": "measured",
    }  # fmt: skip
    full = {**prefill, "tier": "device", "status": "out_of_memory"}
    needle = [
        make_row("sparsex", "single_2", 16384, [1.0]) | {"tier": "device"},
        make_row("sparsex", "single_2", 16384, [0.0]) | {"tier": "compressed"},
    ]
    write(tmp_path / "h200" / "decode.json", "decode", decode)
    config = {"model_name": "nano (shipped)"}
    write(tmp_path / "h200" / "prefill.json", "prefill", [prefill, full], config=config)
    write(tmp_path / "h200" / "needle.json", "needle", needle)
    assert report("--results", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "one decoding step of one layer" in shown
    assert "| forward | 1M | sparsex (xla) | 0.02 | 25 |" in shown
    assert "| 1M | 0.01 |" in shown
    assert "A context read in chunks by nano (shipped)." in shown
    assert "| 64M | llls | host | 16K | 1,048,576 | 64 | 1.00 | not known |" in shown
    assert "| 64M | llls | device | 16K |  |  |  | out of memory |" in shown
    assert "sparsex, tier compressed: single_2" in shown and "sparsex, tier device" in shown
