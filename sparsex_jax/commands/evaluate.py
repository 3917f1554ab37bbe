"""`sparsex eval`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Literal

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    format_length,
    make_console,
    parse,
    parse_lengths,
)
from sparsex_jax.config import ConfigError

Task = Literal[
    "single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue",
    "multiquery", "vt",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NeedleArguments:
    """Scores a model on RULER's needle tasks by free greedy generation.

    Attributes:
      checkpoint: directory of a model; by default the one that comes with sparsex.
      tasks: which ones.
      lengths: tokens of a prompt with its answer; 4096, 16K and 1M are understood.
      samples: questions for each task and length.
      batch_size: questions answered at the same time.
      haystack: folder of text files; by default the sources of Python's standard library that the
        model was not trained on.
      seed: decides the questions.
      out: results file (JSON); by default results/HARDWARE/needle.json.
    """

    checkpoint: Path = SHIPPED_MODEL
    tasks: tuple[Task, ...] = ("single_2", "single_3")
    lengths: tuple[str, ...] = ("16K", "128K")
    samples: int = 100
    batch_size: int = 1
    haystack: Path | None = None
    seed: int = 0
    out: Path | None = None


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: sparsex eval needle [arguments]\n\n`sparsex eval needle --help` tells more.")
    elif arguments[:1] == ["needle"]:
        needle(parse(NeedleArguments, "eval needle", arguments[1:]))
    else:
        given = f"{arguments[0]!r}" if arguments else "nothing"
        raise ConfigError(f"eval must be followed by what to evaluate, not {given}: use needle")


def needle(arguments: NeedleArguments) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.results import default_path, write_results
    from sparsex_jax.cache import Engine
    from sparsex_jax.commands.model import load, name_of, read_haystack
    from sparsex_jax.tasks import evaluate
    from sparsex_jax.tasks.needle import check_length
    from sparsex_jax.training.checkpoints import to_json

    lengths = parse_lengths(arguments.lengths)
    if not arguments.tasks:
        raise ConfigError("tasks must name at least one: use single_2, say")
    model, tokenizer, description = load(arguments.checkpoint)
    for task in arguments.tasks:  # before an hour of work on the others
        for length in lengths:
            check_length(task, length, tokenizer)
    console = make_console()
    console.print(f"model: {description}", markup=False, soft_wrap=True)
    haystack, description = read_haystack(arguments.haystack, tokenizer)
    console.print(f"haystack: {description}", markup=False, soft_wrap=True)
    path = arguments.out or default_path("needle")
    config = {
        "checkpoint": name_of(arguments.checkpoint),
        "model": to_json(model.config),
        "haystack": description,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
    }
    rows: list[dict[str, object]] = []
    for length in lengths:
        engine = Engine(model, capacity=length, batch_size=arguments.batch_size)

        def generate(prompts, max_new_tokens, engine=engine):
            return engine.generate(prompts, max_new_tokens, tokenizer.stop_ids)

        for task in arguments.tasks:
            with console.status(f"{task}, {format_length(length)}") as status:
                done: list[float] = []

                def show(answer, task=task, length=length, status=status, done=done):
                    done.append(answer.score)
                    status.update(
                        f"{task}, {format_length(length)}: {sum(done):g} of {len(done)} right,"
                        f" {arguments.samples - len(done)} to go"
                    )

                row = evaluate(
                    generate, task, length, arguments.samples, tokenizer=tokenizer,
                    haystack=haystack, batch_size=arguments.batch_size, seed=arguments.seed,
                    on_answer=show,
                ).row  # fmt: skip
            rows.append(row)
            write_results(path, "needle", f"sparsex {shlex.join(sys.argv[1:])}", config, rows)
            console.print(
                f"{task} at {format_length(length)}: {row['accuracy']:.1%}"
                f" ({row['low']:.1%} to {row['high']:.1%}), {row['samples']} samples"
            )
    console.print(f"results: {path}", markup=False, soft_wrap=True)
