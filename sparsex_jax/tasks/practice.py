"""Texts to train on: what RULER's tasks hide and ask for, with many questions about each text.

A RULER prompt has one answer for all of its tokens. Here a text is followed by several questions,
each with its answer, in the words of RULER (`phrases.py`, `tracking.py`):

- "retrieval": needles in text or noise; a question asks for the value of a key, for all values of a
  key, or for those of several keys;
- "values": the same with several values of every key;
- "crowd": every line is a needle, their keys often of few different words, so that most look alike;
- "chains": chains of variables in noise or text.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from sparsex_jax.config import StageConfig
from sparsex_jax.tasks import tracking
from sparsex_jax.tasks.haystack import DEPTHS, insert, noise_text, take_text
from sparsex_jax.tasks.parts import Parts
from sparsex_jax.tasks.phrases import KINDS, Kind, Phrases, join_tokens
from sparsex_jax.tasks.tokenizer import Tokenizer

LEAST_LENGTH = 1024  # tokens into which every text fits

# Most of a text that needles may take, and that questions with answers may take.
_SHARE = 0.4
_PREFACE = 0.5
_ONE_QUESTION = 0.2
_SEVERAL_KEYS = 0.3  # of the questions
_SEVERAL_VALUES = 0.5  # of the keys, in half of the texts
_VALUES = (0, 0, 0.2, 0.2, 0.6)  # shares of 0, 1, 2, 3 and 4 of them: four, mostly, as in RULER
_MOST_ASKED = 4  # keys
_SIMILAR_KEYS = 0.5
_SIMILAR_VALUES = 0.25  # of the texts
_ONLY_NUMBERS = 0.5  # of the texts with several values of every key, as RULER has them
_UUID_KEYS = 0.25  # of crowds
_NOISE, _NOISE_AROUND_CHAINS = 0.15, 0.7
_GRID = 0.5  # of the texts: needles at RULER's depths, among them the very beginning and end
# Share of texts whose first question is about a needle in the last tokens, as in `data.py`.
_LATE, _LATE_TOKENS = 0.3, 256
_EARLY = 0.1  # of the crowds: about the very first line
_CHAIN_TOKENS = 320  # of a chain with its question and answer, at most

Text = tuple[np.ndarray, np.ndarray]  # tokens int32 [N], and which of them are answers, bool [N]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A key and its values, all of a kind, as numbers of `Parts`, int32 [n] and [values, n]."""

    kind: Kind
    key: np.ndarray
    values: np.ndarray

    def alike(self, other: "_Entry") -> bool:
        """Whether one question can ask for both: values of one kind, and one each."""
        return self.kind == other.kind and len(self.values) == len(other.values) == 1


