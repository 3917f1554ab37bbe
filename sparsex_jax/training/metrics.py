"""Metrics of a run: rows in metrics.jsonl, TensorBoard events, a progress line."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import rich.console
import rich.progress

from sparsex_jax.errors import is_disk_full
from sparsex_jax.training.errors import TrainingError

logger = logging.getLogger(__name__)

# Fields of a row that depend on the clock; all others are the same however often a run stops.
TIME_FIELDS = ("tokens_per_second", "seconds")
_LONG = 10  # seconds that a step may wait before the user is told what for


def truncate_rows(path: Path, last_step: int) -> None:
    """Drops rows beyond a step, and a torn last line, by replacing the file atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # torn: the process was killed while it wrote
            break
        if row["step"] <= last_step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Metrics:
    """Writes rows; only process 0 should have one.

    Args:
      run_dir: of the run; holds metrics.jsonl and tensorboard/.
      last_step: the step that training goes on from; later rows are dropped.
    """

    def __init__(self, run_dir: Path, last_step: int):
        path = run_dir / "metrics.jsonl"
        truncate_rows(path, last_step)
        self._file = path.open("a")
        self._events = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            logger.warning("tensorboardX is not installed: metrics go to %s only", path)
        else:
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)

    def write(self, row: dict) -> None:
        """Appends a row, flushed; raises TrainingError where the device is full."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._events is not None:
                for name, value in row.items():
                    if name not in ("step", "stage"):
                        self._events.add_scalar(name, value, row["step"])
        except OSError as error:
            if is_disk_full(error):
                raise TrainingError(
                    f"no space left on the device of {self._file.name}: free some and run the"
                    " same command again, it goes on from the last checkpoint"
                ) from error
            raise

    def sync(self) -> None:
        """Brings all rows to the disk, before a checkpoint that they belong to is written."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class Progress:
    """A live line on a terminal, a plain line per row elsewhere.

    Args:
      total_steps: of the run.
      total_tokens: of the run, for the remaining time.
    """

    def __init__(self, total_steps: int, total_tokens: int):
        self._console = rich.console.Console(stderr=True, highlight=False)
        self._total_steps, self._total_tokens = total_steps, total_tokens
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("stage {task.fields[stage]}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            rich.progress.TextColumn("{task.fields[text]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("train", total=total_steps, stage="-", text="compiling")
        if self._console.is_terminal:
            self._bar.start()

    def show(self, row: dict) -> None:
        """Shows a row of the metrics."""
        rate = row["tokens_per_second"]
        seconds = (self._total_tokens - row["tokens"]) / rate
        eta = time.strftime("%H:%M:%S", time.gmtime(seconds))
        if seconds >= 86_400:
            eta = f"{int(seconds // 86_400)} d {eta}"
        text = f"loss {row['loss']:.4f}  {rate:,.0f} tokens/s  ETA {eta}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=row["step"], stage=row["stage"], text=text)
        else:
            self._console.print(
                f"step {row['step']}/{self._total_steps}  stage {row['stage']}  {text}",
                soft_wrap=True,
            )

    def say(self, text: str) -> None:
        """Prints a line above the progress."""
        self._console.print(text, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says how long a step had to wait for something, where that was long."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        if seconds > _LONG:
            self.say(f"waited {seconds:.0f} s for {what}")

    def close(self) -> None:
        """Ends the live line."""
        if self._console.is_terminal:
            self._bar.stop()
