"""Texts to train on: stretches of source files, then questions about functions in them."""

from collections.abc import Iterator

import numpy as np

from sparsex_jax.config import StageConfig
from sparsex_jax.tasks.code.prepared import CodeSplit
from sparsex_jax.tasks.code.wording import BODY, Wording
from sparsex_jax.tasks.haystack import take_text
from sparsex_jax.tasks.phrases import join_tokens
from sparsex_jax.tasks.tokenizer import Tokenizer

# The sources of a mix, and what they ask for.
SOURCES = {"definitions": "name_to_definition", "descriptions": "description_to_function"}
LEAST_LENGTH = 1024  # tokens into which every text fits
_SHARE = 0.25  # of a text, that questions with answers take at most
_STRETCH = 256  # tokens of a stretch at least
_CALLS = 0.25  # of the stretches: around a call of a function that is asked for
_NEAR = 4096  # tokens of a stretch behind which its function lies at most
_LARGEST = 256  # tokens of a function's doc and beginning, so that every stretch holds one
_LOOK_BACK = 256  # tokens that a line end is looked for in
_ALIKE = 0.5  # of the texts: about functions that are like each other
_BEGINNING = 16  # tokens of a body by which they are
_APART = 0.1  # of the questions: behind text, as when a model is asked, not behind an answer
_HERE = 0.1  # of the questions: behind text that has the function, as none of the stretches does
_BEFORE = 512  # tokens of text before a question at most, so that a window may hold them


