"""`sparsex eval code`."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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
from sparsex_jax.config import ConfigError
from sparsex_jax.errors import first_line, is_memory_full

if TYPE_CHECKING:
    from sparsex_jax.cache import Engine, Tier
    from sparsex_jax.tasks import Answer
    from sparsex_jax.tasks.answer_log import AnswerLog, Cell
    from sparsex_jax.tasks.code.prepared import PreparedCode
    from sparsex_jax.tasks.code.questions import CodeContext, Question

Task = Literal["name_to_definition", "description_to_function"]
RETRIEVED = (1, 5)  # chunks that BM25 may name
_WITHOUT = 20  # contexts without a question of a task before it is given up


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Asks for functions in contexts of whole C files, and BM25 the same (docs/code.md).

    A context is read once and asked many times.

    Attributes:
      data: folder made by scripts/prepare_linux.py; its test split is asked about.
      checkpoint: directory of a model trained with the folder's tokenizer.
      systems: the model, the opponent, or both.
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
    systems: tuple[Literal["model", "bm25"], ...] = ("model", "bm25")
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
    from sparsex_jax.benchmarks.results import (
        check_same_run,
        check_writable,
        default_path,
        provenance,
        write_results,
    )
    from sparsex_jax.benchmarks.tables import accuracy_table
    from sparsex_jax.tasks.answer_log import AnswerLog
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
    if "model" in arguments.systems:
        model = ModelSystem(arguments, prepared)
        config |= model.described
        console.print(f"model: {model.description}", markup=False, soft_wrap=True)
        systems.append(model)
    if "bm25" in arguments.systems:
        systems.append(Bm25System(prepared))
        config |= Bm25System.describe()
    answers_path = path.with_suffix(".answers.jsonl")
    log = AnswerLog(
        answers_path, {"benchmark": "code", "config": config, **provenance()},
        (lambda saved: check_same_run(saved, "code", config, answers_path))
        if arguments.resume
        else None,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for length, samples in lengths.items():
        read = _ask_all(contexts, systems, arguments.tasks, length, samples, log, console)
        for task, system in itertools.product(arguments.tasks, systems):
            rows += system.rows(task, length, samples, read[task], log)
        # After each length, since a later one may fail.
        write_results(path, "code", command, config, rows)
    console.print(accuracy_table(rows, format_length), markup=False, soft_wrap=True)
    console.print(f"results: {path}, answers: {answers_path}", markup=False, soft_wrap=True)


def _checked_lengths(arguments: Arguments) -> dict[int, int]:
    """The samples of each length; what is wrong with the arguments is told before any work."""
    lengths = parse_lengths(arguments.lengths)
    for name in ("systems", "tasks"):
        if not getattr(arguments, name):
            raise ConfigError(f"{name} must name at least one: see sparsex eval code --help")
    if "model" in arguments.systems and arguments.checkpoint is None:
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


class System:
    """Answers questions and keeps the answers in a log, by cell."""

    def cells(self, task: str, length: int) -> list["Cell"]:
        """Those of a task, which have the same questions."""
        raise NotImplementedError

    def ask(
        self,
        context: "CodeContext",
        length: int,
        pending: dict[str, list[tuple[int, "Question"]]],
        log: "AnswerLog",
        advance: Callable[[], None],
    ) -> None:
        """Answers numbered questions about a context, of each task."""
        raise NotImplementedError

    def rows(
        self, task: str, length: int, samples: int, contexts: int, log: "AnswerLog"
    ) -> list[dict[str, Any]]:
        """Of a task, made from the log."""
        raise NotImplementedError


class Bm25System(System):
    """The opponent: right if the chunk with the definition's name is among the first ones."""

    def __init__(self, prepared: "PreparedCode"):
        self._tokenizer = prepared.tokenizer

    @staticmethod
    def describe() -> dict[str, Any]:
        """For the results file."""
        from sparsex_jax.baselines.retrieval import CHUNK, find_bm25s

        return {"chunk_tokens": CHUNK, "bm25s": find_bm25s().__version__}

    def cells(self, task: str, length: int) -> list["Cell"]:
        """One for each number of chunks."""
        return [(task, length, "bm25", count) for count in RETRIEVED]

    def ask(self, context, length, pending, log, advance) -> None:
        """Ranks the chunks of a context for each question."""
        from sparsex_jax.baselines.retrieval import ChunkRetriever, terms

        began = time.perf_counter()
        retriever = ChunkRetriever(context.tokens, context.bounds, self._tokenizer)
        share = (time.perf_counter() - began) / sum(map(len, pending.values()))
        for task, questions in pending.items():
            for number, question in questions:
                began = time.perf_counter()
                rank = retriever.rank(terms(question.text), question.position)
                seconds = share + time.perf_counter() - began
                text = "not retrieved" if rank is None else f"rank {rank}"
                for cell, count in zip(self.cells(task, length), RETRIEVED, strict=True):
                    right = rank is not None and rank <= count
                    answer = _answer(number, context, question, text, right, seconds)
                    if number == len(log.answers(cell)):  # not there already, after a kill
                        log.add(cell, [answer])
                advance()

    def rows(self, task, length, samples, contexts, log) -> list[dict[str, Any]]:
        """A row for each number of chunks."""
        from sparsex_jax.tasks import summarize

        return [
            summarize("bm25", task, length, log.answers(cell)[:samples], diagnosed=False)
            | {"tier": None, "chunks": count, "contexts": contexts}
            for cell, count in zip(self.cells(task, length), RETRIEVED, strict=True)
        ]


