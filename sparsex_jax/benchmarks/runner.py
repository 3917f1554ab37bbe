"""A benchmark whose rows are measured one by one, each written before the next begins."""

import abc
import math
import os
from pathlib import Path
from typing import Any, ClassVar

from sparsex_jax.benchmarks.results import check_same_run, read_results, write_results
from sparsex_jax.benchmarks.timing import OutOfMemory
from sparsex_jax.config import ConfigError
from sparsex_jax.errors import is_memory_full

Row = dict[str, Any]
BAD = ("wrong", "failed")


class Benchmark[Step](abc.ABC):
    """Measures step by step, and writes the results file after each.

    Args:
      config: what the rows have in common, as JSON values.
      path: of the results file.
      command: as typed.
      resume: keeps the rows that the file has, failed ones aside, and measures the others only.

    Attributes:
      name: of the benchmark.
      fields: of a row, beyond those of `identity`; None where they were not measured.

    Raises:
      ConfigError: the file cannot be gone on with.
    """

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, config: dict[str, Any], path: Path, command: str, *, resume: bool = False):
        self.config, self.path, self.command = config, path, command
        self.rows: list[Row] = []
        if resume and path.exists():
            saved = read_results(path)
            check_same_run(saved, self.name, config, path, self.hardware())
            # After a broken kernel a GPU may fail whatever follows in the same process.
            self.rows = [row for row in saved["rows"] if row.get("status") != "failed"]

    def hardware(self) -> dict[str, Any] | None:
        """What the rows are of; None for what JAX computes on."""
        return None

    @abc.abstractmethod
    def all_steps(self) -> list[Step]:
        """A step for each row, in order."""

    @abc.abstractmethod
    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""

    @abc.abstractmethod
    def run(self, step: Step) -> Row:
        """The other fields, `status` among them; what it raises becomes the row's note."""

    def steps(self) -> list[Step]:
        """The rows that are still to measure."""
        return [step for step in self.all_steps() if not self._is_there(step)]

    def measure(self, step: Step) -> Row:
        """Measures a row, adds it to the file and returns it."""
        row = self.identity(step) | dict.fromkeys(self.fields)
        try:
            row |= self.run(step)
        except Exception as error:
            status, note = judge(error)
            row |= {"status": status, "note": note}
        self.rows.append(row)
        write_results(
            self.path, self.name, self.command, self.config, self.rows, hardware=self.hardware()
        )
        return row

    def _is_there(self, step: Step) -> bool:
        wanted = self.identity(step)
        return any(all(row.get(name) == wanted[name] for name in wanted) for row in self.rows)


def judge(error: Exception) -> tuple[str, str]:
    """Status and note of a row that could not be measured, so that the others still are.

    Raises:
      Exception: the error itself, if SPARSEX_DEBUG=1 asks where it comes from.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemory):
        return "out_of_memory", text
    if is_memory_full(error):
        return "out_of_memory", text[:200]
    if os.environ.get("SPARSEX_DEBUG") == "1":
        raise error
    return "failed", f"{type(error).__name__}: {text[:200]}"


def require_some(settings: Any, *names: str) -> None:
    """Raises ConfigError unless each of these tuples has an element."""
    for name in names:
        if not getattr(settings, name):
            raise ConfigError(f"{name} must name at least one: see --help")


def require_positive(settings: Any, *names: str) -> None:
    """Raises ConfigError unless each of these numbers is positive and finite."""
    for name in names:
        value = getattr(settings, name)
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be positive: use 1, say")
