"""Haystacks in which every line is a needle, made fast: NumPy gathers tokens from tables.

The lines are those of `Phrases.needle`, token by token.
"""

import functools
import itertools
from typing import Protocol

import numpy as np

from sparsex_jax.tasks import words
from sparsex_jax.tasks.phrases import Kind, Phrases, join_tokens
from sparsex_jax.tasks.ragged import Ragged, gather
from sparsex_jax.tasks.tokenizer import Tokenizer

_LINES = 1 << 11  # made at a time, so that what they need stays in the processor's cache
_LETTERS = 5  # of the runs whose tokens are in a table; one run in 150 is longer
_HYPHEN, _SPACE, _HEX = 16, 17, "0123456789abcdef"


class _Lines(Protocol):
    def draw(self, rng: np.random.Generator, most: int) -> Ragged:
        """Up to `most` lines with keys that were not drawn before; none where there are no more."""


def needle_lines(
    count: int,
    key: Kind,
    value: Kind,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    split: words.KeySplit,
    taken: set[str],
) -> np.ndarray:
    """As many needles as fit into `count` tokens, int32 [at most count], all keys different.

    Args:
      count: tokens.
      key, value: kinds: "words" with "numbers", or "uuids" with "uuids".
      rng: source of keys and values.
      tokenizer: of the tokens.
      split: of the word pairs.
      taken: keys not to be used.

    Raises:
      ValueError: there are no lines of these kinds, or too few keys.
    """
    lines: _Lines
    if (key, value) == ("words", "numbers"):
        lines = _WordLines(rng, tokenizer, split, taken, count)
    elif (key, value) == ("uuids", "uuids"):
        lines = _UuidLines(tokenizer)
    else:
        raise ValueError(f"key={key!r} and value={value!r} make no lines: use words and numbers")
    parts: list[np.ndarray] = []
    while True:
        made = lines.draw(rng, min(_LINES, count // 32 + 2))
        if len(made.begin) == 1:
            raise ValueError(f"there are not enough keys for {count} more tokens: use fewer")
        fitting = int(np.searchsorted(made.begin, count, side="right")) - 1
        parts.append(made.tokens[: made.begin[fitting]])
        count -= len(parts[-1])
        if fitting < len(made.begin) - 1:
            return join_tokens(parts)


class _WordLines:
    """Keys are pairs of words, values numbers of seven digits."""

    def __init__(self, rng, tokenizer: Tokenizer, split: words.KeySplit, taken, count: int):
        self.tables = _word_tables(tokenizer)
        pairs = words.pairs(split)
        shortest = sum(int(table.sizes.min()) for table in self.tables)
        wanted = min(len(pairs), count // shortest + len(taken) + 1)
        chosen = pairs[rng.choice(len(pairs), wanted, replace=False)]
        used = [words.pair_number(*key.split("-")) for key in taken]
        self.keys = chosen[~np.isin(chosen, used)]

    def draw(self, rng: np.random.Generator, most: int) -> Ragged:
        keys, self.keys = self.keys[:most], self.keys[most:]
        adjective, noun = np.divmod(keys, len(words.NOUNS))
        high, low = np.divmod(rng.integers(10**6, 10**7, len(keys)), 1000)
        return gather(list(zip(self.tables, (adjective, noun, high, low), strict=True)))


@functools.cache
def _word_tables(tokenizer: Tokenizer) -> tuple[Ragged, Ragged, Ragged, Ragged]:
    """Parts of a line, by adjective, noun, first four digits and last three."""
    fixed, digits = tokenizer.fixed, tokenizer.encode("0123456789")

    def numbers(size: int) -> Ragged:
        rows = [digits[list(map(int, row))] for row in itertools.product("0123456789", repeat=size)]
        return Ragged.of(rows)

    adjectives = Ragged.of(tokenizer.encode_batch([f" {word}" for word in words.ADJECTIVES]))
    nouns = Ragged.of(tokenizer.encode_batch(list(words.NOUNS)))
    between = np.concatenate([fixed(" is:"), fixed(" ")])
    return (
        adjectives.around(fixed("One of the special magic numbers for"), join_tokens([])),
        nouns.around(fixed("-"), between),
        numbers(4),
        numbers(3).around(join_tokens([]), fixed(".\n")),
    )


class _UuidLines:
    """Keys and values are uuids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def draw(self, rng: np.random.Generator, most: int) -> Ragged:
        line = np.empty((most, 2 * _UUID + 3), np.uint8)
        line[:, [0, _UUID + 1, -1]] = _FRAME, _FRAME + 1, _FRAME + 2
        for begin in (1, _UUID + 2):
            _write_uuids(rng.bytes(16 * most), line[:, begin : begin + _UUID])
        return _encode(line, self.tokenizer)


def encode_uuids(data: bytes, tokenizer: Tokenizer) -> Ragged:
    """Tokens of random uuids (version 4) from 16 bytes each, with a space before."""
    characters = np.empty((len(data) // 16, _UUID), np.uint8)
    _write_uuids(data, characters)
    return _encode(characters, tokenizer)


def _write_uuids(data: bytes, characters: np.ndarray) -> None:
    """Writes a space and a uuid from each 16 bytes, as codes, into uint8 [uuids, _UUID]."""
    digits = np.frombuffer(data, np.uint8).reshape(-1, 16).copy()
    digits[:, 6] = digits[:, 6] & 0x0F | 0x40
    digits[:, 8] = digits[:, 8] & 0x3F | 0x80
    characters[:] = _HYPHEN
    characters[:, 0] = _SPACE
    places = np.flatnonzero([c == "0" for c in " 00000000-0000-0000-0000-000000000000"])
    characters[:, places[::2]] = digits >> 4
    characters[:, places[1::2]] = digits & 15


def _encode(characters: np.ndarray, tokenizer: Tokenizer) -> Ragged:
    """Tokens of rows of codes, uint8 [rows, columns]; the first column holds no letters.

    A digit or hyphen is a token, and a run of letters has its own, from a table or, where it is
    long, the tokenizer: that is how the tokenizer splits text.
    """
    flat = characters.ravel()
    letter = (flat >= 10) & (flat < 16)
    follows = np.concatenate([[False], letter[:-1]])
    starts = np.flatnonzero(~(letter & follows)).astype(np.int32)
    size = np.diff(starts, append=np.int32(len(flat)))  # 1, but for runs of letters
    code = flat[starts].astype(np.int32)
    runs = np.flatnonzero(letter[starts])
    first, run_size = starts[runs], size[runs]
    spaced = flat[first - 1] == _SPACE
    table = _table(tokenizer)
    number = flat[first].astype(np.int32) - 10
    for place in range(1, _LETTERS):
        longer = np.flatnonzero(run_size > place)
        digit = flat[first[longer] + place].astype(np.int32) - 10
        number[longer] = number[longer] * 6 + digit
    number += _FIRST_OF_SIZE[np.minimum(run_size, _LETTERS)]
    code[runs] = _RUNS + 2 * number + spaced
    code[runs[spaced] - 1] = _NOTHING  # the space is in the run
    long = np.flatnonzero(run_size > _LETTERS)
    if len(long):
        texts = [
            " " * int(space) + "".join(_HEX[character] for character in flat[begin : begin + count])
            for space, begin, count in zip(spaced[long], first[long], run_size[long], strict=True)
        ]
        code[runs[long]] = len(table.begin) - 1 + np.arange(len(long))
        more = Ragged.of(tokenizer.encode_batch(texts))
        table = Ragged(
            np.concatenate((table.tokens, more.tokens)),
            np.concatenate((table.begin, more.begin[1:] + table.begin[-1])),
        )
    found = gather([(table, code)])
    rows = np.searchsorted(starts, np.arange(0, len(flat), characters.shape[1]))
    return Ragged(found.tokens, np.append(found.begin[rows], found.begin[-1]))


# Rows of the table: hexadecimal digits, hyphen, space, nothing, the three parts of a line around
# key and value, then runs of letters.
_NOTHING, _FRAME, _RUNS = 18, 19, 22
_UUID = 37  # characters, the space before it among them
# How many runs are shorter than a size.
_FIRST_OF_SIZE = np.cumsum([0, 0, *(6**size for size in range(1, _LETTERS))], dtype=np.int32)


@functools.cache
def _table(tokenizer: Tokenizer) -> Ragged:
    """Tokens by code: a run's is `_RUNS` + 2 (its number) + (whether a space is before it)."""
    runs = [
        "".join(letters)
        for size in range(1, _LETTERS + 1)
        for letters in itertools.product("abcdef", repeat=size)
    ]
    encoded = tokenizer.encode_batch([space + run for run in runs for space in ("", " ")])
    single = tokenizer.encode_batch([*_HEX, "-", " ", ""])
    return Ragged.of([*single, *Phrases(tokenizer).frame("uuids"), *encoded])
