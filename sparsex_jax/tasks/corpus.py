"""Real text as a stream of tokens: any folder of text files."""

import hashlib
import os
import pathlib
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np

from sparsex_jax.tasks.tokenizer import Tokenizer

Split = Literal["train", "held_out"]

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})
_CHUNK_BYTES = 1 << 20
_BATCH_CHUNKS = 16
# The share of files, one in so many, that is never trained on.
_HELD_OUT = 10
# Changes whenever the token stream of the same files would.
_FORMAT = "1"


def default_folder() -> pathlib.Path:
    """The sources of the running Python's standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


def cache_folder() -> pathlib.Path:
    """Where tokenised corpora are kept: `$XDG_CACHE_HOME/sparsex`, else `~/.cache/sparsex`."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return pathlib.Path(base) / "sparsex"
    if sys.platform == "darwin":
        return pathlib.Path("~/Library/Caches/sparsex").expanduser()
    return pathlib.Path("~/.cache/sparsex").expanduser()


def _hash(*parts: object) -> int:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def find_files(folder: pathlib.Path, split: Split | None = None, suffix: str = "") -> list[str]:
    """Paths, relative to `folder` and with "/", of the files of a split (None: of all), sorted."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise FileNotFoundError(
            f"haystack={str(folder)!r} must be a folder that can be read ({error.strerror}):"
            " give another folder, or none for Python's standard library"
        ) from error
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and name[:1] != "."]
        for name in files:
            if not name.startswith(".") and name.endswith(suffix):
                found.append(pathlib.Path(root, name).relative_to(folder).as_posix())
    if split is not None:
        held_out = split == "held_out"
        found = [name for name in found if (_hash(name) % _HELD_OUT == 0) == held_out]
    return sorted(found)


def read_chunks(path: pathlib.Path) -> Iterator[str]:
    """Text of a file in pieces that end at line ends; nothing where it isn't UTF-8 text."""
    try:
        with open(path, "rb") as raw:
            if b"\0" in raw.read(4096):
                return
        with open(path, encoding="utf-8") as file:
            while chunk := file.read(_CHUNK_BYTES):
                chunk += file.readline(_CHUNK_BYTES)
                yield chunk if chunk.endswith("\n") else chunk + "\n"
    except (UnicodeDecodeError, OSError):
        # A file that is no text, has gone, or may not be read: the other files serve as well.
        return


class Corpus:
    """Tokens of the text files of a folder.

    Args:
      folder: None means the running Python's standard library (without site-packages).
      tokenizer: what encodes the text.
      split: "train" or "held_out" (one file in ten, by a hash of its relative path), None for
        every file.

    Raises:
      FileNotFoundError: the folder is missing or cannot be read.
      ValueError: it holds no file (of this split).
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        *,
        tokenizer: Tokenizer,
        split: Split | None = None,
    ):
        self.folder = pathlib.Path(folder) if folder is not None else default_folder()
        self.tokenizer = tokenizer
        self.split = split
        # The library's other files are hardly text: megabytes of decimal test vectors, say.
        self.files = find_files(self.folder, split, suffix=".py" if folder is None else "")
        self._all: np.ndarray | None = None
        if not self.files:
            raise self._no_text()

    def _no_text(self) -> ValueError:
        which = f" in split={self.split!r}" if self.split else ""
        return ValueError(
            f"haystack={str(self.folder)!r} must hold text files (UTF-8){which}, and has none:"
            " give a folder with more text, or none for Python's standard library"
        )

    def _stream(self, files: list[str]) -> Iterator[np.ndarray]:
        batch: list[str] = []
        size = 0
        for name in files:
            for chunk in read_chunks(self.folder / name):
                batch.append(chunk)
                size += len(chunk)
                if len(batch) == _BATCH_CHUNKS or size > _CHUNK_BYTES:
                    yield from self.tokenizer.encode_batch(batch)
                    batch, size = [], 0
        if batch:
            yield from self.tokenizer.encode_batch(batch)

    def tokens(self, count: int, seed: int | None = None) -> np.ndarray:
        """The first `count` tokens, int32 [count], reading no more files than these need.

        Args:
          count: tokens; a shorter corpus repeats.
          seed: files in a random order that this seed decides; None takes them as sorted.

        Raises:
          ValueError: no file is UTF-8 text.
        """
        files = self.files
        if seed is not None:
            files = sorted(files, key=lambda name: _hash(seed, name))
        parts: list[np.ndarray] = []
        have = 0
        for part in self._stream(files):
            parts.append(part)
            have += len(part)
            if have >= count:
                break
        if not have:
            raise self._no_text()
        return np.resize(np.concatenate(parts), count)

    def all_tokens(self) -> np.ndarray:
        """Every token, uint16 [N] (uint32 for a large vocabulary); kept on disk for the next time.

        Where nothing can be kept (no space, read-only), it is tokenised anew each time.

        Raises:
          ValueError: no file is UTF-8 text.
        """
        if self._all is None:
            path = cache_folder() / f"tokens-{self._key()}.npy"
            self._all = _read_cached(path)
        if self._all is None:
            dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
            parts = [part.astype(dtype) for part in self._stream(self.files)]
            if not sum(map(len, parts)):
                raise self._no_text()
            self._all = np.concatenate(parts)
            if _write_cached(path, self._all):
                cached = _read_cached(path)
                self._all = self._all if cached is None else cached
        return self._all

    def _key(self) -> str:
        digest = hashlib.sha256(f"{_FORMAT} {self.tokenizer.fingerprint}".encode())
        for name in self.files:
            try:
                stat = os.stat(self.folder / name)
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError:
                state = "gone"
            digest.update(f"\0{name}\0{state}".encode(errors="surrogateescape"))
        return digest.hexdigest()[:24]

    def __getstate__(self):
        # A memory map would be pickled as a copy: another process opens the file itself.
        state = self.__dict__.copy()
        if isinstance(self._all, np.memmap):
            state["_all"] = None
        return state


def _read_cached(path: pathlib.Path) -> np.ndarray | None:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.ndim == 1 and len(array) else None


def _write_cached(path: pathlib.Path, array: np.ndarray) -> bool:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
        return True
    except OSError:
        if temporary is not None:
            pathlib.Path(temporary).unlink(missing_ok=True)
        return False
