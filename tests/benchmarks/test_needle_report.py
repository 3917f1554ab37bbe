"""`sparsex report` of needles: pictures, the table of all systems, and where it goes."""

import numpy as np
import pytest

from sparsex_jax.benchmarks import needle_plots
from sparsex_jax.commands.arguments import format_length
from sparsex_jax.commands.report import needle_rows
from sparsex_jax.tasks import make_row, wilson_interval
from tests.benchmarks.test_report import report, write
from tests.test_cli import fail

__all__ = ["fail"]  # a fixture


def rows_of(system, right, task="single_2"):
    """Rows of 16K and 1M tokens with a total and two depths, `right` of 10 right at each."""
    rows = []
    for tokens in (16384, 1 << 20):
        common = {"tier": "device"}
        scores = [1.0] * right + [0.0] * (10 - right)
        rows.append(make_row(system, task, tokens, scores * 2) | common | {"depth": None})
        for depth in (0.0, 100.0):
            rows.append(make_row(system, task, tokens, scores) | common | {"depth": depth})
    return rows


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "h200"
    slow = make_row(
        "dense", "single_2", 1 << 20, [], "too_slow", seconds=700, note="700 s a sample"
    )
    rows = [*rows_of("dense", 5)[:3], slow | {"tier": "device", "depth": None}]
    forgot = [row | {"tier": "compressed"} for row in rows_of("sparsex", 1)]
    ours = rows_of("sparsex", 4, "vt") + rows_of("sparsex", 9) + forgot
    write(folder / "needle.json", "needle", ours)
    write(folder / "a_needle_dense.json", "needle", rows)
    return tmp_path / "results"


def test_one_table_of_all_systems(results, capsys):
    assert report("--results", results) == 0
    shown = capsys.readouterr().out
    low, high = (f"{100 * x:.1f}" for x in wilson_interval(18, 20))
    for line in (
        "### h200: needles, all systems",
        "| task | system | 16K | 1M |",
        f"| single_2 | sparsex | 90.0 % ({low} to {high}) | 90.0 % ({low} to {high}) |",
        "| single_2 | sparsex (tier compressed) | 10.0 % (2.8 to 30.1) | 10.0 % (2.8 to 30.1) |",
        "| single_2 | dense | 50.0 % (29.9 to 70.1) | too slow [1] |",
        "| vt | sparsex | 40.0 % (21.9 to 61.3) | 40.0 % (21.9 to 61.3) |",
        "[1] 700 s a sample",
        "20 samples a cell; in brackets 95 % intervals of Wilson.",
    ):
        assert f"{line}\n" in shown, line
    places = [shown.index(f"| {x}") for x in ("single_2 | sparsex", "single_2 | dense", "vt | spa")]
    assert places == sorted(places)
    pictures = {path.name for path in (results / "h200" / "plots").iterdir()}
    assert pictures == {
        "needle-accuracy.png", "needle-depth-sparsex.png", "needle-depth-dense.png",
        "needle-depth-sparsex--tier-compressed.png",
    }  # fmt: skip
    assert all(f"plots/{name})" in shown for name in pictures)


def test_curves_have_bands_and_crosses():
    slow = make_row("dense", "single_2", 1 << 20, [], "too_slow") | {"depth": None}
    rows = [row for row in rows_of("sparsex", 9) if row["depth"] is None] + [slow]
    (axes,) = needle_plots.curves(rows, format_length).axes
    ours = axes.lines[0]
    assert ours.get_xdata().tolist() == [16384, 1 << 20] and ours.get_label() == "sparsex"
    np.testing.assert_allclose(ours.get_ydata(), [90, 90])
    band = axes.collections[0].get_paths()[0].vertices
    low, high = (100 * x for x in wilson_interval(18, 20))
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [low, high])
    crosses = axes.lines[3]
    assert (crosses.get_marker(), crosses.get_xdata().tolist()) == ("x", [1 << 20])


def test_heat_maps_show_each_depth():
    rows = [row for row in rows_of("sparsex", 9) if row["depth"] is not None]
    rows[0] = rows[0] | {"accuracy": 0.2}
    (axes,) = needle_plots.heat_maps(rows, format_length).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[20, 90], [90, 90]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0 %", "100 %"]


def test_equal_systems_are_told_apart(tmp_path):
    rows = rows_of("sparsex", 9)[:1]
    files = [
        (tmp_path / "needle.json", {"benchmark": "needle", "rows": rows}),
        (tmp_path / "needle_k4.json", {"benchmark": "needle", "rows": [
            *rows, rows[0] | {"tier": "compressed"}]}),
        (tmp_path / "needle_dense.json", {"benchmark": "needle", "rows": rows_of("dense", 1)[:1]}),
        (tmp_path / "other.json", {"benchmark": "prefill", "rows": rows}),
    ]  # fmt: skip
    assert [row["system"] for row in needle_rows(files)] == [
        "sparsex (needle)", "sparsex (needle_k4)", "sparsex (needle_k4, tier compressed)", "dense",
    ]  # fmt: skip
    same = [(path, x | {"config": {"model_crc32": 7}}) for path, x in files[:2]]
    names = [row["system"] for row in needle_rows(same)]
    assert names == ["sparsex", "sparsex (tier compressed)"]


def test_of_rows_of_the_same_the_one_with_the_most_samples_is_shown(tmp_path):
    few, many = (rows_of("sparsex", right)[0] | {"samples": n} for right, n in ((1, 10), (9, 20)))
    files = [
        (tmp_path / f"{number}.json", {
            "benchmark": "needle", "rows": [row], "config": {"model_crc32": 7}})
        for number, row in enumerate((few, many, few))
    ]  # fmt: skip
    assert needle_rows(files) == [many]


def test_the_readme_gets_the_table(results, tmp_path, fail, capsys):
    readme = tmp_path / "README.md"
    command = ["report", "--results", results, "--readme", readme]
    readme.write_text("no mark\n")
    assert "must have a line <!-- results:needles HARDWARE -->" in fail(*command)
    readme.write_text("<!-- results:needles v5e -->\n<!-- /results -->\n")
    assert "needs a line <!-- /results --> below it, and results of needles in v5e/" in fail(
        *command
    )
    readme.write_text("a\n<!-- results:needles h200 -->\nold\n<!-- /results -->\nb\n")
    for _ in range(2):
        assert report(*command[1:]) == 0
        text = readme.read_text()
        assert text.startswith("a\n<!-- results:needles h200 -->\n| task | system | 16K | 1M |\n")
        assert text.endswith("Wilson.\n<!-- /results -->\nb\n")
        assert "old" not in text and "compressed" not in text
