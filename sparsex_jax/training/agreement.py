"""What all processes of a run must have in common: checked before they wait for each other."""

import json
import socket
import time
import uuid
from pathlib import Path

import jax

from sparsex_jax.config import TrainConfig
from sparsex_jax.parallel import distributed
from sparsex_jax.training import checkpoints as ckpt
from sparsex_jax.training.errors import TrainingError

# How long a shared file system may show a process what it kept in memory.
_SHARED_SECONDS = 30


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


def check_same_command(config: TrainConfig, tokenizer: str | None, data: str | None) -> None:
    """Raises TrainingError unless all processes train with the same config, data and versions."""
    own = {
        "config": ckpt.to_json(config),
        "tokenizer": tokenizer,
        "data": data,
        "versions": ckpt.versions(),
    }
    first = json.loads(distributed.of_process_0("command", json.dumps(own)))
    if found := ckpt.differences(first, own):
        raise TrainingError(
            f"process {jax.process_index()} does not train what process 0 does:"
            f" {ckpt.describe(found)}: start all processes with the same command, the same text"
            " and the same versions"
        )
