"""`sparsex eval code`."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsex_jax.commands.arguments import (
    format_length,
    make_console,
    make_progress,
    parse,
    parse_length,
    parse_lengths,
)
from sparsex_jax.commands.code_systems import (
    ModelSystem,
    Reader,
    ReaderSystem,
    Retrieval,
    RetrievalSystem,
    System,
)
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.tasks.answer_log import AnswerLog
    from sparsex_jax.tasks.code.prepared import PreparedCode
    from sparsex_jax.tasks.code.questions import CodeContext, Question

Task = Literal["name_to_definition", "description_to_function"]
SystemName = Literal["model", "bm25", "bm25_model", "embedding", "embedding_model"]
_WITHOUT = 20  # contexts without a question of a task before it is given up


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Asks for functions in contexts of whole C files, and retrieval the same (docs/code.md).

    A context is read once and asked many times.

    Attributes:
      data: folder made by scripts/prepare_linux.py; its test split is asked about.
      checkpoint: directory of a model trained with the folder's tokenizer.
      systems: the model with all of the context; BM25, and the model as reader of the five chunks
        that BM25 finds; the same two with embeddings of the chunks.
      tasks: a name is given and the definition asked for, or a description and the signature.
      lengths: tokens of a context with a question and its answer; 4096, 500K and 8M are understood.
      samples: questions of each task; a number for all lengths, or one for each, shortest first.
      questions_per_context: most of each task about one context, which are not independent.
      tier: where the model's cache keeps keys and values of old blocks.
      chunk: tokens that are read at a time; auto fits them to the device.
      max_seconds: a context that would take longer to read makes the model's rows "too_slow".
      seed: decides the contexts and the questions.
      out: results file (JSON); by default results/HARDWARE/code.json (cpu, h200, ...). Answers are
        written beside it, code.answers.jsonl, one by one.
      resume: keeps the answers that are there, and asks for the others only.
    """

    data: Path
    checkpoint: Path | None = None
    systems: tuple[SystemName, ...] = ("model", "bm25", "bm25_model")
    tasks: tuple[Task, ...] = ("name_to_definition", "description_to_function")
    lengths: tuple[str, ...] = ("500K", "1M")
    samples: tuple[int, ...] = (300,)
    questions_per_context: int = 25
    tier: Literal["device", "host", "compressed"] = "device"
    chunk: str = "auto"
    max_seconds: float = 3600.0
    seed: int = 0
    out: Path | None = None
    resume: bool = False


def main(arguments: list[str], command: str) -> None:
    """Parses the arguments and runs the command, which is quoted in what it writes."""
    code(parse(Arguments, "eval code", arguments), command)


def code(arguments: Arguments, command: str) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.results import check_writable, default_path, write_results
    from sparsex_jax.benchmarks.tables.quality import accuracy_table
    from sparsex_jax.commands.answering import open_log
    from sparsex_jax.tasks.code.prepared import PreparedCode

    lengths = _checked_lengths(arguments)
    prepared = PreparedCode(arguments.data)
    contexts = Contexts(prepared, arguments.questions_per_context, arguments.seed)
    for length in lengths:
        contexts.check_length(length)
    path = arguments.out or default_path("code")
    check_writable(path)
    console = make_console()
    config = _describe(arguments, prepared)
    systems: list[System] = []
    if _needs_model(arguments):
        reader, description, described = _load_reader(arguments, prepared)
        config |= described
        console.print(f"model: {description}", markup=False, soft_wrap=True)
    retrievals: dict[str, Retrieval] = {}
    for name in dict.fromkeys(arguments.systems):
        if name == "model":
            systems.append(ModelSystem(reader))
            continue
        kind = name.removesuffix("_model")
        if kind not in retrievals:
            retrievals[kind] = Retrieval(kind, prepared)
            config |= retrievals[kind].describe()
        retrieval = retrievals[kind]
        if name == kind:
            systems.append(RetrievalSystem(retrieval))
        else:
            systems.append(ReaderSystem(reader, retrieval))
    log = open_log(path, "code", config, resume=arguments.resume)
    rows: list[dict[str, Any]] = []
    for length, samples in lengths.items():
        read = _ask_all(contexts, systems, arguments.tasks, length, samples, log, console)
        for task, system in itertools.product(arguments.tasks, systems):
            rows += system.rows(task, length, samples, read[task], log)
        # After each length, since a later one may fail.
        write_results(path, "code", command, config, rows)
    console.print(accuracy_table(rows, format_length), markup=False, soft_wrap=True)
    console.print(f"results: {path}, answers: {log.path}", markup=False, soft_wrap=True)


