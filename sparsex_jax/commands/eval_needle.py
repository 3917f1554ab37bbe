"""`sparsex eval needle`."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import rich.console
import rich.table

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    format_length,
    make_console,
    make_progress,
    parse,
    parse_length,
    parse_lengths,
)
from sparsex_jax.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from sparsex_jax.cache import Engine, Tier
    from sparsex_jax.modules import Transformer
    from sparsex_jax.tasks.answer_log import AnswerLog

Task = Literal[
    "single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue",
    "multiquery", "vt",
]  # fmt: skip


_TELL = 60  # seconds between lines about a task where there is no bar


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Scores a model on RULER's needle tasks by free greedy generation.

    Attributes:
      checkpoint: directory of a model; by default the one that comes with sparsex.
      tasks: which ones.
      lengths: tokens of a prompt with its answer; 4096, 16K and 1M are understood.
      samples: questions for each task and length.
      depths: so many, evenly spaced, taken in turn by the tasks with a single answer, each with a
        row of its own; by default depths are drawn from RULER's 40.
      tiers: where the cache keeps keys and values of old blocks: device and host are exact,
        compressed forgets; each gets rows of its own.
      batch_size: questions answered at the same time; auto fits them to the device. In the tier
        host it is 1.
      chunk: tokens that are read at a time; auto fits them to the device.
      max_seconds: a sample that would take longer makes its row "too_slow".
      haystack: folder of text files; by default the held-out split of the sources of Python's
        standard library.
      held_out: of the haystack takes only the files, one in ten, that training on it
        (--data.haystack) leaves out.
      search_node_size: blocks of a node, for a search in two levels instead of the model's own; 0
        searches all blocks.
      search_beam: nodes that such a search looks into.
      diagnose: finds out why answers are wrong: the block was not selected, it was selected but not
        attended to, or it was attended to but not copied; reads the text of each again.
      seed: decides the questions.
      out: results file (JSON); by default results/HARDWARE/needle.json (cpu, h200, ...). Answers
        are written beside it, needle.answers.jsonl, batch by batch.
      resume: keeps the answers that are there, and asks for the others only.
    """

    checkpoint: Path = SHIPPED_MODEL
    tasks: tuple[Task, ...] = ("single_2", "single_3")
    lengths: tuple[str, ...] = ("16K", "128K")
    samples: int = 100
    depths: int | None = None
    tiers: tuple[Literal["device", "host", "compressed"], ...] = ("device",)
    batch_size: int | Literal["auto"] = "auto"
    chunk: str = "auto"
    max_seconds: float = 600.0
    haystack: Path | None = None
    held_out: bool = False
    search_node_size: int | None = None
    search_beam: int | None = None
    diagnose: bool = False
    seed: int = 0
    out: Path | None = None
    resume: bool = False


def main(arguments: list[str], command: str) -> None:
    """Parses the arguments and runs the command, which is quoted in what it writes."""
    needle(parse(Arguments, "eval needle", arguments), command)


def needle(arguments: Arguments, command: str) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.results import check_writable, default_path, write_results
    from sparsex_jax.cache.tiers import why_not_in
    from sparsex_jax.commands.answering import open_log
    from sparsex_jax.commands.model import chunk_size, describe_run, load, open_haystack
    from sparsex_jax.training import model_crc32

    lengths = _checked_lengths(arguments)
    path = arguments.out or default_path("needle")
    check_writable(path)
    console = make_console()
    search = {
        name: value
        for name in ("search_node_size", "search_beam")
        if (value := getattr(arguments, name)) is not None
    }
    model, tokenizer, description = load(arguments.checkpoint, attention_changes=search)
    if search:
        _check_search(arguments, model.config)
    console.print(f"model: {description}", markup=False, soft_wrap=True)
    haystack, description = open_haystack(
        arguments.haystack, tokenizer, held_out=arguments.held_out
    )
    console.print(f"haystack: {description}", markup=False, soft_wrap=True)
    for tier in arguments.tiers:
        if (reason := why_not_in(tier, model.config)) is not None:
            raise ConfigError(f"{reason}: use --tiers device")
    chunk = chunk_size() if arguments.chunk == "auto" else parse_length(arguments.chunk, "chunk")
    config = describe_run(arguments.checkpoint, model.config, description, arguments.seed)
    config |= {
        "model_crc32": model_crc32(arguments.checkpoint),
        "batch_size": arguments.batch_size,
        "chunk": chunk,
        "depths": arguments.depths,
        "diagnose": arguments.diagnose,
        "max_seconds": arguments.max_seconds,
    }
    log = open_log(path, "needle", config, resume=arguments.resume)
    rows: list[dict[str, Any]] = []
    for length, tier in itertools.product(lengths, arguments.tiers):
        ask = _Questions(arguments, model, length, tier, chunk, tokenizer, haystack, log)
        for task in arguments.tasks:
            rows += ask(task, console)
            # After each task, since a later one may fail.
            write_results(path, "needle", command, config, rows)
            where = "" if arguments.tiers == ("device",) else f", tier {tier}"
            total = [row for row in rows if row["depth"] is None][-1]
            console.print(f"{task} at {format_length(length)}{where}: {_outcome(total)}")
    console.print(_table(rows, arguments.diagnose))
    console.print(f"results: {path}, answers: {log.path}", markup=False, soft_wrap=True)


