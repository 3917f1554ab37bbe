"""Manifests: what the files of a folder must be, to be checked before anything opens them."""

import json
import os
import zlib
from pathlib import Path

NAME = "manifest.json"
_CHUNK_BYTES = 1 << 24


def _state(path: Path) -> dict[str, int]:
    """Size in bytes and crc32 of a file."""
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
        return {"size": file.tell(), "crc32": crc32}


def write(folder: Path) -> None:
    """Writes the manifest of all files in the folders within a folder, atomically."""
    files = {
        path.relative_to(folder).as_posix(): _state(path)
        for path in sorted(folder.glob("*/**/*"))
        if path.is_file()
    }
    fresh = folder / f".{NAME}.tmp"
    with fresh.open("w") as file:
        json.dump(files, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / NAME)


def verify(folder: Path) -> None:
    """Raises ValueError unless the files of a folder are those that its manifest names."""
    if not (folder / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    for name, state in json.loads((folder / NAME).read_text()).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != state["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {state['size']}")
        if _state(path) != state:
            raise ValueError(f"{name} was altered")