class ModelSystem(System):
    """A model: reads a context once and answers all questions about it.

    Attributes:
      description: in words.
      described: for the results file.
    """

    def __init__(self, arguments: Arguments, prepared: "PreparedCode"):
        from sparsex_jax.cache.tiers import why_not_in
        from sparsex_jax.commands.model import chunk_size, load, name_of
        from sparsex_jax.tasks.code.wording import Wording
        from sparsex_jax.training import model_crc32
        from sparsex_jax.training.checkpoints import to_json

        assert arguments.checkpoint is not None
        self._model, _, self.description = load(arguments.checkpoint, prepared.tokenizer)
        self._tier: Tier = arguments.tier
        if (reason := why_not_in(self._tier, self._model.config)) is not None:
            raise ConfigError(f"{reason}: use --tier device")
        self._chunk = chunk_size()
        if arguments.chunk != "auto":
            self._chunk = parse_length(arguments.chunk, "chunk")
        self._wording = Wording(prepared.split("test"), prepared.tokenizer)
        self._limit = arguments.max_seconds
        self.described = {
            "checkpoint": name_of(arguments.checkpoint),
            "model": to_json(self._model.config),
            "model_crc32": model_crc32(arguments.checkpoint),
            "chunk": self._chunk,
            "max_seconds": self._limit,
        }

    def cells(self, task: str, length: int) -> list["Cell"]:
        """One."""
        return [(task, length, self._model.config.system, self._tier)]

    @functools.lru_cache(1)  # noqa: B019  (as long as the command)
    def _engine(self, length: int) -> "Engine":
        from sparsex_jax.cache import Engine

        return Engine(self._model, length, chunk=self._chunk, tier=self._tier)

    def ask(self, context, length, pending, log, advance) -> None:
        """Reads the context and answers; what takes too much memory or time is put down as that."""
        from jax.errors import JaxRuntimeError

        from sparsex_jax.cache import CacheMemoryError
        from sparsex_jax.commands.answering import TooSlow

        cells = [self.cells(task, length)[0] for task in pending]
        if any(log.missing(cell) for cell in cells):
            return
        try:
            self._answer(context, length, pending, log, advance)
            return
        except TooSlow as error:
            missing = {"status": "too_slow", "note": str(error), "seconds": error.seconds}
        except CacheMemoryError as error:
            missing = {"status": "out_of_memory", "note": str(error)}
        except JaxRuntimeError as error:
            if not is_memory_full(error):
                raise
            missing = {"status": "out_of_memory", "note": first_line(error)}
        for cell in cells:
            log.add_missing(cell, missing)

    def _answer(self, context, length, pending, log, advance) -> None:
        from sparsex_jax.commands.answering import prefill_within
        from sparsex_jax.tasks.code.wording import ANSWER

        engine = self._engine(length)
        began = time.perf_counter()
        cache = prefill_within(engine, context.tokens[None], self._limit).block_until_ready()
        share = (time.perf_counter() - began) / sum(map(len, pending.values()))
        for task, questions in pending.items():
            stop = (self._wording.brace,) if task == "description_to_function" else ()
            for number, question in questions:
                began = time.perf_counter()
                (found,) = engine.answer(cache, [question.prompt], ANSWER[task], stop)
                seconds = share + time.perf_counter() - began
                text = self._wording.generated(task, found)
                right = context.is_right(question, text)
                answer = _answer(number, context, question, text, right, seconds)
                log.add(self.cells(task, length)[0], [answer])
                advance()

    def rows(self, task, length, samples, contexts, log) -> list[dict[str, Any]]:
        """A row, of the answers or of why there are none."""
        from sparsex_jax.tasks import make_row, summarize

        (cell,) = self.cells(task, length)
        more = {"tier": self._tier, "chunks": None, "contexts": contexts}
        system, missing = self._model.config.system, log.missing(cell)
        if missing is not None:
            return [make_row(system, task, length, [], **missing) | more]
        answers = log.answers(cell)[:samples]
        return [summarize(system, task, length, answers, diagnosed=False) | more]


def _answer(
    number: int,
    context: "CodeContext",
    question: "Question",
    text: str,
    right: bool,
    seconds: float,
) -> "Answer":
    from sparsex_jax.tasks import Answer

    depth = 100 * question.position / len(context.tokens)
    return Answer(number, depth, question.text, (question.target,), text, float(right), seconds)


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
