"""Training data: text with needles, questions and their answers, as a grain pipeline."""

import dataclasses

import grain
import numpy as np

from sparsex_jax.config import DataConfig, StageConfig
from sparsex_jax.tasks import words
from sparsex_jax.tasks.code import practice as code_practice
from sparsex_jax.tasks.code.prepared import CodeSplit, PreparedCode
from sparsex_jax.tasks.corpus import Corpus
from sparsex_jax.tasks.haystack import insert, take_text
from sparsex_jax.tasks.needle import TASKS, check_length, longest_value, make_sample
from sparsex_jax.tasks.phrases import KINDS, Kind, Phrases, draw_value
from sparsex_jax.tasks.practice import LEAST_LENGTH, Practice
from sparsex_jax.tasks.tokenizer import Tokenizer, load
from sparsex_jax.tasks.workers import in_workers

PRACTICE = ("retrieval", "values", "crowd", "chains")
CODE = tuple(code_practice.SOURCES)
SOURCES = ("text", "needle", *PRACTICE, *CODE, *TASKS)
# Tokens into which every text of a source fits.
_LEAST = dict.fromkeys(PRACTICE, LEAST_LENGTH) | dict.fromkeys(CODE, code_practice.LEAST_LENGTH)

# Most of a sequence that needles may take, and that questions with answers may take.
_SHARE = 0.4
_ONE_QUESTION = 0.3
_SIMILAR_KEYS = 0.5
_PREFACE = 0.5
_ONE_KIND = 0.5
# Share of sequences whose first question is about a needle in the last tokens of the text: in the
# window or just beyond it, which is rare when depths are uniform and text is long.
_LATE = 0.3
_LATE_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class _Needle:
    kind: Kind
    key: str
    value: str


