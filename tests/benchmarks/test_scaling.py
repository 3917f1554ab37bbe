"""Time modelled where chips and tokens grow together."""

import json

import pytest

from sparsex_jax.benchmarks.rooflines import find_chip, link_seconds


@pytest.mark.parametrize("work", ["training", "prefill"])
def test_rows_and_their_table(work, run, project, tmp_path):
    out = tmp_path / "tpu" / "scaling.json"
    arguments = project / "configs" / "nano.py", "--work", work, "--chips", 4, 8
    status, shown = run("bench", "scaling", *arguments, "--tokens", 512, "--out", out)
    assert status == 0 and f"512 sparsex {work}, v5e: 8 chips: arithmetic" in shown.out
    first, second = json.loads(out.read_text())["rows"]
    assert (first["chips"], first["length"], second["length"]) == (4, 2048, 4096)
    # As many tokens on each; only scores see more blocks.
    assert 1 <= second["operations"] / first["operations"] < 1.1
    assert first["arithmetic_seconds"] == first["operations"] / 197e12
    assert second["collective_permute_bytes"] > first["collective_permute_bytes"] > 0
    assert (first["reduce_scatter_bytes"] > 0) == (work == "training")
    status, shown = run("report", "--results", tmp_path)
    assert status == 0 and f"| {work} | 4 | 2K | " in shown.out and "| 100 % | 100 % |" in shown.out


def test_links():
    tpu, gpu = find_chip("TPU v5 lite"), find_chip("NVIDIA H200")
    assert link_seconds("collective-permute", 50 * 10**9, 16, tpu) == 1
    assert link_seconds("all-gather", 50 * 10**9, 16, tpu) == 0.25
    # Across the middle of 4 chips in a row goes what one of them sends; of 16, on two links, twice.
    assert link_seconds("all-to-all", 50 * 10**9, 16, tpu) == 1
    assert link_seconds("all-to-all", 50 * 10**9, 64, tpu) == 2
    assert link_seconds("all-to-all", 50 * 10**9, 128, tpu) == 2  # 8 x 16
    assert link_seconds("all-to-all", 50 * 10**9, 256, tpu) == 2
    assert link_seconds("all-to-all", 450 * 10**9, 8, gpu) == 1
    assert link_seconds("all-to-all", 50 * 10**9, 16, gpu) == 1


def test_refuses(run, project, tmp_path):
    nano, out = project / "configs" / "nano.py", ("--out", tmp_path / "out.json")
    for arguments, message in (
        ((), "the first argument of bench scaling must be a preset"),
        ((nano,), "--out"),
        ((nano, *out, "--chips", 12), "chips=(12,) must be slices of v5e: use 4, 8"),
        ((nano, *out, "--target", "h100", "--chips", 12), "devices=12 must be 1 to 8"),
        ((nano, *out, "--tokens", "1Q"), "tokens='1Q'"),
        ((nano, *out, "--tokens", "1000"), "length=8000 must be mesh.seq=8 times a multiple of"),
        ((nano, *out, "--chips"), "chips must name at least one"),
    ):
        status, shown = run("bench", "scaling", *arguments)
        assert status == 2 and message in shown.err and shown.err.count("\n") == 1
