"""Scoring of needle tasks by free generation, for any model that can generate."""

import dataclasses
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np

from sparsex_jax.tasks.needle import Sample, make_sample, score
from sparsex_jax.tasks.tokenizer import Tokenizer

# Why an answer is wrong, as `sparsex_jax.tasks.diagnosis` finds out.
Diagnosis = Literal["not_selected", "not_attended", "not_copied"]
DIAGNOSES: tuple[Diagnosis, ...] = get_args(Diagnosis)

_Z = 1.959964  # of a 95 % interval

# (prompts int32 [B, P], max_new_tokens) -> B sequences of new tokens, each at most that long.
GenerateFn = Callable[[np.ndarray, int], Iterable[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was asked and answered in one sample.

    Attributes:
      index: number of the sample. depth: per cent. question: for people to read.
      references: strings that a right answer contains. text: what was generated.
      score: share of the references found. seconds: of the sample's batch, divided evenly.
      diagnosis: why it is wrong, where that was asked for.
      provenance: whether what was attended to most is what the answer is taken from, likewise.
    """

    index: int
    depth: float
    question: str
    references: tuple[str, ...]
    text: str
    score: float
    seconds: float
    diagnosis: str | None = None
    provenance: bool | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A cell of a results table: its row (DESIGN.md, section 5) and what it rests on."""

    row: dict[str, object]
    answers: tuple[Answer, ...]


def wilson_interval(correct: float, samples: int, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a share (1927); z = 1.96 gives 95 %.

    Raises:
      ValueError: `samples` is not positive or `correct` not within [0, samples].
    """
    if samples < 1 or not 0 <= correct <= samples:
        raise ValueError(
            f"correct={correct} of samples={samples} is no share: samples must be positive and"
            " correct within [0, samples]"
        )
    share = correct / samples
    factor = 1 / (1 + z * z / samples)
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    low = 0.0 if correct == 0 else factor * (centre - spread)
    high = 1.0 if correct == samples else factor * (centre + spread)
    return low, high


def mean_interval(values: np.ndarray, overlap: float = 1.0) -> tuple[float, float, float]:
    """A mean of values, two or more, and its 95 % interval by the normal law.

    Values are taken for independent but for `overlap`, the number of them that share what they are
    measured on: so many count as one.
    """
    mean = float(np.mean(values))
    spread = _Z * float(np.std(values, ddof=1)) * math.sqrt(overlap / len(values))
    return mean, mean - spread, mean + spread


def decode_answer(
    generated: Iterable[int], tokenizer: Tokenizer, stops: Sequence[int] | None = None
) -> str:
    """Text of generated tokens up to the first of `stops`, without spaces around.

    By default these are all that end an answer.
    """
    kept: list[int] = []
    for token in generated:
        if int(token) in (tokenizer.stop_ids if stops is None else stops):
            break
        kept.append(int(token))
    return tokenizer.decode(kept).strip()


def make_row(
    system: str,
    task: str,
    tokens: int,
    scores: Sequence[float],
    status: str = "measured",
    *,
    seconds: float | None = None,
    note: str | None = None,
) -> dict[str, object]:
    """A row of accuracy; without scores its numbers are None.

    `correct` is the sum of the scores, which is fractional where a task has several answers.

    Args:
      system, task, tokens: what was measured.
      scores: of the samples.
      status: "out_of_memory" or "too_slow" where there are no scores.
      seconds: of a sample.
      note: the figure that shows the status, in words.
    """
    row: dict[str, object] = {
        "system": system, "task": task, "tokens": tokens, "samples": len(scores),
        "correct": None, "accuracy": None, "low": None, "high": None, "seconds": seconds,
        "status": status, "note": note,
    }  # fmt: skip
    if scores:
        correct = float(sum(scores))
        low, high = wilson_interval(correct, len(scores))
        row.update(
            correct=int(correct) if correct.is_integer() else correct,
            accuracy=correct / len(scores),
            low=low,
            high=high,
        )
    return row


def evaluate(
    generate_fn: GenerateFn,
    task: str,
    length: int,
    samples: int,
    *,
    tokenizer: Tokenizer,
    haystack: np.ndarray,
    batch_size: int = 1,
    seed: int = 0,
    depths: Sequence[float] | None = None,
    system: str = "sparsex",
    on_batch: Callable[[Sequence[Answer]], None] | None = None,
    diagnose: Callable[[Sample, Sequence[int]], str] | None = None,
    answered: Sequence[Answer] = (),
) -> Evaluation:
    """Asks a model questions of a task and scores what it generates.

    Sample i is decided by (seed, task, length, i) alone, whatever the batch size. While the model
    reads a batch, another thread makes the next.

    Args:
      generate_fn: greedy generation from prompts int32 [B, P], at most `max_new_tokens` each.
        B is always `batch_size` and P the same in all calls.
      task, length, haystack: as for `make_sample`.
      samples: questions asked.
      batch_size: prompts in a call.
      depths: per cent, taken in turn; None draws each from RULER's grid.
      system: name in the row.
      on_batch: called with the answers of each batch, in order (for progress).
      diagnose: says of a sample and what was generated why it is wrong; asked for each that is not
        wholly right. The row then counts what it says, by the names in `DIAGNOSES`.
      answered: the first answers, given before; only the others are asked for.

    Raises:
      ValueError: as `make_sample`, or `samples` or `batch_size` is not positive.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive: use at least 1")

    def make(index: int) -> Sample:
        rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, index])
        depth = depths[index % len(depths)] if depths else None
        return make_sample(
            task, length, rng=rng, tokenizer=tokenizer, haystack=haystack, depth=depth
        )

    def make_batch(first: int) -> list[Sample]:
        return [make(index) for index in range(first, min(first + batch_size, samples))]

    answers = list(answered[:samples])
    starts = range(len(answers), samples, batch_size)
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(make_batch, starts[0]) if starts else None
        for first in starts:
            assert following is not None
            batch = following.result()
            if first + batch_size < samples:
                following = maker.submit(make_batch, first + batch_size)
            found = list(_ask(generate_fn, batch, first, batch_size, tokenizer, diagnose))
            answers += found
            if on_batch is not None:
                on_batch(found)
    return Evaluation(
        summarize(system, task, length, answers, diagnosed=diagnose is not None), tuple(answers)
    )


def summarize(
    system: str, task: str, tokens: int, answers: Sequence[Answer], *, diagnosed: bool
) -> dict[str, object]:
    """The row of some answers, at least one; `diagnosed` adds why they are wrong."""
    row = make_row(
        system, task, tokens, [answer.score for answer in answers],
        seconds=statistics.median(answer.seconds for answer in answers),
    )  # fmt: skip
    if diagnosed:
        found = [answer.diagnosis for answer in answers]
        row.update((name, found.count(name)) for name in DIAGNOSES)
    return row


def _ask(
    generate_fn: GenerateFn,
    batch: Sequence[Sample],
    first: int,
    batch_size: int,
    tokenizer: Tokenizer,
    diagnose: Callable[[Sample, Sequence[int]], str] | None,
) -> Iterator[Answer]:
    """The answers to a batch of samples, which are numbered from `first`."""
    # A last batch that is not full repeats its last prompt: one shape, one compilation.
    prompts = [sample.prompt for sample in batch]
    prompts += [prompts[-1]] * (batch_size - len(prompts))
    began = time.perf_counter()
    outputs = list(generate_fn(np.stack(prompts), batch[0].answer_room))
    seconds = (time.perf_counter() - began) / len(batch)
    for offset, (sample, output) in enumerate(zip(batch, outputs, strict=False)):
        text = decode_answer(output, tokenizer)
        share = score(text, sample.references)
        diagnosis = None if diagnose is None or share == 1 else diagnose(sample, output)
        yield Answer(
            first + offset, sample.depth, sample.question, sample.references, text, share, seconds,
            diagnosis,
        )  # fmt: skip
