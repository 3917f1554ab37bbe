"""Answers as they are given, a line of JSON a batch, so that an interrupted evaluation goes on."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.config import ConfigError
from sparsex_jax.tasks.evaluation import Answer

Cell = tuple[str | int, ...]


class AnswerLog:
    """The answers of an evaluation by cell, a tuple of names and numbers: task, length, tier.

    The first line says what run they are of. A last line that was not written whole is dropped.

    Args:
      path: of the file.
      run: what the answers are of, JSON.
      check: of a run to go on with, called with what the file says of it; raises where that is
        another one. None begins a new file.

    Raises:
      ConfigError: the file is no such log.
      OSError: it cannot be read or written.
    """

    def __init__(
        self, path: Path, run: dict[str, Any], check: Callable[[dict[str, Any]], None] | None
    ):
        self.path = path
        self._answers: dict[Cell, list[Answer]] = {}
        self._missing: dict[Cell, dict[str, Any]] = {}
        if check is None or not path.exists():
            path.write_text(json.dumps(run) + "\n")
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            first, *lines = map(json.loads, whole.decode().splitlines())
            for line in lines:
                self._take(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is no log of answers: remove it, or start again without --resume"
            ) from error
        check(first)
        if len(whole) < len(text):
            path.write_bytes(whole)

    def _take(self, line: dict[str, Any]) -> None:
        cell = tuple(line["cell"])
        if "missing" in line:
            self._missing[cell] = line["missing"]
            return
        for fields in line["answers"]:
            fields["references"] = tuple(fields["references"])
            self._answers.setdefault(cell, []).append(Answer(**fields))

    def answers(self, cell: Cell) -> list[Answer]:
        """Those of a cell so far, in order."""
        return self._answers.get(cell, [])

    def missing(self, cell: Cell) -> dict[str, Any] | None:
        """Why a cell has no answers, as `add_missing` was told; None where it was not."""
        return self._missing.get(cell)

    def add(self, cell: Cell, answers: Sequence[Answer]) -> None:
        """Writes a batch of answers that follow those of the cell."""
        self._append({"cell": cell, "answers": [dataclasses.asdict(x) for x in answers]})

    def add_missing(self, cell: Cell, why: dict[str, Any]) -> None:
        """Writes why a cell has no answers, JSON."""
        self._append({"cell": cell, "missing": why})

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        with open(self.path, "a") as file:
            file.write(text + "\n")
        self._take(json.loads(text))
