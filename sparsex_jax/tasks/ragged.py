"""Rows of tokens of different lengths, laid end to end, and texts gathered from many of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
    """Rows of tokens.

    Attributes:
      tokens: int32 [sum of the lengths].
      begin: int64 [rows + 1], where each row begins; the last is the end of all.
    """

    tokens: np.ndarray
    begin: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "Ragged":
        """Rows, int [N] each."""
        begin = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=begin[1:])
        return cls(np.concatenate(rows).astype(np.int32), begin)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.begin)

    def around(self, before: np.ndarray, after: np.ndarray) -> "Ragged":
        """The same rows with tokens before and after each."""
        rows = np.split(self.tokens, self.begin[1:-1])
        return Ragged.of([np.concatenate((before, row, after)) for row in rows])


def gather(columns: Sequence[tuple[Ragged, np.ndarray]]) -> Ragged:
    """Rows made of a row of each table: row i is table[index[i]] of each column, end to end.

    Args:
      columns: (table, index), the index int [rows].
    """
    rows, width = len(columns[0][1]), len(columns)
    begin, size = (np.empty((rows, width), np.int32) for _ in range(2))
    offset = 0
    for number, (table, index) in enumerate(columns):
        begin[:, number] = table.begin[index] + offset
        size[:, number] = table.begin[index + 1] - table.begin[index]
        offset += len(table.tokens)
    ends = np.cumsum(size.ravel(), dtype=np.int64)
    # Where each token comes from: its place in the text, moved by what its piece is moved by.
    moved = begin.ravel() - (ends - size.ravel())
    place = np.repeat(moved, size.ravel())
    place += np.arange(len(place))
    sources = [table.tokens for table, _ in columns]
    source = sources[0] if width == 1 else np.concatenate(sources)  # a table may be large
    return Ragged(source[place], np.concatenate([[0], ends[width - 1 :: width]]))
