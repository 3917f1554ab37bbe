"""Near-duplicates among files: MinHash over shingles of their words.

One permutation with bins (Li, Owen, Zhang 2012, arXiv:1208.1259), empty bins filled by rotation
(Shrivastava, Li 2014, arXiv:1406.4784), candidates by bands (Leskovec et al., Mining of Massive
Datasets, chapter 3).
"""

from collections.abc import Sequence

import numpy as np

SHINGLE = 5  # words: identifiers, numbers, and each other character that is no space
BINS = 128
_ROWS = 4  # of a band: at a similarity of 0.5, one of 32 bands agrees in 87 % of pairs
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse mod 2^64
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_EMPTY = np.uint64(2**64 - 1)
_IN_WORD = np.array([chr(i).isalnum() or i == 95 or i > 127 for i in range(256)])
_SPACE = np.array([chr(i).isspace() and i < 128 for i in range(256)])


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """base^0 .. base^(count - 1) mod 2^64."""
    factors = np.full(count, base)
    factors[:1] = 1
    return np.cumprod(factors)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Bits of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(text: bytes) -> np.ndarray:
    """A hash of each word, uint64."""
    data = np.frombuffer(text, np.uint8)
    word, space = _IN_WORD[data], _SPACE[data]
    begins = ~space
    begins[1:] &= ~(word[1:] & word[:-1])
    begin = np.flatnonzero(begins)
    after = np.ones(len(data), bool)  # whether the next byte is of no word that goes on
    after[:-1] = ~(word[1:] & word[:-1])
    end = np.flatnonzero(after & ~space) + 1
    weighted = (data.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(data))
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighted)])
    shift = _powers(_INVERSE, len(data) + 1)
    return _mixed((total[end] - total[begin]) * shift[begin])


def signature(text: bytes) -> np.ndarray:
    """uint64 [BINS]; the share of equal entries of two estimates the Jaccard similarity.

    Args:
      text: UTF-8. Spaces do not count.
    """
    words = _words(text)
    count = max(1, len(words) - SHINGLE + 1)
    words = np.concatenate([words, np.zeros(SHINGLE, np.uint64)])
    shingles = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        shingles = shingles * _BASE + words[place : place + count]
    values = np.sort(_mixed(shingles))
    width = np.uint64(2**64 // BINS)
    first = np.searchsorted(values, np.arange(BINS, dtype=np.uint64) * width)
    found = np.append(values, _EMPTY)[first]
    number = np.arange(BINS)
    full = found // width == number
    # An empty bin takes the value of the next full one, moved by how far that is.
    following = np.flatnonzero(full)
    following = np.append(following, following[0] + BINS)
    source = following[np.searchsorted(following, number)]
    distance = (source - number).astype(np.uint64)
    return found[source % BINS] % width + distance * width


def clusters(signatures: Sequence[np.ndarray], similarity: float) -> np.ndarray:
    """The number of the cluster of each file, int64 [N]: that of its first member.

    Files belong together if a chain of pairs links them whose estimated similarity is at least
    `similarity`; pairs are looked for where a band of four entries agrees.

    Args:
      signatures: of `signature`, N of them.
      similarity: of Jaccard, from 0 to 1.
    """
    table = np.stack(signatures)
    label = np.arange(len(table))
    for begin in range(0, BINS, _ROWS):
        band = np.zeros(len(table), np.uint64)
        for column in range(begin, begin + _ROWS):
            band = _mixed(band * _BASE + table[:, column])
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for members in np.split(order, edges):
            for place, first in enumerate(members[:-1], 1):
                others = members[place:]
                others = others[label[others] != label[first]]
                if not len(others):
                    continue
                alike = (table[others] == table[first]).mean(axis=1) >= similarity
                joined = np.append(label[others[alike]], label[first])
                label[np.isin(label, joined)] = joined.min()
    return label
