"""From a source tree to a prepared folder (`prepared.py`), the same bytes for the same sources."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparsex_jax.config import ConfigError
from sparsex_jax.tasks.code import duplicates
from sparsex_jax.tasks.code.functions import find_functions
from sparsex_jax.tasks.code.prepared import CALL, FORMAT, FUNCTION, SPLITS, Split
from sparsex_jax.tasks.tokenizer import Tokenizer, train_bpe

SUFFIXES = (".c", ".h")
_BATCH_BYTES = 1 << 21
# (what is done, how much of it, of how much)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How sources are prepared.

    Attributes:
      vocab_size: entries of the tokenizer, 512 to 65536.
      test_share: of the clusters of near-duplicates, that is never trained on.
      similarity: of Jaccard, of the shingles of two files, from which on they are near-duplicates.
      max_file_bytes: larger files are left out: most are tables that a program wrote.
      tokenizer_bytes: of train files in a random order, that the tokenizer is learned from.
    """

    vocab_size: int = 8192
    test_share: float = 0.1
    similarity: float = 0.5
    max_file_bytes: int = 256 << 10
    tokenizer_bytes: int = 64 << 20

    def __post_init__(self):
        if not 512 <= self.vocab_size <= 1 << 16:
            raise ConfigError(f"vocab_size={self.vocab_size} must lie in [512, 65536]: use 8192")
        for name in ("test_share", "similarity"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(f"{name}={value} must lie between 0 and 1: use 0.1, say")
        for name in ("max_file_bytes", "tokenizer_bytes"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} must be positive: use 1000000, say")


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def prepare(
    source: Path, out: Path, config: PrepareConfig, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Prepares a source tree.

    Everything is written beside `out` first and gets its name at the end.

    Args:
      source: folder, or tar file, compressed or not.
      out: folder to make.
      config: how.
      progress: called now and then.

    Returns:
      What index.json says.

    Raises:
      FileNotFoundError: there is no such source.
      ConfigError: it is no tar file or has no C files, `out` exists, or a split stays empty.
      OSError: something cannot be read or written.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a source tree or a tar file of one")
    if out.exists():
        raise ConfigError(f"{out} exists: remove it, or use another folder")
    fresh = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        fresh.mkdir(parents=True)
        root = source if source.is_dir() else _unpack(source, fresh / "source", progress)
        index = _prepare(root, fresh, config, progress)
        shutil.rmtree(fresh / "source", ignore_errors=True)
        fresh.rename(out)
        return index
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unpack(archive: Path, folder: Path, progress: Progress) -> Path:
    """The C files of a tar file, in a folder; returns that of the sources."""
    try:
        with tarfile.open(archive) as tar:
            for number, member in enumerate(tar):
                if member.isreg() and member.name.endswith(SUFFIXES):
                    tar.extract(member, folder, filter="data")
                if number % 1000 == 0:
                    progress("unpacking", number, 0)
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"{archive} is no tar file, or a damaged one: use another") from error
    inside = list(folder.iterdir()) if folder.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _find(root: Path) -> list[str]:
    """Relative paths of the C files of a tree, sorted; links are left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if name.endswith(SUFFIXES) and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


class _Sources:
    """The files that are used, in the order of their paths.

    Attributes:
      names: relative paths.
      left_out: how many, by the reason.
      signatures: for near-duplicates.
    """

    def __init__(self, root: Path, config: PrepareConfig, progress: Progress):
        self.root, self.names, self.signatures = root, [], []  # type: ignore[var-annotated]
        self.left_out = {"large": 0, "empty": 0, "not UTF-8": 0}
        found = _find(root)
        for number, name in enumerate(found):
            if number % 100 == 0:
                progress("looking for near-duplicates", number, len(found))
            reason = None
            if (root / name).stat().st_size > config.max_file_bytes:
                reason = "large"
            else:
                text = self.read(name)
                if text.isspace():
                    reason = "empty"
                elif not _is_text(text):
                    reason = "not UTF-8"
            if reason:
                self.left_out[reason] += 1
                continue
            self.names.append(name)
            self.signatures.append(duplicates.signature(text))
        if not self.names:
            raise ConfigError(f"{root} has no C files (.c, .h): give the folder of a source tree")

    def read(self, name: str) -> bytes:
        """A file, with a newline at its end."""
        text = (self.root / name).read_bytes()
        return text if text.endswith(b"\n") else text + b"\n"


def _is_text(text: bytes) -> bool:
    try:
        return "\0" not in text.decode()
    except UnicodeDecodeError:
        return False


def _prepare(root: Path, out: Path, config: PrepareConfig, progress: Progress) -> dict[str, Any]:
    sources = _Sources(root, config, progress)
    cluster = duplicates.clusters(sources.signatures, config.similarity)
    splits = _split(sources.names, cluster, config.test_share)
    tokenizer = train_bpe(_sample(sources, splits["train"], config, progress), config.vocab_size)
    tokenizer.save(out / "tokenizer.json")
    index: dict[str, Any] = {
        "format": FORMAT,
        "source": root.name,
        "config": dataclasses.asdict(config),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("tokenizers", "tree-sitter", "tree-sitter-c")
        },
        "left_out": sources.left_out,
        "clusters": len(np.unique(cluster)),
        "largest_cluster": int(np.bincount(cluster).max()),
        "tokenizer": tokenizer.fingerprint,
        "splits": {},
    }
    for split in SPLITS:
        folder, show = out / split, functools.partial(progress, f"tokens and functions, {split}")
        folder.mkdir()
        index["splits"][split] = _write_split(sources, splits[split], tokenizer, folder, show)
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return index


def _split(names: list[str], cluster: np.ndarray, share: float) -> dict[Split, list[str]]:
    """Files of each split: all of a cluster go where the hash of its first path says."""
    limit = int(share * (1 << 64))
    tests = {
        number
        for number in np.unique(cluster)
        if int.from_bytes(_rank(names[number])[:8], "big") < limit
    }
    splits: dict[Split, list[str]] = {"train": [], "test": []}
    for name, number in zip(names, cluster, strict=True):
        splits["test" if number in tests else "train"].append(name)
    for split, files in splits.items():
        if not files:
            raise ConfigError(
                f"the {split} split of {len(names)} files is empty: give more files, or use another"
                f" test_share than {share}"
            )
    return splits


def _sample(
    sources: _Sources, names: list[str], config: PrepareConfig, progress: Progress
) -> Iterator[str]:
    """Text to learn the tokenizer from: files in a random order, of so many bytes."""
    size = 0
    for name in sorted(names, key=_rank):
        text = sources.read(name)
        size += len(text)
        if size > config.tokenizer_bytes and size > len(text):
            break
        progress("learning the tokenizer", size, config.tokenizer_bytes)
        yield text.decode()


def _write_split(
    sources: _Sources,
    names: list[str],
    tokenizer: Tokenizer,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Writes the files of a split; returns their counts and checksums."""
    functions: list[tuple[bytes, tuple[int, ...]]] = []
    calls: list[tuple[bytes, int]] = []
    bounds = [0]
    raw = folder / "tokens.raw"
    with raw.open("wb") as file:
        for batch in _batches(sources, names):
            encoded = tokenizer.encode_batch([text.decode() for text in batch])
            for text, tokens in zip(batch, encoded, strict=True):
                _index(text, tokens, len(bounds) - 1, bounds[-1], tokenizer, functions, calls)
                file.write(tokens.astype("<u2").tobytes())
                bounds.append(bounds[-1] + len(tokens))
            progress(len(bounds) - 1, len(names))
    with (folder / "tokens.npy").open("wb") as file, raw.open("rb") as tokens_file:
        _write_header(file, bounds[-1])
        shutil.copyfileobj(tokens_file, file)
    raw.unlink()
    known = sorted({name for name, _ in functions})
    number = {name: i for i, name in enumerate(known)}
    rows = [(fields[0], number[name], *fields[1:]) for name, fields in functions]
    found = np.array(rows, FUNCTION)
    places = [(number[name], position) for name, position in calls if name in number]
    np.save(folder / "functions.npy", found)
    np.save(folder / "calls.npy", np.array(places, CALL))
    np.save(folder / "bounds.npy", np.array(bounds, "<i8"))
    for file_name, lines in (("files.txt", names), ("names.txt", [x.decode() for x in known])):
        (folder / file_name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {
        "files": len(names), "tokens": bounds[-1], "functions": len(found),
        "documented": int((found["doc"] >= 0).sum()), "calls": len(places),
        "sha256": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
    }  # fmt: skip


def _write_header(file: BinaryIO, count: int) -> None:
    """That of uint16 [count] in a .npy file."""
    header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batches(sources: _Sources, names: list[str]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for name in names:
        batch.append(sources.read(name))
        if sum(map(len, batch)) > _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _index(
    text: bytes,
    tokens: np.ndarray,
    number: int,
    begin: int,
    tokenizer: Tokenizer,
    functions: list[tuple[bytes, tuple[int, ...]]],
    calls: list[tuple[bytes, int]],
) -> None:
    """Adds the functions and calls of a file, whose tokens begin at `begin` of the split."""
    found, called = find_functions(text)
    ends = np.cumsum(tokenizer.sizes[tokens])
    assert ends[-1] == len(text)
    lines = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))

    def first(byte: int) -> int:
        """The token that has a byte."""
        return begin + int(np.searchsorted(ends, byte, side="right"))

    def line(byte: int) -> int:
        return 1 + int(np.searchsorted(lines, byte))

    for x in found:
        doc = -1 if x.doc is None else first(x.doc)
        functions.append((x.name, (
            number, x.begin, x.end, line(x.begin), line(x.end - 1), first(x.begin),
            first(x.name_begin), first(x.name_end - 1) + 1, first(x.body - 1) + 1,
            first(x.end - 1) + 1, doc,
        )))  # fmt: skip
    calls += [(call.name, first(call.begin)) for call in called]
