"""Trains variants of the needle model, each with something left out, and asks them all the same.

    python scripts/ablate_needles.py --names full no_landmarks --seeds 0 1 --gpus 0 1 2 3 \
        --run-dir runs/ablations --out results/h200/ablations.json

Each run is a shorter configs/needle.py. What is complete is not made again, and the same command
goes on with what was stopped. The results file keeps its rows of runs that are not in RUN_DIR.
With --gpus each of them takes the next run, in a process of its own that writes to
RUN_DIR/NAME-SEED.log.
"""

import argparse
import dataclasses
import itertools
import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

from sparsex_jax.benchmarks.results import check_writable, read_results, write_results
from sparsex_jax.commands import eval_needle
from sparsex_jax.commands.arguments import parse_length, parse_lengths
from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import ConfigError, StageConfig, TrainConfig
from sparsex_jax.training import train
from sparsex_jax.training.checkpoints import to_json

PRESET = Path(__file__).parents[1] / "configs" / "needle.py"
TASKS = ("single_1", "single_3", "multikey_2", "multikey_3", "multiquery", "multivalue", "vt")


def attention(config: TrainConfig, **fields) -> TrainConfig:
    """The config with other fields of its attention."""
    changed = dataclasses.replace(config.model.attention, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=changed))


def model(config: TrainConfig, **fields) -> TrainConfig:
    """The config with other fields of its model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def staged(config: TrainConfig, change: Callable[[StageConfig], StageConfig]) -> TrainConfig:
    """The config with other stages."""
    return dataclasses.replace(config, stages=tuple(map(change, config.stages)))


def selecting(config: TrainConfig, change: Callable[[int], int]) -> TrainConfig:
    """The config with other numbers of selected blocks, in all stages and when asked."""
    config = staged(config, lambda x: dataclasses.replace(x, top_k=change(x.top_k)))
    return attention(config, top_k=change(config.model.attention.top_k))


def blocks(config: TrainConfig, size: int) -> TrainConfig:
    """The config with blocks of another size, as many tokens of them selected, up to 64 blocks."""
    scale = config.model.attention.block_size / size
    return attention(selecting(config, lambda k: min(64, int(k * scale))), block_size=size)


def fewer_questions(config: TrainConfig) -> TrainConfig:
    """The config with a third of the questions about long texts."""
    return staged(
        config,
        lambda x: dataclasses.replace(x, questions=x.questions // (3 if x.length > 4096 else 1)),
    )


def no_values(config: TrainConfig) -> TrainConfig:
    """The config without the texts in which every key has several values."""
    return staged(
        config,
        lambda x: dataclasses.replace(x, mix=tuple(each for each in x.mix if each[0] != "values")),
    )


VARIANTS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "full": lambda config: config,
    "no_landmarks": lambda config: attention(config, landmarks="off"),
    "no_dynamic": lambda config: model(selecting(config, lambda _: 0), selection_loss=0.0),
    "window_32": lambda config: attention(config, window=config.model.attention.block_size),
    "no_selection_loss": lambda config: model(config, selection_loss=0.0),
    "softmax": lambda config: attention(config, landmarks="off", fusion="softmax"),
    "k_4": lambda config: selecting(config, lambda k: min(k, 4)),
    "k_16": lambda config: selecting(config, lambda k: min(k, 16)),
    "k_64": lambda config: selecting(config, lambda _: 64),
    "blocks_64": lambda config: blocks(config, 64),
    "blocks_128": lambda config: blocks(config, 128),
    "sparse_last": lambda config: model(config, layers="llls"),
    "score_dim_64": lambda config: attention(config, score_dim=64),
    "head_dim_64": lambda config: model(config, head_dim=64),
    "fewer_questions": fewer_questions,
    "no_values": no_values,
}


def variant(name: str, seed: int, share: float, path: Path = PRESET) -> TrainConfig:
    """The config of a run, with a share of the preset's steps in its last two stages."""
    preset = load_preset(path)
    last = tuple(dataclasses.replace(x, steps=int(x.steps * share)) for x in preset.stages[-2:])
    return VARIANTS[name](
        dataclasses.replace(preset, stages=(*preset.stages[:-2], *last), seed=seed)
    )


def collect(run_dir: Path) -> list[dict]:
    """Rows of all runs of a folder that were evaluated, and the commits that made them."""
    rows = []
    for path in sorted(run_dir.glob("*/needle.json")):
        name, _, seed = path.parent.name.rpartition("-")
        results = read_results(path)
        common = {"ablation": name, "seed": int(seed), "commit": results["commit"]}
        rows += [common | row for row in results["rows"]]
    return rows