def _checked_lengths(arguments: Arguments) -> dict[int, int]:
    """The samples of each length; what is wrong with the arguments is told before any work."""
    lengths = parse_lengths(arguments.lengths)
    for name in ("systems", "tasks"):
        if not getattr(arguments, name):
            raise ConfigError(f"{name} must name at least one: see sparsex eval code --help")
    if _needs_model(arguments) and arguments.checkpoint is None:
        raise ConfigError("checkpoint must name the model: use runs/a/model, or --systems bm25")
    samples = arguments.samples
    if len(samples) not in (1, len(lengths)):
        raise ConfigError(
            f"samples={samples} must be a number for all lengths, or one for each of {len(lengths)}"
        )
    for name, value in (
        ("samples", min(samples)),
        ("questions_per_context", arguments.questions_per_context),
        ("max_seconds", arguments.max_seconds),
    ):
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive: use at least 1")
    each = samples * len(lengths) if len(samples) == 1 else samples
    return dict(zip(lengths, each, strict=True))


def _needs_model(arguments: Arguments) -> bool:
    return any(name.endswith("model") for name in arguments.systems)


def _load_reader(
    arguments: Arguments, prepared: "PreparedCode"
) -> tuple[Reader, str, dict[str, Any]]:
    """The model, what it is in words, and in a results file."""
    from sparsex_jax.cache.tiers import why_not_in
    from sparsex_jax.commands.model import chunk_size, load, name_of
    from sparsex_jax.tasks.code.wording import Wording
    from sparsex_jax.training import model_crc32
    from sparsex_jax.training.checkpoints import to_json

    assert arguments.checkpoint is not None
    model, _, description = load(arguments.checkpoint, prepared.tokenizer)
    if (reason := why_not_in(arguments.tier, model.config)) is not None:
        raise ConfigError(f"{reason}: use --tier device")
    chunk = chunk_size() if arguments.chunk == "auto" else parse_length(arguments.chunk, "chunk")
    wording = Wording(prepared.split("test"), prepared.tokenizer)
    described = {
        "checkpoint": name_of(arguments.checkpoint),
        "model": to_json(model.config),
        "model_crc32": model_crc32(arguments.checkpoint),
        "chunk": chunk,
        "max_seconds": arguments.max_seconds,
    }
    reader = Reader(model, wording, arguments.tier, chunk, arguments.max_seconds)
    return reader, description, described


def _describe(arguments: Arguments, prepared: "PreparedCode") -> dict[str, Any]:
    """What decides the outcome, but for the model."""
    from sparsex_jax.tasks.code.scoring import THRESHOLD

    index = prepared.index
    test = {name: index["splits"]["test"][name] for name in ("files", "tokens", "functions")}
    return {
        "source": index["source"],
        "prepared": prepared.fingerprint,
        "test_split": test,
        "vocab_size": prepared.tokenizer.vocab_size,
        "questions_per_context": arguments.questions_per_context,
        "bleu_threshold": THRESHOLD,
        "seed": arguments.seed,
    }


class Contexts:
    """The contexts of any length, each decided by (seed, length, its number) alone."""

    def __init__(self, prepared: "PreparedCode", questions: int, seed: int):
        from sparsex_jax.tasks.code.wording import Wording

        self._wording = Wording(prepared.split("test"), prepared.tokenizer)
        self._questions, self._seed = questions, seed

    def check_length(self, length: int) -> None:
        """Raises ValueError unless there are contexts of a length."""
        from sparsex_jax.tasks.code.questions import check_length

        check_length(length, self._wording.split)

    def __call__(
        self, tasks: Sequence[str], length: int, samples: int
    ) -> Iterator[tuple["CodeContext", dict[str, list["Question"]]]]:
        """Contexts and what is asked about each, until every task has its samples."""
        from sparsex_jax.tasks.code.questions import CodeContext

        asked = dict.fromkeys(tasks, 0)
        for number in itertools.count():
            if min(asked.values()) >= samples:
                return
            if number == _WITHOUT and not min(asked.values()):
                task = min(asked, key=lambda name: asked[name])
                raise ConfigError(
                    f"the first {number} contexts of {length} tokens have no question of {task}:"
                    " use longer ones, or leave it out of --tasks"
                )
            rng = np.random.default_rng([self._seed, length, number])
            context = CodeContext(self._wording, length, rng, self._questions)
            questions = {
                task: context.questions(task)[: samples - asked[task]] for task in tasks
            }  # fmt: skip
            for task in tasks:
                asked[task] += len(questions[task])
            yield context, questions


def _ask_all(
    contexts: Contexts,
    systems: Sequence[System],
    tasks: Sequence[str],
    length: int,
    samples: int,
    log: "AnswerLog",
    console,
) -> dict[str, int]:
    """Asks all systems what the log has no answers to; returns how many contexts a task has."""
    read, first = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
    with make_progress(console) as bar:
        shown = bar.add_task(format_length(length), total=samples * len(tasks) * len(systems))
        for context, questions in contexts(tasks, length, samples):
            for system in systems:
                pending = {}
                for task, asked in questions.items():
                    there = min(len(log.answers(cell)) for cell in system.cells(task, length))
                    numbered = list(enumerate(asked, first[task]))
                    left = [item for item in numbered if item[0] >= there]
                    bar.advance(shown, len(asked) - len(left))
                    if left:
                        pending[task] = left
                if pending:
                    system.ask(context, length, pending, log, lambda: bar.advance(shown))
            for task, asked in questions.items():
                first[task] += len(asked)
                read[task] += bool(asked)
    return read