def _checked_lengths(arguments: Arguments) -> list[int]:
    """The lengths; what is wrong with the arguments is told before an hour of work."""
    from sparsex_jax.tasks import load as load_tokenizer
    from sparsex_jax.tasks.needle import check_length

    lengths = parse_lengths(arguments.lengths)
    if not arguments.tasks:
        raise ConfigError("tasks must name at least one: use single_2, say")
    if not arguments.tiers:
        raise ConfigError("tiers must name at least one: use device, say")
    for name in ("samples", "batch_size", "depths"):
        value = getattr(arguments, name)
        if value not in ("auto", None) and value < 1:
            raise ConfigError(f"{name}={value} must be positive: use at least 1")
    samples, depths = arguments.samples, arguments.depths
    if depths is not None and samples % depths:
        raise ConfigError(
            f"samples={samples} must be a multiple of depths={depths}:"
            f" use {-(-samples // depths) * depths}"
        )
    if arguments.diagnose and arguments.tiers != ("device",):
        raise ConfigError("diagnose looks into the cache of the tier device: use --tiers device")
    if not arguments.max_seconds > 0:
        raise ConfigError(f"max_seconds={arguments.max_seconds} must be positive: use 600, say")
    for task in arguments.tasks:
        for length in lengths:
            check_length(task, length, load_tokenizer())
    return lengths


def _check_search(arguments: Arguments, config: ModelConfig) -> None:
    """Raises ConfigError where how blocks are to be searched changes nothing."""
    given = f"search_node_size={arguments.search_node_size}, search_beam={arguments.search_beam}"
    if "s" not in config.layers:
        raise ConfigError(f"{given}: layers={config.layers!r} search no blocks, leave them out")
    if "compressed" in arguments.tiers:
        raise ConfigError(f"{given}: the tier compressed searches no blocks, use --tiers device")
    if arguments.search_beam is not None and not config.attention.search_node_size:
        raise ConfigError(f"{given}: a beam is of nodes, give --search-node-size 8, say")


class _Questions:
    """Asks the questions of any task at one length, with one compiled engine."""

    def __init__(
        self,
        arguments: Arguments,
        model: "Transformer",
        length: int,
        tier: "Tier",
        chunk: int,
        tokenizer,
        haystack,
        log: "AnswerLog",
    ):
        from sparsex_jax.commands.model import fitting_batch_size

        size = arguments.batch_size
        if size == "auto":
            size = fitting_batch_size(length, arguments.samples)
        self.arguments, self.model, self.length, self.tier = arguments, model, length, tier
        self.batch_size = 1 if tier == "host" else size
        self.chunk, self.tokenizer, self.haystack, self.log = chunk, tokenizer, haystack, log

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

        return Engine(self.model, self.length, batch_size, self.chunk, self.tier)

    def __call__(self, task: str, console: rich.console.Console) -> list[dict[str, Any]]:
        """The rows of a task: of all samples and, where they are given, of each depth."""
        from sparsex_jax.tasks import TASKS, make_row, summarize

        cell, system = (task, self.length, self.tier), self.model.config.system
        depths = None
        if self.arguments.depths is not None and TASKS[task].single:
            depths = np.linspace(0, 100, self.arguments.depths).tolist()
        missing = self.log.missing(cell)
        if missing is None:
            missing = self._ask(task, cell, depths, console)
        common = {"tier": self.tier, "depth": None}
        if missing is not None:
            return [make_row(system, task, self.length, [], **missing) | common]
        answers = self.log.answers(cell)[: self.arguments.samples]

        def row(chosen):
            return summarize(
                system, task, self.length, chosen, diagnosed=self.arguments.diagnose
            )  # fmt: skip

        of_depths = [
            row([answer for answer in answers if answer.depth == depth])
            | common | {"depth": depth}
            for depth in depths or ()
        ]  # fmt: skip
        return [row(answers) | common, *of_depths]

    def _ask(
        self, task: str, cell: tuple, depths: list[float] | None, console: rich.console.Console
    ) -> dict[str, Any] | None:
        """Asks what the log has no answers to; if that takes too much memory or time, says so."""
        from sparsex_jax.commands.answering import generate_within, why_missing
        from sparsex_jax.tasks import evaluate

        arguments, name = self.arguments, f"{task}, {format_length(self.length)}"

        def generate(prompts, room: int):
            return generate_within(
                self.engine, prompts, room, self.tokenizer.stop_ids, arguments.max_seconds
            )  # fmt: skip

        def why(sample, generated) -> str:
            from sparsex_jax.tasks.diagnosis import diagnose

            return diagnose(self.model, self.single, sample, generated)

        there, haystack = self.log.answers(cell), self.haystack.all_tokens()
        told, total = time.monotonic(), arguments.samples
        with make_progress(console) as bar:
            shown = bar.add_task(name, total=total, completed=len(there))

            def keep(answers) -> None:
                nonlocal told
                self.log.add(cell, answers)
                bar.advance(shown, len(answers))
                if not console.is_terminal and time.monotonic() > told + _TELL:
                    told = time.monotonic()
                    done = self.log.answers(cell)
                    right = sum(answer.score for answer in done)
                    console.print(f"{name}: {right:g} of {len(done)} right, {total} in all")

            try:
                evaluate(
                    generate, task, self.length, total, tokenizer=self.tokenizer,
                    haystack=haystack, batch_size=self.batch_size, seed=arguments.seed,
                    depths=depths, on_batch=keep, diagnose=why if arguments.diagnose else None,
                    answered=tuple(there),
                )  # fmt: skip
                return None
            except Exception as error:
                missing = why_missing(error)
        self.log.add_missing(cell, missing)
        return missing


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
        if row["depth"] is not None:
            continue
        cells = [row["task"], format_length(row["tokens"]), row["tier"], str(row["samples"])]
        if row["status"] == "measured":
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            cells += [f"{row['correct']:g}", f"{row['accuracy']:.1%}", interval]
            cells += [_misses(row)] * diagnosed
        else:
            cells.append(row["status"].replace("_", " "))
        table.add_row(*cells)
    return table