class BatchMaker:
    """Makes batch number `index` from (seed, index) alone, whatever was made before.

    Sample j of the global batch i has the random stream (seed, i * batch_size + j), so the
    samples do not depend on the number of processes.
    """

    def __init__(
        self,
        data: DataConfig,
        stage: StageConfig,
        seed: int,
        tokenizer: Tokenizer,
        process_index: int,
        process_count: int,
    ):
        self.stage = stage
        self.seed = seed
        self.text_weight = data.text_weight
        self.tokenizer = tokenizer
        self.phrases = Phrases(tokenizer)
        self.corpus = open_text(data, tokenizer)
        per_process = stage.batch_size // process_count
        self.rows = range(process_index * per_process, (process_index + 1) * per_process)
        self.sources = [name for name, _ in stage.mix]
        weights = np.array([weight for _, weight in stage.mix], np.float64)
        self.shares = weights / weights.sum()
        self._check(stage)
        if not set(PRACTICE).isdisjoint(self.sources):
            self.practice = Practice(stage, tokenizer, self.corpus.all_tokens())
        if isinstance(self.corpus, CodeSplit) and not set(CODE).isdisjoint(self.sources):
            self.code = code_practice.CodePractice(stage, self.corpus, tokenizer)
            for source in set(CODE).intersection(self.sources):
                self.code.check(source)

    def _check(self, stage: StageConfig) -> None:
        for source in self.sources:
            if source not in SOURCES:
                raise ValueError(f"mix: {source!r} is no source: use {', '.join(SOURCES)}")
            if stage.length < _LEAST.get(source, 0):
                raise ValueError(
                    f"length={stage.length} cannot hold every text of source {source!r}: use at"
                    f" least {_LEAST[source]}"
                )
            if source in CODE and not isinstance(self.corpus, CodeSplit):
                raise ValueError(
                    f"mix: source {source!r} is about prepared C files: use --data.code FOLDER,"
                    " made by scripts/prepare_linux.py"
                )
            if source in TASKS:
                check_length(source, stage.length + 1, self.tokenizer, "train")
        if "needle" in self.sources:
            key = longest_value(self.tokenizer, "words")
            value = longest_value(self.tokenizer, "uuids")
            frame = len(self.phrases.preface("numbers", False))
            frame += len(self.phrases.needle("numbers", "a-a", "0"))
            frame += len(self.phrases.question("numbers", ["a-a"], True))
            least = frame + 3 * key + 2 * value
            if stage.length < least:
                raise ValueError(
                    f"length={stage.length} cannot hold a needle and its question: use at least"
                    f" {least}"
                )

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Batch: tokens, targets int32 [B, T] and weights f32 [B, T]."""
        samples = [self.sample(index * self.stage.batch_size + row) for row in self.rows]
        # Each whole in memory: only such arrays reach another process by shared memory.
        return {
            "tokens": np.stack([tokens[:-1] for tokens, _ in samples]),
            "targets": np.stack([tokens[1:] for tokens, _ in samples]),
            "weights": np.stack([weights[1:] for _, weights in samples]),
        }

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample of a number: tokens int32 [T + 1] and their weights f32 [T + 1]."""
        tokens, weights = self._draw(np.random.default_rng([self.seed, number]))
        if self.stage.loss_tokens is not None:
            weights[: -self.stage.loss_tokens] = 0
        return tokens, weights

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        count = self.stage.length + 1
        if source == "text":
            tokens = take_text(self.corpus.all_tokens(), count, rng, self.tokenizer)
            return tokens, np.ones(count, np.float32)
        if source == "needle":
            tokens, is_answer = self._needles(count, rng)
        elif source in PRACTICE:
            tokens, is_answer = getattr(self.practice, source)(count, rng)
        elif source in CODE:
            tokens, is_answer = self.code(source, count, rng)
        else:
            sample = make_sample(
                source, count, rng=rng, tokenizer=self.tokenizer,
                haystack=self.corpus.all_tokens(), split="train", answer_room=0,
            )  # fmt: skip
            tokens = np.concatenate([sample.prompt, sample.answer])
            is_answer = np.arange(count) >= len(sample.prompt)
        return tokens, np.where(is_answer, 1.0, self.text_weight).astype(np.float32)

    def _needles(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Text with needles, then questions about some of them, each with its answer."""
        needles, lines = self._draw_needles(count, rng)
        most = 1 if rng.random() < _ONE_QUESTION else self.stage.questions
        questions: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        asked: list[_Needle] = []
        size = 0
        order = rng.permutation(len(needles))
        for index in order[:most]:
            needle = needles[index]
            question = self.phrases.question(needle.kind, [needle.key], single=True)
            answer = self.phrases.answer([needle.value])
            size += len(question) + len(answer)
            if asked and size > _SHARE * count:
                break
            asked.append(needle)
            questions.append(question)
            answers.append(answer)
        parts: list[np.ndarray] = []
        if rng.random() < _PREFACE:
            parts.append(self.phrases.preface(asked[0].kind, single=len(asked) == 1))
        used = sum(map(len, [*parts, *lines, *questions, *answers]))
        text = take_text(self.corpus.all_tokens(), count - used, rng, self.tokenizer)
        depths = rng.uniform(0, 100, len(lines))
        if rng.random() < _LATE:
            depths[order[0]] = 100 * max(0, 1 - rng.uniform(0, _LATE_TOKENS) / len(text))
        parts.append(insert(text, lines, depths.tolist(), self.tokenizer)[0])
        is_answer = [np.zeros(sum(map(len, parts)), bool)]
        for question, answer in zip(questions, answers, strict=True):
            parts += [question, answer]
            is_answer += [np.zeros(len(question), bool), np.ones(len(answer), bool)]
        return np.concatenate(parts), np.concatenate(is_answer)

    def _draw_needles(
        self, count: int, rng: np.random.Generator
    ) -> tuple[list[_Needle], list[np.ndarray]]:
        low, high = self.stage.needles
        wanted = int(rng.integers(low, high + 1))
        kinds = [KINDS[rng.integers(len(KINDS))]] if rng.random() < _ONE_KIND else KINDS
        similar = rng.random() < _SIMILAR_KEYS
        pairs: list[tuple[str, str]] = []
        needles: list[_Needle] = []
        lines: list[np.ndarray] = []
        size = 0
        while len(needles) < wanted:
            if similar and pairs:
                pair = words.draw_similar(rng, "train", pairs[rng.integers(len(pairs))])
            else:
                pair = words.draw_pair(rng, "train")
            if pair in pairs:
                continue
            kind = kinds[rng.integers(len(kinds))]
            needle = _Needle(kind, "-".join(pair), draw_value(rng, kind, "train"))
            line = self.phrases.needle(needle.kind, needle.key, needle.value)
            size += len(line)
            if needles and size > _SHARE * count:
                break
            pairs.append(pair)
            needles.append(needle)
            lines.append(line)
        return needles, lines


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """That of a run: of the prepared code or, without any, the one in the package.

    Raises:
      FileNotFoundError, ConfigError: as `PreparedCode`.
    """
    return load() if data.code is None else PreparedCode(data.code).tokenizer


def open_text(data: DataConfig, tokenizer: Tokenizer) -> Corpus | CodeSplit:
    """The text of a run; raises what `Corpus` and `PreparedCode` raise."""
    if data.code is not None:
        return PreparedCode(data.code).split("train")
    return Corpus(data.haystack, tokenizer=tokenizer, split="train")


def make_dataset(
    data: DataConfig,
    stage: StageConfig,
    *,
    seed: int,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Endless batches of a stage, the same for the same seed, resumable at any batch.

    `iter()` of the result yields dicts of tokens and targets, int32 [B, T], and weights, f32
    [B, T], with T = stage.length and B = stage.batch_size / process_count. Weights are those of
    the targets: 1 for tokens of an answer (its end included) and for the source "text",
    `data.text_weight` for the others, 0 before the last `stage.loss_tokens`. The iterator's
    `get_state()` can be written as JSON; `set_state()` goes on exactly there.

    Args:
      data, stage: what the batches are made of.
      seed: decides everything random; each stage of a run should have its own.
      tokenizer: None means that of the prepared code or, without any, the one in the package.
      process_index, process_count: the rows of the global batch that this process makes.

    Raises:
      ValueError: a source of the mix is unknown, the length cannot hold its samples, the batch
        does not divide by the processes, or the haystack has no text.
      FileNotFoundError: the haystack cannot be read.
    """
    if stage.batch_size % process_count:
        raise ValueError(
            f"batch_size={stage.batch_size} must be a multiple of the {process_count} processes:"
            f" use {-(-stage.batch_size // process_count) * process_count}"
        )
    tokenizer = tokenizer or tokenizer_of(data)
    maker = BatchMaker(data, stage, seed, tokenizer, process_index, process_count)
    # Tokenised now, so that a bad folder is told before anything else starts.
    maker.corpus.all_tokens()
    dataset = grain.MapDataset.range(1 << 40).map(maker)
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return in_workers(batches, data.workers) if data.workers else batches