class Practice:
    """Makes texts of exactly a number of tokens, at least `LEAST_LENGTH`.

    Args:
      stage: how many needles, and questions.
      tokenizer: encodes what is hidden and asked.
      stream: int [N], text as tokens.
    """

    def __init__(self, stage: StageConfig, tokenizer: Tokenizer, stream: np.ndarray):
        self.stage, self.tokenizer, self.stream = stage, tokenizer, stream
        self.phrases, self.parts = Phrases(tokenizer), Parts(tokenizer)

    def retrieval(self, count: int, rng: np.random.Generator) -> Text:
        """Needles in text or noise."""
        kinds = self._draw_kinds(rng)
        several = _SEVERAL_VALUES if rng.random() < 0.5 else 0
        more = rng.choice(len(_VALUES), len(kinds), p=_VALUES)
        return self._hidden(count, rng, kinds, np.where(rng.random(len(kinds)) < several, more, 1))

    def values(self, count: int, rng: np.random.Generator) -> Text:
        """Needles in text or noise, several values of every key."""
        kinds = self._draw_kinds(rng)
        if rng.random() < _ONLY_NUMBERS:
            kinds = ["numbers"] * len(kinds)
        return self._hidden(count, rng, kinds, rng.choice(len(_VALUES), len(kinds), p=_VALUES))

    def _hidden(
        self, count: int, rng: np.random.Generator, kinds: Sequence[Kind], values: np.ndarray
    ) -> Text:
        """A needle for each value, in text or noise; kinds and numbers of values are the keys'."""
        entries = self._draw_entries(rng, kinds, values)
        lines = [self._line(entry, value) for entry in entries for value in entry.values]
        last = np.cumsum([len(entry.values) for entry in entries])
        size = np.cumsum([self.parts.count(line) for line in lines])[last - 1]
        kept = max(1, int(np.sum(size <= _SHARE * count)))
        entries, lines = entries[:kept], self.parts.rows(lines[: last[kept - 1]])
        order = rng.permutation(kept)
        questions, _ = self._questions(rng, [entries[i] for i in order], count)
        preface = self._preface(rng, entries[0].kind)
        room = count - sum(map(len, [*lines, preface, questions[0]]))
        depths = rng.uniform(0, 100, len(lines))
        if rng.random() < _GRID:
            depths = rng.choice(np.asarray(DEPTHS, np.float64), len(lines))
        if rng.random() < _LATE:
            depths[last[order[0]] - 1] = 100 * max(0, 1 - rng.uniform(0, _LATE_TOKENS) / room)
        text = self._filler(rng, room, _NOISE)
        return _joined(preface, insert(text, lines, depths.tolist(), self.tokenizer)[0], questions)

    def crowd(self, count: int, rng: np.random.Generator) -> Text:
        """Lines that are all needles."""
        key_kind: Kind = "uuids" if rng.random() < _UUID_KEYS else "words"
        # Values as in RULER's crowded tasks, mostly.
        usual: Kind = "uuids" if key_kind == "uuids" else "numbers"
        kind: Kind = usual if rng.random() < 0.7 else KINDS[rng.integers(len(KINDS))]
        # Lines differ in length: more are drawn than will fit, and those asked for come first.
        most = int(count / self.parts.least(key_kind, kind)) + 1
        keys = self.parts.draw_keys(rng, key_kind, most, similar=rng.random() < _SIMILAR_KEYS)
        values = self.parts.draw(rng, kind, most)
        table = self.parts.table(
            f"One of the special magic {kind} for", keys, " is:", values, ".\n"
        )
        asking = range(min(most, self.stage.questions * _MOST_ASKED))
        entries = [_Entry(kind, keys[i], values[i : i + 1]) for i in asking]
        questions, asked = self._questions(rng, entries, count)
        preface = self._preface(rng, kind)
        room = count - len(questions[0]) - len(preface)
        sizes = self.parts.sizes(table)
        fitting = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
        assert fitting >= asked
        noise = noise_text(room - int(sizes[:fitting].sum()), self.tokenizer)
        context = self._lines(table[:fitting], sizes[:fitting], noise, rng)
        return _joined(preface, context, questions)

    def _lines(
        self, table: np.ndarray, sizes: np.ndarray, noise: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Noise, then lines in random order; the first of the table may be the very first, or late.

        A table of `Parts`, and the tokens of each of its lines.
        """
        others = 1 + rng.permutation(len(table) - 1)
        place, where = int(rng.integers(len(table))), rng.random()
        if where < _EARLY:
            place = 0
        elif where < _EARLY + _LATE:
            behind = np.cumsum(sizes[others[::-1]])
            place = len(others) - int(np.searchsorted(behind, rng.uniform(0, _LATE_TOKENS)))
        lines = self.parts.tokens(table[np.insert(others, place, 0)].ravel())
        before = int(sizes[0]) if where < _EARLY else 0
        return np.concatenate([lines[:before], noise, lines[before:]])

    def chains(self, count: int, rng: np.random.Generator) -> Text:
        """Chains of variables in noise or text."""
        most = min(self.stage.questions, count // _CHAIN_TOKENS)
        chains = tracking.draw_chains(rng, self.tokenizer, int(rng.integers(1, most + 1)))
        lines = [line for chain in chains for line in chain.statements]
        depths = [x for _ in chains for x in sorted(rng.uniform(0, 100, tracking.HOPS + 1))]
        questions = _asked(
            (tracking.ending(chains[i].value, self.tokenizer), chains[i].answer)
            for i in rng.permutation(len(chains))
        )
        opening = self.tokenizer.fixed(tracking.TEMPLATE)
        room = count - sum(map(len, [opening, *lines, questions[0]]))
        text = self._filler(rng, room, _NOISE_AROUND_CHAINS)
        return _joined(opening, insert(text, lines, depths, self.tokenizer)[0], questions)

    def _filler(self, rng: np.random.Generator, count: int, noise: float) -> np.ndarray:
        if rng.random() < noise:
            return noise_text(count, self.tokenizer, space=bool(rng.random() < 0.5))
        return take_text(self.stream, count, rng, self.tokenizer)

    def _preface(self, rng: np.random.Generator, kind: Kind) -> np.ndarray:
        if rng.random() >= _PREFACE:
            return join_tokens([])
        return self.phrases.preface(kind, single=bool(rng.random() < 0.5))

    def _draw_kinds(self, rng: np.random.Generator) -> list[Kind]:
        """Of the values of as many keys as the stage has it: one of all of them, in half."""
        count = int(rng.integers(*self.stage.needles, endpoint=True))
        kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=count)]
        return kinds[:1] * count if rng.random() < 0.5 else kinds

    def _draw_entries(
        self, rng: np.random.Generator, kinds: Sequence[Kind], values: np.ndarray
    ) -> list[_Entry]:
        """Different keys with values of these kinds, so many each."""
        similar = rng.random() < _SIMILAR_KEYS
        keys = self.parts.draw_keys(rng, "words", len(kinds), similar=similar)
        draw = self.parts.draw_alike if rng.random() < _SIMILAR_VALUES else self.parts.draw
        return [
            _Entry(kind, key, draw(rng, kind, int(number)))
            for kind, key, number in zip(kinds, keys, values, strict=True)
        ]

    def _line(self, entry: _Entry, value: np.ndarray) -> np.ndarray:
        """A needle, as numbers of parts."""
        return self.parts.row(
            f"One of the special magic {entry.kind} for", entry.key, " is:", value, ".\n"
        )

    def _questions(
        self, rng: np.random.Generator, entries: list[_Entry], count: int
    ) -> tuple[Text, int]:
        """Questions with their answers about entries, in order, and how many of them are asked for.

        A question asks for one key, or for some that have one value of the same kind each.
        """
        most = 1 if rng.random() < _ONE_QUESTION else self.stage.questions
        parts: list[np.ndarray] = []
        asked = size = 0
        while asked < len(entries) and len(parts) < 2 * most:
            group = entries[asked : asked + 1]
            if rng.random() < _SEVERAL_KEYS:
                several = entries[asked : asked + int(rng.integers(2, _MOST_ASKED, endpoint=True))]
                group += itertools.takewhile(group[0].alike, several[1:])
            question = self._question(group)
            size += sum(map(self.parts.count, question))
            if parts and size > _SHARE * count:
                break
            parts += question
            asked += len(group)
        rows = self.parts.rows(parts)
        return _asked(zip(rows[::2], rows[1::2], strict=True)), asked

    def _question(self, group: Sequence[_Entry]) -> tuple[np.ndarray, np.ndarray]:
        """A question up to the beginning of its answer, and the answer, as numbers of parts."""
        kind, values = group[0].kind, [value for entry in group for value in entry.values]
        verb, name = ("is", kind[:-1]) if len(values) == 1 else ("are", kind)
        asked = _listed([entry.key for entry in group])
        question = self.parts.row(
            f"What {verb}{'' if len(values) == 1 else ' all'} the special magic {name} for",
            *asked,
            f" mentioned in the provided text? The special magic {name} for",
            *asked,
            f" mentioned in the provided text {verb}",
        )
        return question, self.parts.row(*_listed(values), ".\n")


def _listed(items: Sequence[np.ndarray]) -> list[str | np.ndarray]:
    """Items as `phrases.join_list` writes them."""
    listed: list[str | np.ndarray] = [items[0]]
    for item in items[1:-1]:
        listed += [",", item]
    return [*listed, ",", " and", items[-1]] if len(items) > 1 else listed


def _asked(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Text:
    """Questions and answers one after the other, and which tokens are answers."""
    both = [x for part in parts for x in part]
    marks = np.repeat(np.arange(len(both)) % 2 == 1, [len(x) for x in both])
    return join_tokens(both), marks


def _joined(opening: np.ndarray, context: np.ndarray, questions: Text) -> Text:
    tokens = np.concatenate([opening, context, questions[0]])
    is_answer = np.zeros(len(tokens), bool)
    is_answer[len(tokens) - len(questions[1]) :] = questions[1]
    return tokens, is_answer
