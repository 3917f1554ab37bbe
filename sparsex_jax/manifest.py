"""Manifests: what the files of a folder must be, to be checked before anything opens them."""

import json
import os
import zlib
from pathlib import Path

NAME = "manifest.json"
_PART = ".manifest.{}.json"
_CHUNK_BYTES = 1 << 24


def _state(path: Path) -> dict[str, int]:
    """Size in bytes and crc32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
        return {"size": file.tell(), "crc32": crc32}


def write_part(folder: Path, part: Path) -> None:
    """Sums up the files of one of the folders within a folder, which `write` then need not do.

    Each of several processes can do so with what it wrote itself.
    """
    files = {path.relative_to(folder).as_posix(): _state(path) for path in _files(part, "**/*")}
    (folder / _PART.format(part.name)).write_text(json.dumps(files))


def write(folder: Path) -> None:
    """Writes the manifest of all files in the folders within a folder, atomically."""
    files: dict[str, dict[str, int]] = {}
    parts = sorted(folder.glob(_PART.format("*")))
    for part in parts:
        files |= json.loads(part.read_text())
    for path in _files(folder, "*/**/*"):
        name = path.relative_to(folder).as_posix()
        files[name] = files.get(name) or _state(path)
    fresh = folder / f".{NAME}.tmp"
    with fresh.open("w") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / NAME)
    for part in parts:
        part.unlink()


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if path.is_file()]


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Raises ValueError unless the files of a folder are those that its manifest names.

    Args:
      folder: that of the manifest.
      share: which of the shares of the files is looked at, from 0.
      shares: how many processes share the work; each has to do its own.
    """
    if not (folder / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    files = json.loads((folder / NAME).read_text())
    for name, state in list(files.items())[share::shares]:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != state["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {state['size']}")
        if _state(path) != state:
            raise ValueError(f"{name} was altered")
