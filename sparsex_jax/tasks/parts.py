"""Numbered parts of sentences, of which NumPy puts many together at once.

Encoding needles one by one is slower than a small model learns from them. What is said again and
again is encoded once; a sentence is a row of numbers of such parts.
"""

import functools
from collections.abc import Sequence

import numpy as np

from sparsex_jax.tasks import words
from sparsex_jax.tasks.lines import encode_uuids
from sparsex_jax.tasks.phrases import Kind
from sparsex_jax.tasks.ragged import Ragged, gather
from sparsex_jax.tasks.tokenizer import Tokenizer

_UUIDS = 1 << 16  # different ones, encoded once
# Of a key's numbers, the share that begin alike, and how many digits are then the same, at most.
_ALIKE, _SAME_DIGITS = 0.6, 2


class Parts:
    """Fixed words, keys and values as tokens; a row int32 [n] of their numbers is a sentence.

    The tokens are those of `Phrases`, which the tokenizer's own splits allow. Keys are those of
    the split "train".

    Args:
      tokenizer: of the parts.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._table = _encoded(tokenizer)
        self._fixed: dict[str, int] = {}
        self._tokenizer = tokenizer
        self._words = 11  # after a space and ten digits: adjectives, a hyphen, nouns, uuids
        self._hyphen = self._words + len(words.ADJECTIVES)
        self._uuids = self._hyphen + 1 + len(words.NOUNS)

    def draw(self, rng: np.random.Generator, kind: Kind, count: int) -> np.ndarray:
        """Random keys or values of a kind, a space before each, int32 [count, n]."""
        if kind == "numbers":
            digits = rng.integers(0, 10, (count, 8))
            digits[:, 1] = rng.integers(1, 10, count)
            digits[:, 0] = -1
            return (digits + 1).astype(np.int32)
        if kind == "uuids":
            return self._uuids + rng.integers(0, _UUIDS, (count, 1), np.int32)
        return self._pairs(rng, count, None)

    def draw_alike(self, rng: np.random.Generator, kind: Kind, count: int) -> np.ndarray:
        """Values of one key as `draw` gives them, of which many begin alike."""
        if kind == "words":
            return self.draw_keys(rng, kind, count, similar=True)
        values = self.draw(rng, kind, count)
        if kind == "numbers":
            alike = rng.random(count) < _ALIKE
            digits = 1 + int(rng.integers(1, _SAME_DIGITS, endpoint=True))  # and the space
            values[alike, :digits] = values[:1, :digits]
        return values

    def draw_keys(
        self, rng: np.random.Generator, kind: Kind, count: int, similar: bool
    ) -> np.ndarray:
        """Keys as `draw` gives them, all different; if `similar`, of few different words."""
        few = 2 + int(np.sqrt(2 * count)) if similar and kind == "words" else None
        found = np.zeros((0, 3 if kind == "words" else 1), np.int32)
        while len(found) < count:
            missing = count - len(found)
            new = self._pairs(rng, missing, few) if few else self.draw(rng, kind, missing)
            found = np.concatenate([found, new])
            _, first = np.unique(found, axis=0, return_index=True)
            found = found[np.sort(first)]
        return found

    def _pairs(self, rng: np.random.Generator, count: int, few: int | None) -> np.ndarray:
        """Pairs of words, as rows; if `few`, of so many adjectives and nouns."""
        if few is None:
            found = rng.choice(words.pairs("train"), count)
        else:
            pools = [rng.integers(len(x), size=few) for x in (words.ADJECTIVES, words.NOUNS)]
            found = np.zeros(0, np.int64)
            while len(found) < count:
                adjective, noun = (pool[rng.integers(few, size=count)] for pool in pools)
                drawn = adjective * len(words.NOUNS) + noun
                found = np.concatenate([found, drawn[words.is_of(drawn, "train")]])
        adjective, noun = np.divmod(found[:count], len(words.NOUNS))
        columns = self._words + adjective, np.full(count, self._hyphen), self._hyphen + 1 + noun
        return np.stack(columns, axis=1).astype(np.int32)

    def least(self, key: Kind, value: Kind) -> int:
        """Tokens that a needle takes at least."""
        size = {"numbers": 8, "uuids": 1, "words": 3}
        size["uuids"] = int(self._sizes(self._uuids + np.arange(_UUIDS)).min())
        return size[key] + size[value] + 8

    def row(self, *items: str | np.ndarray) -> np.ndarray:
        """A sentence of fixed words and of parts, int32 [n]."""
        return np.concatenate([self._number(x) if isinstance(x, str) else x for x in items])

    def table(self, *items: str | np.ndarray) -> np.ndarray:
        """Sentences of fixed words, the same in all, and of rows of parts, int32 [count, n]."""
        count = max(len(x) for x in items if not isinstance(x, str))
        columns = [
            np.broadcast_to(self._number(x), (count, 1)) if isinstance(x, str) else x for x in items
        ]
        return np.concatenate(columns, axis=1)

    def _number(self, text: str) -> np.ndarray:
        if text not in self._fixed:
            table, tokens = self._table, self._tokenizer.fixed(text)
            self._fixed[text] = len(table.begin) - 1
            self._table = Ragged(
                np.concatenate([table.tokens, tokens]),
                np.append(table.begin, table.begin[-1] + len(tokens)),
            )
        return np.array([self._fixed[text]], np.int32)

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each part."""
        begin = self._table.begin
        return begin[numbers + 1] - begin[numbers]

    def sizes(self, table: np.ndarray) -> np.ndarray:
        """Tokens of each sentence of a table."""
        return self._sizes(table).sum(axis=1)

    def count(self, row: np.ndarray) -> int:
        """Tokens of a sentence."""
        return int(self._sizes(row).sum())

    def tokens(self, row: np.ndarray) -> np.ndarray:
        """Tokens of a sentence, int32."""
        return gather([(self._table, row)]).tokens

    def rows(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Tokens of each of several sentences."""
        if not rows:
            return []
        ends = np.cumsum([self.count(row) for row in rows])
        return np.split(self.tokens(np.concatenate(rows)), ends[:-1])


@functools.cache
def _encoded(tokenizer: Tokenizer) -> Ragged:
    """Tokens of all parts."""
    uuids = encode_uuids(np.random.default_rng(0).bytes(16 * _UUIDS), tokenizer)
    parts = [tokenizer.encode(" "), *tokenizer.encode("0123456789")[:, None]]
    parts += tokenizer.encode_batch([*(" " + word for word in words.ADJECTIVES), "-", *words.NOUNS])
    first = Ragged.of(parts)
    return Ragged(
        np.concatenate([first.tokens, uuids.tokens]),
        np.concatenate([first.begin, first.begin[-1] + uuids.begin[1:]]),
    )