class CodePractice:
    """Makes texts of exactly a number of tokens, at least `LEAST_LENGTH`.

    A text is several stretches of the split, in random order, each around a function that is asked
    for, or around a call of one; others in them are asked for, too. As in the test, names that are
    asked for are of one definition of the stretches, and kernel-doc comments of functions that are
    described are removed. What is left of the length is filled with text of another random place,
    in front. Some of the questions are about a function of another place, just behind text that
    has it: a model that is always asked about what is far does not copy from its window.

    Half of the texts are about functions that are hard to tell apart: the names of all begin alike,
    or end alike, or their bodies begin alike. The others have few long stretches as often as many
    short ones.

    Args:
      stage: how many questions.
      split: what is read.
      tokenizer: of the split.
    """

    def __init__(self, stage: StageConfig, split: CodeSplit, tokenizer: Tokenizer):
        self.stage, self.split, self.tokenizer = stage, split, tokenizer
        self.wording = Wording(split, tokenizer)
        functions = split.functions
        self._begin = np.where(functions["doc"] >= 0, functions["doc"], functions["begin"])
        self._end = functions["body"] + BODY
        fits = self._end - self._begin <= _LARGEST
        fits &= self._end <= split.bounds[functions["file"] + 1]
        calls = split.calls[np.argsort(split.calls["name"], kind="stable")]
        self._call_positions = calls["position"].astype(np.int64)
        # Calls of name i are those from _first_call[i] on, before _first_call[i + 1].
        self._first_call = np.searchsorted(calls["name"], np.arange(len(split.names) + 1))
        called = np.diff(self._first_call) > 0
        self._suits = {
            source: fits & self.wording.askable(task) for source, task in SOURCES.items()
        }
        self._suits["definitions"] &= called[functions["name"]]
        self._askable = {source: np.flatnonzero(suits) for source, suits in self._suits.items()}
        ranks = list(self._ranks())
        self._alike: dict[str, list[np.ndarray]] = {}
        for source, found in self._askable.items():
            once = found[np.unique(functions["name"][found], return_index=True)[1]]
            self._alike[source] = [once[np.argsort(rank[once], kind="stable")] for rank in ranks]

    def _ranks(self) -> Iterator[np.ndarray]:
        """What functions are sorted by: those that are like each other become neighbours."""
        functions, tokens = self.split.functions, self.split.tokens
        yield functions["name"]
        backwards = np.argsort(np.array([name[::-1] for name in self.split.names]))
        yield np.argsort(backwards)[functions["name"]]
        body = np.minimum(functions["body"], len(tokens) - _BEGINNING)
        beginnings = tokens[body[:, None] + np.arange(_BEGINNING)].astype(">u2")
        yield np.unique(beginnings.view(f"V{2 * _BEGINNING}").ravel(), return_inverse=True)[1]

    def check(self, source: str) -> None:
        """Raises ValueError where no function can be asked for."""
        if not len(self._askable[source]):
            raise ValueError(
                f"mix: no function of {self.split.folder} suits the source {source!r}: leave it"
                " out, or prepare more files"
            )

    def __call__(
        self, source: str, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text: tokens int32 [count], and which of them are answers, bool [count]."""
        room = int(_SHARE * count)
        spans, chosen = self._draw(source, count - room, rng)
        task, functions = SOURCES[source], self.split.functions
        end = np.int32(self.tokenizer.end_id)
        inside = np.concatenate([self._inside(span) for span in spans])
        parts: list[np.ndarray] = []
        removed: list[tuple[int, int]] = []
        for i in self._order(source, inside, chosen, rng):
            here = self._here(source, inside, rng) if rng.random() < _HERE else None
            i, before = here or (i, None)
            words = self._words(source, i)
            if words is None:
                continue
            question = self.wording.question(task, words)
            answer = np.append(self.wording.answer(task, functions[i]), end)
            spare = room - sum(map(len, [*parts, question, answer]))
            if before is None:
                before = self._text_before(max(spare, 0), rng)
            if spare < len(before):
                break
            parts += [join_tokens([before, question]), answer]
            if here is None:
                removed += self._comment(source, i)
            if len(parts) == 2 * self.stage.questions:
                break
        context = [self._without(span, removed) for span in spans]
        filler = count - sum(map(len, [*context, *parts]))
        before = take_text(self.split.tokens, filler, rng, self.tokenizer)
        tokens = join_tokens([before, *context, *parts])
        is_answer = np.zeros(count, bool)
        if parts:
            marks = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
            is_answer[count - len(marks) :] = marks
        return tokens, is_answer

    def _draw(
        self, source: str, count: int, rng: np.random.Generator
    ) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Stretches of so many tokens together, or fewer, and functions in them to ask for first.

        Stretches that overlap are one.
        """
        most, alike = max(1, count // _STRETCH), rng.random() < _ALIKE
        share = rng.random()
        number = 1 + int((most - 1) * share**0.5) if alike else int(most**share)
        cuts = np.sort(rng.integers(0, count - number * _STRETCH + 1, number - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [count - number * _STRETCH]])) + _STRETCH
        calls = int(_CALLS * number)
        chosen = self._choose(source, number - calls, alike, rng)
        places = [(int(self._begin[i]), int(self._end[i])) for i in chosen]
        called = self._calls_of(rng.permutation(chosen)[:calls], rng)
        places += [(place, place + 1) for place in called]
        spans: list[tuple[int, int]] = []
        # Fewer places than sizes where functions are not called.
        for place, size in sorted(zip(places, sizes.tolist(), strict=False)):
            begin, end = self._around(*place, size, rng)
            if spans and begin <= spans[-1][1]:
                begin, end = spans[-1][0], max(end, spans.pop()[1])
            spans.append((begin, end))
        return [spans[i] for i in rng.permutation(len(spans))], chosen

    def _calls_of(self, functions: np.ndarray, rng: np.random.Generator) -> list[int]:
        """A place where each of the functions is called, of those that are."""
        names = self.split.functions["name"][functions]
        first, behind = self._first_call[names], self._first_call[names + 1]
        called = behind > first
        return self._call_positions[rng.integers(first[called], behind[called])].tolist()

    def _around(self, begin: int, end: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
        """A stretch of `size` tokens that has a span, from a line start where one is near."""
        spare = max(0, min(size - (end - begin), _NEAR, begin))
        first = begin - int(rng.integers(0, spare, endpoint=True))
        line_ends = np.flatnonzero(
            self.tokenizer.line_end[self.split.tokens[first : min(begin, first + _LOOK_BACK)]]
        )
        first = first + int(line_ends[0]) + 1 if len(line_ends) else begin
        first = max(0, min(first, len(self.split.tokens) - size))
        return first, first + size

    def _choose(
        self, source: str, number: int, alike: bool, rng: np.random.Generator
    ) -> np.ndarray:
        """Functions at random, or neighbours in an order of those that are alike."""
        if not alike:
            return rng.choice(self._askable[source], number)
        order = self._alike[source][rng.integers(len(self._alike[source]))]
        first = int(rng.integers(len(order)))
        return order[(first + np.arange(number)) % len(order)]

    def _order(
        self,
        source: str,
        inside: np.ndarray,
        chosen: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The functions to ask for: those chosen, then others, of names that are not ambiguous."""
        names = self.split.functions["name"]
        values, counts = np.unique(names[inside], return_counts=True)
        once = values[counts == 1]
        askable = np.unique(inside[self._suits[source][inside]])
        drawn = [*rng.permutation(np.unique(chosen)), *rng.permutation(askable)]
        order = list(dict.fromkeys(int(i) for i in drawn))
        kept = np.array(order, np.int64)
        return kept[np.isin(names[kept], once)]

    def _inside(self, span: tuple[int, int]) -> np.ndarray:
        """The functions, comments and beginnings of bodies included, that a span of tokens has."""
        first = np.searchsorted(self._begin, span[0])
        return np.arange(first, np.searchsorted(self._end, span[1], side="right"))

    def _here(
        self, source: str, inside: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, np.ndarray] | None:
        """A function, and text that has it; None where that has a name of the stretches, too."""
        names = self.split.functions["name"]
        i = int(rng.choice(self._askable[source]))
        size = int(rng.integers(_LARGEST, _BEFORE, endpoint=True))
        span = self._around(int(self._begin[i]), int(self._end[i]), size, rng)
        there = names[self._inside(span)]
        if np.isin(there, names[inside]).any() or np.sum(there == names[i]) > 1:
            return None
        return i, self._without(span, self._comment(source, i))

    def _comment(self, source: str, i: int) -> list[tuple[int, int]]:
        """Where the comment is that a question quotes; none where a name is asked for."""
        if source != "descriptions":
            return []
        functions = self.split.functions
        return [(int(functions["doc"][i]), int(functions["begin"][i]))]

    def _text_before(self, spare: int, rng: np.random.Generator) -> np.ndarray:
        """What stands between a question and the answer before it: nothing, mostly."""
        count = int(rng.integers(_BEFORE, endpoint=True)) if rng.random() < _APART else 0
        return take_text(self.split.tokens, min(count, spare), rng, self.tokenizer)

    def _words(self, source: str, i: int) -> str | None:
        function = self.split.functions[i]
        if source == "descriptions":
            return self.wording.description(function)
        return self.split.names[function["name"]]

    def _without(self, span: tuple[int, int], removed: list[tuple[int, int]]) -> np.ndarray:
        """The tokens of a span, without those of others, int32."""
        kept = np.ones(span[1] - span[0], bool)
        for begin, end in removed:
            kept[max(0, begin - span[0]) : max(0, end - span[0])] = False
        return self.split.tokens[span[0] : span[1]][kept].astype(np.int32)
