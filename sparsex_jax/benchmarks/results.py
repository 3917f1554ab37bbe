"""Result files: one JSON object each, with all that is needed to judge and repeat a measurement."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sparsex_jax.config import ConfigError
from sparsex_jax.training.checkpoints import describe, differences, versions


def _output(*command: str) -> str | None:
    """Standard output of a command; None where it cannot run or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit of this source tree, "+changes" behind it if files differ.

    SPARSEX_COMMIT, where it is set, says it for copies of the tree on other machines; without
    it and without git it is "unknown".
    """
    if given := os.environ.get("SPARSEX_COMMIT"):
        return given
    git = ("git", "-C", str(Path(__file__).parents[2]))
    if _output(*git, "ls-files", "pyproject.toml") != "pyproject.toml":
        return "unknown"  # installed somewhere, perhaps within a repository of another project
    name = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    if name is None:
        return "unknown"
    return f"{name}+changes" if changed else name


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """What JAX computes on: kind, count (devices; cores of a CPU) and driver."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return {"kind": _cpu(), "count": os.cpu_count(), "driver": None}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "kind": devices[0].device_kind,
        "count": len(devices),
        "driver": driver.splitlines()[0] if driver else None,
    }


def compiled_for(device: jax.Device) -> dict[str, Any]:
    """`hardware` of what was compiled for a kind of device that is not here."""
    compiler = "jax-cuda13-plugin" if device.platform in ("gpu", "cuda") else "libtpu"
    return {
        "kind": f"{device.device_kind}, compiled ahead of time, not run",
        "count": None,
        "driver": f"{compiler} {importlib.metadata.version(compiler)}",
    }


def _versions() -> dict[str, str]:
    return {**versions(), "python": platform.python_version()}


def provenance(of: dict[str, Any] | None = None) -> dict[str, Any]:
    """Where and when something is measured: commit, date, hardware and versions.

    Args:
      of: the hardware; None for what JAX computes on.
    """
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": of or hardware(),
        "versions": _versions(),
    }


def default_path(benchmark: str) -> Path:
    """results/<hardware>/<benchmark>.json; the hardware is "cpu", "h200" or "h200-x8", say."""
    devices = jax.devices()
    name = "cpu"
    if devices[0].platform != "cpu":
        name = re.sub(r"[^a-z0-9]+", "-", devices[0].device_kind.lower()).strip("-")
        name = name.removeprefix("nvidia-") + (f"-x{len(devices)}" if len(devices) > 1 else "")
    return Path("results") / name / f"{benchmark}.json"


def check_writable(path: Path) -> None:
    """Makes the folder of a results file; raises ConfigError if the file cannot be written."""
    if path.is_dir():
        raise ConfigError(f"out='{path}' is a folder: use a file in it, {path / 'name.json'} say")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"out='{path}' cannot be written ({error.strerror}): use a file in another folder"
        ) from None


def write_results(
    path: str | os.PathLike,
    benchmark: str,
    command: str,
    config: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    model_crc32: int | None = None,
    hardware: dict[str, Any] | None = None,
) -> None:
    """Writes a results file (DESIGN.md, section 5), atomically.

    Args:
      path: of the file; folders are made.
      benchmark: what was measured.
      command: as typed.
      config: everything that decides the outcome, as JSON values.
      rows: flat objects.
      model_crc32: names the weights (see `sparsex_jax.training.model_crc32`) and joins the config;
        None where no model was measured.
      hardware: what the rows are of; None for what JAX computes on.

    Raises:
      OSError: it cannot be written; what was there before is intact.
    """
    path = Path(path)
    if model_crc32 is not None:
        config = {**config, "model_crc32": model_crc32}
    results = {
        "benchmark": benchmark,
        "command": command,
        "config": config,
        **provenance(hardware),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fresh.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """A results file as an object.

    Raises:
      ConfigError: it is none.
      OSError: it cannot be read.
    """
    try:
        results = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        results = None
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} is not a results file of sparsex: use another")
    return results


def check_same_run(
    saved: dict[str, Any],
    benchmark: str,
    config: dict[str, Any],
    path: str | os.PathLike,
    of: dict[str, Any] | None = None,
) -> None:
    """Raises ConfigError unless rows measured here and now may join those of a results file.

    Args:
      saved: the file's content.
      benchmark: what is measured.
      config: of the measurement.
      path: of the file, for the message.
      of: the hardware; None for what JAX computes on.
    """
    here = {
        "benchmark": benchmark,
        "config": json.loads(json.dumps(config)),
        "commit": commit(),
        "hardware": of or hardware(),
        "versions": _versions(),
    }
    found = differences({name: saved.get(name) for name in here}, here)
    if found:
        raise ConfigError(
            f"the rows in {path} are of another run ({describe(found)}): use another --out, or"
            " start again without --resume"
        )
