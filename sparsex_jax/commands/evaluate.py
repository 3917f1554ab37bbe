"""`sparsex eval`."""

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich.table

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    format_length,
    make_console,
    make_progress,
    parse,
    parse_lengths,
)
from sparsex_jax.config import ConfigError
from sparsex_jax.errors import first_line, is_memory_full

if TYPE_CHECKING:
    from sparsex_jax.cache import Engine, Tier
    from sparsex_jax.modules import Transformer

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
      tiers: where the cache keeps keys and values of old blocks: device and host are exact,
        compressed forgets; each gets rows of its own.
      batch_size: questions answered at the same time; auto fits them to the device. In the tier
        host it is 1.
      max_seconds: a sample that would take longer makes its row "too_slow".
      haystack: folder of text files; by default the held-out split of the sources of Python's
        standard library.
      diagnose: finds out why answers are wrong: the block was not selected, it was selected but not
        attended to, or it was attended to but not copied; reads the text of each again.
      seed: decides the questions.
      out: results file (JSON); by default results/HARDWARE/needle.json (cpu, h200, ...).
    """

    checkpoint: Path = SHIPPED_MODEL
    tasks: tuple[Task, ...] = ("single_2", "single_3")
    lengths: tuple[str, ...] = ("16K", "128K")
    samples: int = 100
    tiers: tuple[Literal["device", "host", "compressed"], ...] = ("device",)
    batch_size: int | Literal["auto"] = "auto"
    max_seconds: float = 600.0
    haystack: Path | None = None
    diagnose: bool = False
    seed: int = 0
    out: Path | None = None


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: sparsex eval needle [arguments]\n\n`sparsex eval needle --help` tells more.")
    elif arguments[:1] == ["needle"]:
        command = shlex.join(["sparsex", "eval", *arguments])
        needle(parse(NeedleArguments, "eval needle", arguments[1:]), command)
    else:
        given = f"{arguments[0]!r}" if arguments else "nothing"
        raise ConfigError(f"eval must be followed by what to evaluate, not {given}: use needle")


def needle(arguments: NeedleArguments, command: str) -> None:
    """Runs the command, which is quoted in what it writes."""
    from sparsex_jax.benchmarks.results import check_writable, default_path, write_results
    from sparsex_jax.cache.tiers import why_not_in
    from sparsex_jax.commands.model import describe_run, load, read_haystack
    from sparsex_jax.tasks import load as load_tokenizer
    from sparsex_jax.tasks.needle import check_length
    from sparsex_jax.training import model_crc32

    # What is wrong with the arguments is told before an hour of work.
    lengths = parse_lengths(arguments.lengths)
    if not arguments.tasks:
        raise ConfigError("tasks must name at least one: use single_2, say")
    if not arguments.tiers:
        raise ConfigError("tiers must name at least one: use device, say")
    for name in ("samples", "batch_size"):
        value = getattr(arguments, name)
        if value != "auto" and value < 1:
            raise ConfigError(f"{name}={value} must be positive: use at least 1")
    if arguments.diagnose and arguments.tiers != ("device",):
        raise ConfigError("diagnose looks into the cache of the tier device: use --tiers device")
    if not arguments.max_seconds > 0:
        raise ConfigError(f"max_seconds={arguments.max_seconds} must be positive: use 600, say")
    for task in arguments.tasks:
        for length in lengths:
            check_length(task, length, load_tokenizer())
    path = arguments.out or default_path("needle")
    check_writable(path)
    console = make_console()
    model, tokenizer, description = load(arguments.checkpoint)
    console.print(f"model: {description}", markup=False, soft_wrap=True)
    haystack, description = read_haystack(arguments.haystack, tokenizer)
    console.print(f"haystack: {description}", markup=False, soft_wrap=True)
    for tier in arguments.tiers:
        if (reason := why_not_in(tier, model.config)) is not None:
            raise ConfigError(f"{reason}: use --tiers device")
    crc32 = model_crc32(arguments.checkpoint)
    config = describe_run(arguments.checkpoint, model.config, description, arguments.seed)
    config["batch_size"] = arguments.batch_size
    rows: list[dict[str, Any]] = []
    for length, tier in itertools.product(lengths, arguments.tiers):
        ask = _Questions(arguments, model, length, tier, tokenizer, haystack)
        for task in arguments.tasks:
            with make_progress(console) as bar:
                rows.append(ask(task, bar) | {"tier": tier})
            # After each task, since a later one may fail.
            write_results(path, "needle", command, config, rows, crc32)
            where = "" if arguments.tiers == ("device",) else f", tier {tier}"
            console.print(f"{task} at {format_length(length)}{where}: {_outcome(rows[-1])}")
    console.print(_table(rows, arguments.diagnose))
    console.print(f"results: {path}", markup=False, soft_wrap=True)


class _Questions:
    """Asks the questions of any task at one length, with one compiled engine."""

    def __init__(
        self, arguments, model: "Transformer", length: int, tier: "Tier", tokenizer, haystack
    ):
        from sparsex_jax.commands.model import fitting_batch_size

        size = arguments.batch_size
        if size == "auto":
            size = fitting_batch_size(length, arguments.samples)
        self.arguments, self.model, self.length, self.tier = arguments, model, length, tier
        self.batch_size = 1 if tier == "host" else size
        self.tokenizer, self.haystack = tokenizer, haystack

    @functools.cached_property
    def engine(self) -> "Engine":
        """Reads and answers; raises CacheMemoryError where its cache does not fit."""
        return self._engine(self.batch_size)

    @functools.cached_property
    def single(self) -> "Engine":
        """The same for one sequence."""
        return self.engine if self.batch_size == 1 else self._engine(1)

    def _engine(self, batch_size: int) -> "Engine":
        from sparsex_jax.cache import Engine
        from sparsex_jax.commands.model import chunk_size

        return Engine(self.model, self.length, batch_size, chunk_size(), self.tier)

    def __call__(self, task: str, bar) -> dict[str, Any]:
        """The row of a task, without accuracy if it takes too much memory or too much time."""
        from jax.errors import JaxRuntimeError

        from sparsex_jax.cache import CacheMemoryError
        from sparsex_jax.commands.answering import TooSlow, generate_within
        from sparsex_jax.tasks import evaluate, make_row

        name = f"{task}, {format_length(self.length)}"
        shown = bar.add_task(name, total=self.arguments.samples)
        system = self.model.config.system

        def generate(prompts, room: int):
            return generate_within(
                self.engine, prompts, room, self.tokenizer.stop_ids, self.arguments.max_seconds
            )  # fmt: skip

        def why(sample, generated) -> str:
            from sparsex_jax.tasks.diagnosis import diagnose

            return diagnose(self.model, self.single, sample, generated)

        try:
            return evaluate(
                generate, task, self.length, self.arguments.samples, tokenizer=self.tokenizer,
                haystack=self.haystack, batch_size=self.batch_size, seed=self.arguments.seed,
                system=system, on_answer=lambda answer: bar.advance(shown),
                diagnose=why if self.arguments.diagnose else None,
            ).row  # fmt: skip
        except TooSlow as error:
            status, note, seconds = "too_slow", str(error), error.seconds
        except CacheMemoryError as error:
            status, note, seconds = "out_of_memory", str(error), None
        except JaxRuntimeError as error:
            if not is_memory_full(error):
                raise
            status, note, seconds = "out_of_memory", first_line(error), None
        return make_row(system, task, self.length, [], status, seconds=seconds, note=note)


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['status'].replace('_', ' ')} ({row['note']})"
    misses = _misses(row)
    return f"{row['correct']:g} of {row['samples']} right" + (f" ({misses})" if misses else "")


def _misses(row: dict[str, Any]) -> str:
    """Why answers of a row are wrong, in words; "" where none is or nobody asked."""
    from sparsex_jax.tasks.evaluation import DIAGNOSES

    found = [(row.get(name, 0), name.replace("_", " ")) for name in DIAGNOSES]
    return ", ".join(f"{count} {name}" for count, name in found if count)


def _table(rows: Sequence[dict[str, Any]], diagnosed: bool) -> rich.table.Table:
    table = rich.table.Table()
    head = ["task", "length", "tier", "samples", "correct", "accuracy", "95 % interval (Wilson)"]
    for name in head + ["misses"] * diagnosed:
        table.add_column(name)
    for row in rows:
        cells = [row["task"], format_length(row["tokens"]), row["tier"], str(row["samples"])]
        if row["status"] == "measured":
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            cells += [f"{row['correct']:g}", f"{row['accuracy']:.1%}", interval]
            cells += [_misses(row)] * diagnosed
        else:
            cells.append(row["status"].replace("_", " "))
        table.add_row(*cells)
    return table
