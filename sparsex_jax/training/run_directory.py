"""The directory of a run: made, tried, and kept to one process."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsex_jax.training.errors import TrainingError


def prepare(run_dir: Path) -> Path:
    """Makes the run directory and checks that it can be written to."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "lock").touch()
    except OSError as error:
        raise TrainingError(
            f"run_dir={run_dir} cannot be used ({error.strerror}): give a directory that can be"
            " made and written to"
        ) from error
    return run_dir


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of the run directory; the lock ends with this process."""
    with (run_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"another process is training in run_dir={run_dir}: stop it, or use another one"
            ) from error
        yield


def last_complete(checkpoints: Path) -> int | None:
    """Step of the last complete checkpoint of a run, by the names in its folder."""
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    return max(steps, default=None)
