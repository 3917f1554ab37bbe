"""Retrieval over chunks with BM25 (Robertson, Zaragoza 2009), which people use today.

In the form that is best for code: chunks end at line ends and hold no two files; identifiers are
terms, whole and in their parts (`snake_case` and `camelCase`), in lower case.
"""

import functools
import logging
import re
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.tasks import Tokenizer

CHUNK = 512  # tokens, at most
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|\d\w*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def terms(text: str, parts: bool = True) -> list[str]:
    """The terms of a text: identifiers and, unless they are whole already, their parts."""
    found: list[str] = []
    for identifier in _IDENTIFIER.findall(text):
        found += _terms(identifier) if parts else [identifier.lower()]
    return found


@functools.lru_cache(1 << 20)
def _terms(identifier: str) -> tuple[str, ...]:
    parts = [part.lower() for part in _PART.findall(identifier)]
    whole = identifier.lower()
    return (whole,) if parts in ([], [whole]) else (whole, *parts)


def cut_chunks(tokens: np.ndarray, bounds: Iterable[int], tokenizer: "Tokenizer") -> np.ndarray:
    """Where chunks begin, and the last ends, int64 [chunks + 1].

    A chunk ends at the last line end within CHUNK tokens; a longer line is cut.

    Args:
      tokens: int [N].
      bounds: where files begin, and N.
      tokenizer: of the tokens.
    """
    ends = np.flatnonzero(tokenizer.line_end[tokens]) + 1
    bounds = list(bounds)
    cuts = [0]
    for file_end in bounds[1:]:
        while file_end - cuts[-1] > CHUNK:
            place = int(np.searchsorted(ends, cuts[-1] + CHUNK, side="right")) - 1
            end = int(ends[place]) if place >= 0 else 0
            cuts.append(end if end > cuts[-1] else cuts[-1] + CHUNK)
        if file_end > cuts[-1]:
            cuts.append(int(file_end))
    return np.array(cuts, np.int64)


def find_bm25s() -> ModuleType:
    """The package bm25s.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError(
            "bm25s is not installed: use pip install '.[code]', or --systems model"
        ) from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # else it tells of every index
    return bm25s


class ChunkRetriever:
    """Ranks the chunks of a context by BM25 (Lucene's, k1 = 1.5, b = 0.75).

    Args:
      tokens, bounds, tokenizer: as for `cut_chunks`.

    Raises:
      ConfigError: bm25s is not installed.
    """

    def __init__(self, tokens: np.ndarray, bounds: Iterable[int], tokenizer: "Tokenizer"):
        self.cuts = cut_chunks(tokens, bounds, tokenizer)
        texts = tokenizer.decode_batch(np.split(tokens, self.cuts[1:-1]))
        self._index = find_bm25s().BM25(method="lucene")
        self._index.index([terms(text) for text in texts], show_progress=False)

    def _scores(self, query: list[str]) -> np.ndarray:
        return np.asarray(self._index.get_scores(query))

    def best(self, query: list[str], count: int) -> list[tuple[int, int]]:
        """Spans of tokens of the first chunks, the best first; fewer where few have a term.

        Args:
          query: terms.
          count: chunks at most.
        """
        scores = self._scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        return [(int(self.cuts[i]), int(self.cuts[i + 1])) for i in order if scores[i] > 0]

    def rank(self, query: list[str], position: int) -> int | None:
        """The rank of the chunk that has a token, from 1; None where no term of the query is in it.

        Of chunks with the same score the earlier one comes first.

        Args:
          query: terms.
          position: of the token.
        """
        scores = self._scores(query)
        chunk = int(np.searchsorted(self.cuts, position, side="right")) - 1
        own = scores[chunk]
        if own <= 0:
            return None
        return 1 + int((scores > own).sum()) + int((scores[:chunk] == own).sum())
