"""RULER's needle-in-a-haystack tasks and variable tracking (arXiv:2404.06654, section 3).

Differences from the published generator: a prompt has exactly the length asked for (the
haystack fills it to the token), the room for the answer fits this tokenizer, a needle in text
is a line of its own, and the text is any stream of tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sparsex_jax.tasks import tracking, words
from sparsex_jax.tasks.haystack import DEPTHS, insert, noise_text, take_text
from sparsex_jax.tasks.lines import needle_lines
from sparsex_jax.tasks.phrases import Kind, Phrases, draw_value, question_text
from sparsex_jax.tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
      haystack: what surrounds the needles: "text", one repeated line ("noise") or "needles".
      key, value: kinds of the keys and values.
      keys: keys hidden. values: values of each key. queries: keys asked for.
      answer_room: tokens kept for the answer, part of the length.
    """

    haystack: Literal["text", "noise", "needles"]
    key: Kind
    value: Kind
    keys: int = 1
    values: int = 1
    queries: int = 1
    answer_room: int = 16

    @property
    def single(self) -> bool:
        """Whether the answer is one value, which changes the wording."""
        return self.values * self.queries == 1


VT = "vt"

NEEDLE_TASKS = {
    "single_1": TaskSpec("noise", "words", "numbers"),
    "single_2": TaskSpec("text", "words", "numbers"),
    "single_3": TaskSpec("text", "words", "uuids", answer_room=48),
    "multikey_1": TaskSpec("text", "words", "numbers", keys=4),
    "multikey_2": TaskSpec("needles", "words", "numbers"),
    "multikey_3": TaskSpec("needles", "uuids", "uuids", answer_room=48),
    "multivalue": TaskSpec("text", "words", "numbers", values=4, answer_room=48),
    "multiquery": TaskSpec("text", "words", "numbers", keys=4, queries=4, answer_room=48),
}
TASKS: dict[str, TaskSpec] = {
    **NEEDLE_TASKS,
    VT: TaskSpec("noise", "words", "numbers", values=tracking.HOPS + 1, answer_room=48),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A question about a long text.

    Attributes:
      task: name in `TASKS`.
      prompt: int32 [length - answer_room].
      answer: int32, what a right answer generates, up to the end of its line.
      references: strings that a right answer contains.
      question: for people to read.
      depth: of the (first) needle asked for, in per cent of the haystack.
      answer_room: tokens kept for the answer.
      lines: where the line that hides each reference begins and ends in the prompt.
      sources: int64 [len(answer)], the place in the prompt that each token of the answer is to be
        copied from; -1 for punctuation.
    """

    task: str
    prompt: np.ndarray
    answer: np.ndarray
    references: tuple[str, ...]
    question: str
    depth: float
    answer_room: int
    lines: tuple[tuple[int, int], ...]
    sources: np.ndarray


@functools.cache
def longest_value(tokenizer: Tokenizer, kind: Kind) -> int:
    """Most tokens that a key or value of a kind can take."""
    if kind == "numbers":
        return 8
    if kind == "uuids":
        return 37
    return sum(max(sizes) for sizes in _word_sizes(tokenizer))


def _word_sizes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of each adjective and of each noun of a key."""
    adjectives = tokenizer.encode_batch([" " + word for word in words.ADJECTIVES])
    nouns = tokenizer.encode_batch(["-" + word for word in words.NOUNS])
    return list(map(len, adjectives)), list(map(len, nouns))


def _frame_size(value: Kind, phrases: Phrases) -> int:
    """Tokens of a needle without its key and value."""
    return len(phrases.needle(value, "a-a", "0")) - len(phrases.value("a-a")) - 2


@functools.cache
def smallest_length(task: str, tokenizer: Tokenizer) -> int:
    """Least length, in tokens, into which every sample of a task fits."""
    spec = _spec(task)
    if task == VT:
        return tracking.smallest_prompt(tokenizer) + spec.answer_room
    phrases = Phrases(tokenizer)
    key = longest_value(tokenizer, spec.key)
    value = longest_value(tokenizer, spec.value)
    frame = _frame_size(spec.value, phrases)
    asked = ["a-a"] * spec.queries
    empty = len(phrases.value("a-a"))
    question = len(phrases.question(spec.value, asked, spec.single))
    question += 2 * spec.queries * (key - empty)
    preface = len(phrases.preface(spec.value, spec.single))
    needles = spec.keys * spec.values * (frame + key + value)
    return preface + needles + question + spec.answer_room


@functools.cache
def largest_length(task: str, tokenizer: Tokenizer, split: words.KeySplit) -> int | None:
    """Most tokens of a sample of a task, None without a bound.

    A haystack of needles needs ever more pairs of words as keys, all different, of which a split
    has so many. They are drawn at random, so the last few would take very long: nine tenths count.
    """
    spec = _spec(task)
    if spec.haystack != "needles" or spec.key != "words":
        return None
    key = sum(sum(sizes) / len(sizes) for sizes in _word_sizes(tokenizer))
    value = longest_value(tokenizer, spec.value)
    line = _frame_size(spec.value, Phrases(tokenizer)) + key + value
    return int(0.9 * words.num_pairs(split) * line)


def _spec(task: str) -> TaskSpec:
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known: use one of {', '.join(TASKS)}")
    return TASKS[task]


def check_length(
    task: str, length: int, tokenizer: Tokenizer, split: words.KeySplit = "held_out"
) -> None:
    """Raises ValueError if no sample of the task has `length` tokens, with keys of the split."""
    least = smallest_length(task, tokenizer)
    if length < least:
        raise ValueError(
            f"length={length} cannot hold the needles and the question of task={task!r}:"
            f" use at least {least}"
        )
    largest = largest_length(task, tokenizer, split)
    if largest is not None and length > largest:
        raise ValueError(
            f"length={length} needs more different keys than task={task!r} has: use at most"
            f" {largest}, or another task"
        )


def make_sample(
    task: str,
    length: int,
    *,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: np.ndarray,
    depth: float | None = None,
    split: words.KeySplit = "held_out",
    answer_room: int | None = None,
) -> Sample:
    """Makes a sample; everything random comes from `rng`.

    Args:
      task: name in `TASKS`.
      length: tokens of prompt and answer together.
      rng: source of keys, values, depths and the place in the text.
      tokenizer: encodes needles and questions.
      haystack: int [N], text as tokens; a random part is taken, repeated where it is short.
      depth: of the (first) needle asked for, per cent; None draws from `DEPTHS`.
      split: of the word pairs. Training takes "train", so evaluation's keys are new.
      answer_room: tokens kept for the answer; None takes the task's, 0 exactly the answer's.

    Raises:
      ValueError: the task is unknown, the length cannot hold needles and question, or there are
        not enough keys to fill it.
    """
    spec = _spec(task)
    check_length(task, length, tokenizer, split)
    if depth is not None and not 0 <= depth <= 100:
        raise ValueError(f"depth={depth} must lie in [0, 100] per cent: use 50 for the middle")
    if answer_room is None:
        answer_room = spec.answer_room
    if task == VT:
        chain = tracking.Chain.draw(rng, tokenizer)
        room = answer_room or len(chain.answer)
        prompt, depth, positions = tracking.make_prompt(
            chain, length - room, rng, tokenizer, depth
        )  # fmt: skip
        return Sample(
            task, prompt, chain.answer, chain.variables, tracking.question(chain), depth, room,
            _spans(positions, chain.statements), tracking.sources(chain, positions, tokenizer),
        )  # fmt: skip
    return _needle_sample(task, spec, length, rng, tokenizer, haystack, depth, split, answer_room)


def _needle_sample(
    task: str,
    spec: TaskSpec,
    length: int,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: np.ndarray,
    depth: float | None,
    split: words.KeySplit,
    answer_room: int,
) -> Sample:
    phrases = Phrases(tokenizer)
    keys: list[str] = []
    while len(keys) < spec.keys:
        key = draw_value(rng, spec.key, split)
        if key not in keys:
            keys.append(key)
    values = [
        [draw_value(rng, spec.value, split) for _ in range(spec.values)] for _ in range(spec.keys)
    ]
    asked = [int(index) for index in rng.permutation(spec.keys)[: spec.queries]]
    queries = [keys[index] for index in asked]
    references = tuple(value for index in asked for value in values[index])
    answer = phrases.answer(references)
    room = answer_room or len(answer)

    # The needles asked for come first, so that `depth` is that of the first of them.
    order = asked + [index for index in range(spec.keys) if index not in asked]
    needles = [
        phrases.needle(spec.value, keys[index], value) for index in order for value in values[index]
    ]
    depths = _draw_depths(rng, len(needles), depth)
    preface = phrases.preface(spec.value, spec.single)
    question = phrases.question(spec.value, queries, spec.single)
    count = length - room - len(preface) - len(question) - sum(map(len, needles))
    if spec.haystack == "text":
        text = take_text(haystack, count, rng, tokenizer)
    elif spec.haystack == "noise":
        text = noise_text(count, tokenizer)
    else:
        lines = needle_lines(count, spec.key, spec.value, rng, tokenizer, split, set(keys))
        # What is left is less than a needle: noise, since half a needle would be a wrong one.
        text = np.concatenate((noise_text(count - len(lines), tokenizer), lines))
    context, positions = insert(text, needles, depths, tokenizer)
    prompt = np.concatenate([preface, context, question])
    readable = question_text(spec.value, queries, spec.single)
    places = [len(preface) + position for position in positions[: len(references)]]
    spans = _spans(places, needles[: len(references)])
    sources = _sources(references, [end for _, end in spans], phrases)
    return Sample(task, prompt, answer, references, readable, depths[0], room, spans, sources)


def _spans(begins: Sequence[int], lines: Sequence[np.ndarray]) -> tuple[tuple[int, int], ...]:
    """Begin and end of lines that begin at these places."""
    return tuple((begin, begin + len(line)) for begin, line in zip(begins, lines, strict=True))


def _sources(references: Sequence[str], ends: Sequence[int], phrases: Phrases) -> np.ndarray:
    """`Sample.sources` for values whose lines end at these places of the prompt."""
    closing = len(phrases.tokenizer.fixed(".\n"))  # of the answer, and of each line
    parts = []
    for number, (value, end) in enumerate(zip(references, ends, strict=True)):
        size = len(phrases.value(value))
        parts.append(np.full(len(phrases.before(number, len(references))), -1))
        parts.append(np.arange(size) + end - closing - size)
    return np.concatenate([*parts, np.full(closing, -1)])


def _draw_depths(rng: np.random.Generator, count: int, depth: float | None) -> list[float]:
    depths = [float(item) for item in rng.choice(DEPTHS, count, replace=False)]
    if depth is not None:
        depths[0] = float(depth)
    return depths


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenNeedle:
    """A needle in a text that holds several.

    Attributes:
      kind: "numbers" or "uuids". key: what it is asked by. value: what is to be answered.
      depth: where it was asked to be, per cent. position: index of its first token.
      prompt: int32, the question and the beginning of its answer, to follow the context.
      question: for people to read.
    """

    kind: Kind
    key: str
    value: str
    depth: float
    position: int
    prompt: np.ndarray
    question: str


@dataclasses.dataclass(frozen=True, eq=False)
class NeedleContext:
    """One text with several needles: one prefill, many questions.

    Attributes:
      tokens: int32 [length - room].
      needles: in the order of the depths.
      answer_room: tokens to generate at most for an answer.
    """

    tokens: np.ndarray
    needles: tuple[HiddenNeedle, ...]
    answer_room: int


def make_haystack_with_needles(
    length: int,
    depths: Sequence[float],
    *,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    haystack: np.ndarray,
    split: words.KeySplit = "held_out",
) -> NeedleContext:
    """Hides one needle at each depth, numbers and uuids in turn, all keys different.

    Args:
      length: tokens of the context, the longest question and its answer together.
      depths: per cent of the haystack, in any order.
      rng, tokenizer, haystack, split: as for `make_sample`.

    Raises:
      ValueError: there is no depth, or the length cannot hold needles and question.
    """
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise ValueError(f"depths={list(depths)} must be numbers in [0, 100]: use [50], say")
    phrases = Phrases(tokenizer)
    room = TASKS["single_3"].answer_room
    kinds: list[Kind] = ["uuids" if index % 2 else "numbers" for index in range(len(depths))]
    pairs: set[tuple[str, str]] = set()
    keys: list[str] = []
    while len(keys) < len(kinds):
        pair = words.draw_pair(rng, split)
        if pair not in pairs:
            pairs.add(pair)
            keys.append("-".join(pair))
    values = [draw_value(rng, kind, split) for kind in kinds]
    lines = [phrases.needle(*item) for item in zip(kinds, keys, values, strict=True)]
    prompts = [phrases.question(kinds[i], [keys[i]], single=True) for i in range(len(keys))]
    fixed = sum(map(len, lines)) + max(map(len, prompts)) + room
    if length < fixed:
        raise ValueError(
            f"length={length} cannot hold {len(depths)} needles and a question: use at least"
            f" {fixed}, or fewer depths"
        )
    text = take_text(haystack, length - fixed, rng, tokenizer)
    context, positions = insert(text, lines, depths, tokenizer)
    needles = tuple(
        HiddenNeedle(
            kinds[i], keys[i], values[i], float(depths[i]), positions[i], prompts[i],
            question_text(kinds[i], [keys[i]], single=True),
        )
        for i in range(len(keys))
    )  # fmt: skip
    return NeedleContext(context, needles, room)


def score(text: str, references: Sequence[str]) -> float:
    """Share of the references that a text contains, whatever the case (RULER's measure)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)
