"""The directory of a run: made, tried, and kept to one process."""

import fcntl
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from sparsex_jax.parallel import distributed
from sparsex_jax.training.errors import TrainingError

# How long a shared file system may show a process what it kept in memory.
_SHARED_SECONDS = 30


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


def check_shared(run_dir: Path) -> None:
    """Raises TrainingError unless run_dir is the same directory in all processes.

    Process 0 has to hold the lock.
    """
    if not jax.distributed.is_initialized():
        return
    path, own = run_dir / "lock", uuid.uuid4().hex
    if jax.process_index() == 0:
        path.write_text(own)
    wanted = distributed.of_process_0("lock", own)
    deadline = time.monotonic() + _SHARED_SECONDS
    while path.read_text() != wanted:
        if time.monotonic() > deadline:
            raise TrainingError(
                f"run_dir={run_dir} of process {jax.process_index()} on {socket.gethostname()} is"
                " not that of process 0: use a directory on a file system that all hosts share"
            )
        time.sleep(0.1)


def last_complete(checkpoints: Path) -> int | None:
    """Step of the last complete checkpoint of a run, by the names in its folder."""
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    return max(steps, default=None)
