"""Tuned configs: which kernels can be tuned, what was found, one JSON file per kind of device.

A file holds `device_kind` and `entries`; an entry has `kernel` ("range_attention.forward"),
`head_dim`, `config` (all fields of the kernel's config) and `evidence` (what was measured, which
nothing here reads). Without an entry a kernel has its default config.
"""

import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pallas_kernels import dispatch, hopper

FOLDER = "SPARSEX_TUNED"  # the environment variable
_PACKAGED = Path(__file__).parent / "tuned"
_FIELDS = {"kernel", "head_dim", "config", "evidence"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and the configs that it may have.

    Attributes:
      primitive: one of `dispatch.PRIMITIVES`.
      function: of its mosaic_gpu, e.g. "forward".
      head_dims: those it takes; widths of features, for block selection.
      default: from a head dimension to the config that it has unless another was found faster.
      grid: from a head dimension to configs that are worth trying.
      scratch: from a head dimension and a config to the scratch types of the call that needs most.
      reduces: as of `hopper.shared_memory`.
    """

    primitive: str
    function: str
    head_dims: tuple[int, ...]
    default: Callable[[int], Any]
    grid: Callable[[int], Iterable[Any]]
    scratch: Callable[[int, Any], Any]
    reduces: bool

    @property
    def name(self) -> str:
        """What it is called in files and commands."""
        return f"{self.primitive}.{self.function}"

    def shared_memory(self, head_dim: int, config: Any) -> int:
        """Bytes that a thread block takes at most, whatever the call."""
        return hopper.shared_memory(self.scratch(head_dim, config), reduces=self.reduces)

    def candidates(self, head_dim: int) -> list[Any]:
        """The configs that fit shared memory, the default first."""
        configs = dict.fromkeys((self.default(head_dim), *self.grid(head_dim)))
        return [x for x in configs if self.shared_memory(head_dim, x) <= hopper.SHARED_MEMORY]


def kernels() -> dict[str, Kernel]:
    """All kernels that can be tuned, by name."""
    modules = (
        importlib.import_module(f"pallas_kernels.{primitive}.mosaic_gpu")
        for primitive in dispatch.PRIMITIVES
    )
    return {kernel.name: kernel for module in modules for kernel in module.KERNELS.values()}


def choose(kernel: Kernel, head_dim: int) -> Any:
    """The config for the targeted device: the tuned one, or else the default.

    Raises:
      ValueError: if SPARSEX_TUNED is no folder, or as `load`.
    """
    found = load(path_for(folder(), dispatch.target_device().device_kind))
    return found.get((kernel.name, head_dim)) or kernel.default(head_dim)


def folder() -> Path:
    """Where the files are: $SPARSEX_TUNED, or else the folder `tuned` of this package.

    Raises:
      ValueError: if the variable names no folder.
    """
    given = os.environ.get(FOLDER)
    if given and not Path(given).is_dir():
        raise ValueError(f"{FOLDER}={given!r} is no folder: make it, or unset the variable")
    return Path(given) if given else _PACKAGED


def path_for(folder: Path, device_kind: str) -> Path:
    """The file of a kind of device: nvidia_h200.json, say."""
    return folder / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


def load(path: Path) -> Mapping[tuple[str, int], Any]:
    """The configs of a file, by kernel and head dimension; none if there is no file.

    Raises:
      ValueError: if the file is broken, or has an entry that is not a candidate of its kernel:
        others may not compile, or wait for ever.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _load(path, (state.st_ino, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=16)
def _load(path: Path, state: tuple[int, ...]) -> Mapping[tuple[str, int], Any]:
    """`state` tells versions of the file apart."""
    found = {}
    for entry in _read(path)["entries"]:
        key, config = _parse(path, entry)
        if key in found:
            _refuse(path, f"has two entries of {key[0]} at head_dim={key[1]}")
        found[key] = config
    return found


def store(path: Path, device_kind: str, kernel: Kernel, head_dim: int, config, evidence) -> None:
    """Puts an entry into a file, in place of the one it has, atomically.

    Args:
      path: of the file; its folder exists.
      device_kind: on which the config was measured.
      kernel: that was tuned.
      head_dim: at which.
      config: one of the candidates.
      evidence: dict of JSON values: what was measured, on what.

    Raises:
      ValueError: as `load`, if the file is broken or the config is no candidate.
      OSError: if it cannot be written; what was there before is intact.
    """
    entry = {
        "kernel": kernel.name,
        "head_dim": head_dim,
        "config": dataclasses.asdict(config),
        "evidence": evidence,
    }
    key, _ = _parse(path, entry)
    load(path)
    kept = _read(path)["entries"] if path.exists() else []
    entries = {(x["kernel"], x["head_dim"]): x for x in kept} | {key: entry}
    ordered = [entries[each] for each in sorted(entries)]
    content = {"device_kind": device_kind, "entries": ordered}
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("w") as file:
            file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ValueError(
        f"tuned configs in {path}: {problem}; remove the file, and run `sparsex tune` for another"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _refuse(path, f"is not JSON ({error})")
    if not isinstance(content, dict) or set(content) != {"device_kind", "entries"}:
        _refuse(path, "must be an object of device_kind and entries")
    kind = content["device_kind"]
    if not isinstance(kind, str) or path_for(path.parent, kind) != path:
        _refuse(path, f"is of another device, device_kind={kind!r}")
    if not isinstance(content["entries"], list):
        _refuse(path, "entries must be a list")
    return content


def _parse(path: Path, entry: Any) -> tuple[tuple[str, int], Any]:
    """(kernel, head dimension) and config of an entry."""
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        _refuse(path, f"an entry must be an object of {', '.join(sorted(_FIELDS))}")
    name, head_dim, fields = entry["kernel"], entry["head_dim"], entry["config"]
    known = kernels()
    if not isinstance(name, str) or name not in known:
        _refuse(path, f"kernel={name!r} is not one of {', '.join(known)}")
    kernel = known[name]
    if head_dim not in kernel.head_dims:
        _refuse(path, f"head_dim={head_dim!r} of {name} is not one of {kernel.head_dims}")
    here = f"config={fields!r} of {name} at head_dim={head_dim}"
    default = kernel.default(head_dim)
    expected = dataclasses.asdict(default)
    if not isinstance(fields, dict) or set(fields) != set(expected):
        _refuse(path, f"{here} must have the fields {', '.join(expected)}")

    def fits(value: Any, like: Any) -> bool:
        return type(value) is type(like) and (isinstance(value, bool) or value > 0)

    if not all(fits(fields[name], like) for name, like in expected.items()):
        _refuse(path, f"{here} must have positive integers, or true or false, like the default")
    config = type(default)(**fields)
    needed = kernel.shared_memory(head_dim, config)
    if needed > hopper.SHARED_MEMORY:
        _refuse(path, f"{here} needs {needed} bytes of shared memory of {hopper.SHARED_MEMORY}")
    if config not in kernel.candidates(head_dim):
        _refuse(path, f"{here} is not a candidate")
    return (name, head_dim), config
