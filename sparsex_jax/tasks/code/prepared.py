"""C sources made ready for training and tests: tokens, and where their functions are.

A folder of `sparsex_jax.tasks.code.prepare` has

    tokenizer.json          its tokenizer, learned from the train split
    index.json              what it was made of, counts, checksums of the other files
    train/ and test/        of each split:
        tokens.npy          uint16 [N], the files one after another in the order of their paths
        files.txt           a path a line
        bounds.npy          int64 [files + 1], where each begins, and the last ends
        names.txt           a function's name a line, sorted
        functions.npy       FUNCTION [functions], in the order of their begins
        calls.npy           CALL [calls], of functions in names.txt
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsex_jax.config import ConfigError
from sparsex_jax.tasks.tokenizer import Tokenizer, load

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
FORMAT = 1

# `file` and `name` are numbers of lines of files.txt and names.txt. Bytes and lines are of the
# file, lines from 1, both included; the others are places in tokens.npy: a span's tokens are all
# that have a byte of it. `body` is behind the opening brace, `end` behind the closing one, `doc`
# the begin of the kernel-doc comment that ends at `begin`, -1 without one.
FUNCTION = np.dtype([
    ("file", "<i4"), ("name", "<i4"), ("byte_begin", "<i4"), ("byte_end", "<i4"),
    ("line_begin", "<i4"), ("line_end", "<i4"), ("begin", "<i8"), ("name_begin", "<i8"),
    ("name_end", "<i8"), ("body", "<i8"), ("end", "<i8"), ("doc", "<i8"),
])  # fmt: skip
CALL = np.dtype([("name", "<i4"), ("position", "<i8")])


class CodeSplit:
    """A split of a prepared folder; arrays are mapped, and opened anew in another process.

    Args:
      folder: of the split.

    Raises:
      ConfigError: a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _load(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path} is missing or damaged: prepare the folder again") from error

    def _lines(self, name: str) -> list[str]:
        try:
            return (self.folder / name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.folder / name} is missing or damaged: prepare the folder again"
            ) from error

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """uint16 [N]."""
        return self._load("tokens.npy")

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """int64 [files + 1]."""
        return np.asarray(self._load("bounds.npy"))

    @functools.cached_property
    def functions(self) -> np.ndarray:
        """FUNCTION [functions]."""
        return np.asarray(self._load("functions.npy"))

    @functools.cached_property
    def calls(self) -> np.ndarray:
        """CALL [calls]."""
        return np.asarray(self._load("calls.npy"))

    @functools.cached_property
    def names(self) -> list[str]:
        """Of functions."""
        return self._lines("names.txt")

    @functools.cached_property
    def files(self) -> list[str]:
        """Paths of the files, sorted."""
        return self._lines("files.txt")

    def all_tokens(self) -> np.ndarray:
        """The same as `tokens`, by the name that a `Corpus` has for it."""
        return self.tokens

    def __reduce__(self):
        return CodeSplit, (self.folder,)


class PreparedCode:
    """A prepared folder.

    Args:
      folder: made by `prepare`.

    Attributes:
      index: what index.json says.
      tokenizer: of the tokens.
      fingerprint: SHA-256 of index.json, which has the checksums of the other files.

    Raises:
      FileNotFoundError: there is no such folder.
      ConfigError: it was not prepared, or by another version.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder} is no folder: make one with scripts/prepare_linux.py"
            )
        try:
            text = (self.folder / "index.json").read_bytes()
            self.index: dict[str, Any] = json.loads(text)
            known = self.index["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.folder} is not prepared: make another with scripts/prepare_linux.py"
            ) from error
        if not known:
            raise ConfigError(
                f"{self.folder} was prepared by another version of sparsex: prepare it again"
            )
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.tokenizer: Tokenizer = load(self.folder / "tokenizer.json")

    def split(self, name: Split) -> CodeSplit:
        """A split.

        Raises:
          ConfigError: a file is missing or has not the size that the index says.
        """
        split, counts = CodeSplit(self.folder / name), self.index["splits"][name]
        for array in ("tokens", "functions", "calls"):
            if len(getattr(split, array)) != counts[array]:
                raise ConfigError(f"{split.folder} is damaged: prepare {self.folder} again")
        return split
