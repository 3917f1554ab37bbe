"""Where the tokens of a cache come from: files and lines."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsex_jax.cache.store import CacheError
from sparsex_jax.errors import reading, writing

_FILES = "sources.json"
_LINES = "lines.npy"
_NEAR = 3  # lines: what lies closer together is one place
_LEAST = 0.05  # of what the line with the most attention gets: with less, a line does not count


class Place(NamedTuple):
    """Neighbouring lines of a file.

    Attributes:
      path: of the file.
      first: line, from 1.
      last: line.
      share: of all attention to the context that they get, 0 to 1.
    """

    path: str
    first: int
    last: int
    share: float

    def __str__(self) -> str:
        lines = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.path}:{lines} ({self.share:.0%})"


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that a context was made of, one after the other.

    Attributes:
      paths: of the files.
      begins: number of the first token of each, int64 [files].
      lines: of each token of the context, within its file, from 1, int32 [N].
    """

    paths: Sequence[str]
    begins: np.ndarray
    lines: np.ndarray

    @classmethod
    def of(cls, files: Sequence[tuple[str, np.ndarray]], newlines: np.ndarray) -> "Sources":
        """Of files' paths and tokens; `newlines` says how many each token of a vocabulary has."""
        lines = []
        for _, tokens in files:
            ends = np.cumsum(newlines[tokens])
            lines.append(1 + np.append(0, ends[:-1]))
        begins = np.cumsum([0, *(len(tokens) for _, tokens in files[:-1])])
        return cls([path for path, _ in files], begins, np.concatenate(lines).astype(np.int32))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes them, atomically; raises CacheError."""
        folder = Path(folder)
        way_out = "free some space and run the same command again"
        with writing(CacheError, str(folder), way_out):
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f".{_LINES}.tmp"
            with fresh.open("wb") as file:
                np.save(file, self.lines)
            fresh.replace(folder / _LINES)
            described = {"paths": list(self.paths), "begins": self.begins.tolist()}
            fresh = folder / f".{_FILES}.tmp"
            fresh.write_text(json.dumps(described, indent=1) + "\n")
            fresh.replace(folder / _FILES)

    @staticmethod
    def are_in(folder: str | os.PathLike) -> bool:
        """Whether `save` has written into a folder."""
        return (Path(folder) / _FILES).exists()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Sources":
        """Reads what `save` wrote; raises CacheError."""
        folder = Path(folder)
        if not cls.are_in(folder):
            raise CacheError(
                f"{folder} does not say what files it was made of: use --sources 0, or run the same"
                " `sparsex ingest` once more"
            )
        with reading(CacheError, folder, "run the same `sparsex ingest` once more"):
            described = json.loads((folder / _FILES).read_text())
            begins = np.array(described["begins"], np.int64)
            lines = np.load(folder / _LINES, mmap_mode="r", allow_pickle=False)
            return cls(described["paths"], begins, lines)

    def places(self, attention: np.ndarray, count: int) -> list[Place]:
        """The places that get the most attention, in this order.

        Args:
          attention: of each token of the context, or of the first ones, f32 [n].
          count: most places.
        """
        tokens = np.flatnonzero(attention)
        if not len(tokens):
            return []
        file = np.searchsorted(self.begins, tokens, side="right") - 1
        line = self.lines[tokens].astype(np.int64)
        file, line, weight = _sums(attention[tokens], file, line, near=0)[:3]
        total, kept = weight.sum(), weight >= _LEAST * weight.max()
        file, first, weight, last = _sums(weight[kept], file[kept], line[kept], near=_NEAR)
        return [
            Place(self.paths[file[n]], int(first[n]), int(last[n]), float(weight[n] / total))
            for n in np.argsort(-weight, kind="stable")[:count]
        ]


def _sums(weight: np.ndarray, file: np.ndarray, line: np.ndarray, near: int):
    """File, first line, weight and last line of runs of neighbouring lines, in order."""
    begins = (np.diff(file, prepend=-1) > 0) | (np.diff(line, prepend=0) > near)
    first, last = np.flatnonzero(begins), np.flatnonzero(np.append(begins[1:], True))
    return file[first], line[first], np.bincount(np.cumsum(begins) - 1, weight), line[last]