def earlier(arguments: argparse.Namespace, config: dict) -> list[dict]:
    """The rows that the results file has.

    Raises:
      ConfigError: they are of runs with another config.
    """
    if not arguments.out.exists():
        return []
    results = read_results(arguments.out)
    if results["config"] != config:
        raise ConfigError(
            f"{arguments.out} has ablations of another config (another --share or preset): use"
            " another --out"
        )
    return results["rows"]


def run(arguments: argparse.Namespace, name: str, seed: int) -> None:
    """Trains a variant and asks it, as far as that was not done before."""
    folder = arguments.run_dir / f"{name}-{seed}"
    result = train(variant(name, seed, arguments.share, arguments.preset), folder)
    if result.status != "finished":
        sys.exit(result.message)
    if not (folder / "needle.json").exists():
        asked = eval_needle.Arguments(
            checkpoint=folder / "model", tasks=tuple(arguments.tasks),
            lengths=tuple(arguments.lengths), samples=arguments.samples, chunk=arguments.chunk,
            diagnose=True, resume=True, out=folder / "partial" / "needle.json",
        )  # fmt: skip
        eval_needle.needle(asked, shlex.join(sys.argv))
        (folder / "partial" / "needle.json").rename(folder / "needle.json")


def write(arguments: argparse.Namespace) -> None:
    """Writes what all runs of the folder answered so far."""
    config = full_config(arguments)
    rows = collect(arguments.run_dir)
    made = {(row["ablation"], row["seed"]) for row in rows}
    rows += [x for x in earlier(arguments, config) if (x["ablation"], x["seed"]) not in made]
    if rows:
        rows.sort(key=lambda row: (row["ablation"], row["seed"]))
        write_results(arguments.out, "ablations", shlex.join(sys.argv), config, rows)


def full_config(arguments: argparse.Namespace) -> dict:
    """The config that all runs are variants of, whatever their seed."""
    return to_json(variant("full", 0, arguments.share, arguments.preset))


def run_on(gpus: list[int], run_dir: Path, runs: list[tuple[str, int]]) -> list[str]:
    """Runs this script once for each run, on the next GPU that is free.

    A signal to stop is passed on to the runs, once, and no other begins.

    Returns:
      The names of those that are not complete.
    """
    free: queue.Queue[int] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)
    started: list[subprocess.Popen] = []

    def start(name: str, seed: int) -> int:
        # The last of an option that is given twice counts.
        command = [sys.executable, *sys.argv, "--names", name, "--seeds", str(seed), "--gpus"]
        gpu = free.get()
        # On the wrong number JAX would take the CPU.
        chosen = {"CUDA_VISIBLE_DEVICES": str(gpu), "JAX_PLATFORMS": "cuda"}
        try:
            with open(run_dir / f"{name}-{seed}.log", "a") as log:
                process = subprocess.Popen(
                    command, env=os.environ | chosen, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                started.append(process)
                return process.wait()
        finally:
            free.put(gpu)

    run_dir.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ThreadPoolExecutor(len(gpus)) as pool:
        statuses = [pool.submit(start, *each) for each in runs]
        try:
            failed = [bool(status.result()) for status in statuses]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise
    return [f"{name}-{seed}" for (name, seed), bad in zip(runs, failed, strict=True) if bad]


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--gpus", nargs="*", type=int, default=[], help="as CUDA counts them")
    parser.add_argument("--preset", type=Path, default=PRESET)
    parser.add_argument("--share", type=float, default=0.5, help="of the long stages' steps")
    parser.add_argument("--tasks", nargs="+", choices=get_args(eval_needle.Task), default=TASKS)
    parser.add_argument("--lengths", nargs="+", default=["128K"])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--chunk", default="16K", help="tokens that are read at a time")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON)")
    arguments = parser.parse_args()
    runs = [(name, seed) for seed, name in itertools.product(arguments.seeds, arguments.names)]
    try:
        check_writable(arguments.out)
        parse_lengths(arguments.lengths)
        parse_length(arguments.chunk, "chunk")
        if arguments.run_dir.exists() and not arguments.run_dir.is_dir():
            raise ConfigError(f"run_dir='{arguments.run_dir}' must be a folder: use another")
        if arguments.samples < 1:
            raise ConfigError(f"samples={arguments.samples} must be positive: use 100, say")
        for each in runs:
            variant(*each, arguments.share, arguments.preset)
        earlier(arguments, full_config(arguments))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not arguments.gpus:
        for each in runs:
            run(arguments, *each)
            write(arguments)
        return
    failed = run_on(arguments.gpus, arguments.run_dir, runs)
    write(arguments)
    if failed:
        where = arguments.run_dir
        sys.exit(f"not complete: {', '.join(failed)}: their logs in {where} say why")


if __name__ == "__main__":
    main()
