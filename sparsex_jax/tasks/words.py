"""Keys and values of needles: adjective-noun pairs, 7-digit numbers and uuids."""

import functools
import pathlib
import uuid
import zlib
from typing import Literal

import numpy as np
import wonderwords

KeySplit = Literal["train", "held_out"]

# One pair of words in so many is kept for evaluation.
_HELD_OUT = 10


def _read(name: str) -> list[str]:
    path = pathlib.Path(wonderwords.__file__).parent / "assets" / name
    return path.read_text(encoding="utf-8").split("\n")


def _plain_words(name: str) -> tuple[str, ...]:
    # Only words of the letters a-z: a key is exactly "adjective-noun", one hyphen.
    impolite = {word.strip().lower() for word in _read("profanitylist.txt")}
    candidates = {word.strip() for word in _read(name)} - impolite
    return tuple(
        sorted(w for w in candidates if w.isascii() and w.isalpha() and w.islower() and len(w) > 1)
    )


ADJECTIVES = _plain_words("adjectivelist.txt")
NOUNS = _plain_words("nounlist.txt")


def split_of(adjective: str, noun: str) -> KeySplit:
    """To which split a pair of words belongs: training never sees the "held_out" ones."""
    held_out = zlib.crc32(f"{adjective}-{noun}".encode()) % _HELD_OUT == 0
    return "held_out" if held_out else "train"


def pair_number(adjective: str, noun: str) -> int:
    """The number of a pair among all."""
    return ADJECTIVES.index(adjective) * len(NOUNS) + NOUNS.index(noun)


@functools.cache
def _held_out() -> np.ndarray:
    """Whether each pair is held out, bool [adjectives * nouns].

    CRC-32 is linear: that of a text is that of its end xor what n zeros make of its beginning's.
    """
    heads = [zlib.crc32(f"{word}-".encode()) for word in ADJECTIVES]
    tails = np.array([zlib.crc32(word.encode()) for word in NOUNS], np.uint32)
    sizes = np.array([len(word) for word in NOUNS])
    checksums = np.empty((len(heads), len(tails)), np.uint32)
    for size in np.unique(sizes):
        zeros = bytes(int(size))
        moved = [zlib.crc32(zeros, head) ^ zlib.crc32(zeros) for head in heads]
        same = sizes == size
        checksums[:, same] = np.array(moved, np.uint32)[:, None] ^ tails[same]
    return checksums.ravel() % _HELD_OUT == 0


def is_of(numbers: np.ndarray, split: KeySplit) -> np.ndarray:
    """Whether pairs, by their numbers, are of a split."""
    return _held_out()[numbers] == (split == "held_out")


@functools.cache
def pairs(split: KeySplit) -> np.ndarray:
    """The numbers of all pairs of a split, int32, ascending."""
    return np.flatnonzero(_held_out() == (split == "held_out")).astype(np.int32)


def num_pairs(split: KeySplit) -> int:
    """How many pairs of words a split has."""
    return len(pairs(split))


def draw_pair(rng: np.random.Generator, split: KeySplit) -> tuple[str, str]:
    """A random adjective and noun of a split."""
    while True:
        adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
        noun = NOUNS[rng.integers(len(NOUNS))]
        if split_of(adjective, noun) == split:
            return adjective, noun


def draw_similar(
    rng: np.random.Generator, split: KeySplit, pair: tuple[str, str]
) -> tuple[str, str]:
    """A random pair of a split that has the adjective or the noun of `pair`."""
    keep_adjective = rng.random() < 0.5
    while True:
        adjective, noun = pair
        if keep_adjective:
            noun = NOUNS[rng.integers(len(NOUNS))]
        else:
            adjective = ADJECTIVES[rng.integers(len(ADJECTIVES))]
        if split_of(adjective, noun) == split:
            return adjective, noun


def draw_number(rng: np.random.Generator) -> str:
    """A random number of seven digits."""
    return str(rng.integers(10**6, 10**7))


def draw_uuid(rng: np.random.Generator) -> str:
    """A random uuid (version 4)."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
