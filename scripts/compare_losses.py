"""Trains the same short run with several implementations of the kernels, and compares the losses.

    python scripts/compare_losses.py --out results/h200/losses.json

The model is configs/nano.py's, at 4K tokens with 16 blocks of 64 selected; seed and data are the
same. On one H200: two minutes for 500 steps of both.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path

import jax

from sparsex_jax.benchmarks.results import check_writable, write_results
from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig
from sparsex_jax.training import train
from sparsex_jax.training.checkpoints import to_json

PRESET = Path(__file__).parents[1] / "configs" / "nano.py"


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["mosaic_gpu", "xla"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON)")
    arguments = parser.parse_args()
    check_writable(arguments.out)
    preset = load_preset(PRESET)
    stage = StageConfig(
        steps=arguments.steps, length=arguments.length, batch_size=8, top_k=16, needles=(1, 8),
        mix=preset.stages[0].mix,
    )  # fmt: skip
    every = max(1, arguments.steps // 50)
    config = dataclasses.replace(preset, stages=(stage,), log_every=every)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.implementations:
            jax.clear_caches()
            run = Path(folder) / name
            train(dataclasses.replace(config, implementation=name), run)
            for line in (run / "metrics.jsonl").read_text().splitlines():
                found = json.loads(line)
                kept = {key: found[key] for key in ("step", "tokens", "loss", "gradient_norm")}
                rows.append({"implementation": name, "status": "measured", **kept})
    write_results(arguments.out, "losses", shlex.join(sys.argv), to_json(config), rows)


if __name__ == "__main__":
    main()
