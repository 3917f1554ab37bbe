"""One process a run directory."""

import errno
import fcntl

import pytest

from sparsex_jax.training.errors import TrainingError
from sparsex_jax.training.run_directory import lock
from tests.training import tiny


def test_second_process_is_told(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another process is training in run_dir="):
            tiny.run(tmp_path)


def test_other_trouble_with_the_lock_is_not_another_process(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"), lock(tmp_path):
        pass
