"""Batches made by processes: the same ones, and none that outlives the process that trains."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from sparsex_jax.config import DataConfig, StageConfig
from sparsex_jax.tasks import make_dataset

# A batch is more than a pipe holds (64 KiB).
STAGE = StageConfig(steps=1, length=512, batch_size=16)
CLOSING_SECONDS = 15  # grain waits for 25 where a worker is stuck
# Prints pids of the workers; then, each time that it is told so, the next batch and the state.
SCRIPT = """
import json, multiprocessing, sys, zlib
from sparsex_jax.config import DataConfig
from sparsex_jax.tasks import make_dataset
from tests.tasks.test_workers import STAGE
iterator = iter(make_dataset(DataConfig(sys.argv[1], workers=2), STAGE, seed=0))
if sys.argv[2]:
    iterator.set_state(json.loads(sys.argv[2]))
for line in sys.stdin:
    batch = next(iterator)
    workers = [child.pid for child in multiprocessing.active_children()]
    crc = zlib.crc32(batch["tokens"].tobytes())
    print(json.dumps({"crc": crc, "workers": workers, "state": iterator.get_state()}), flush=True)
iterator.close()
del iterator
"""


def begin(folder, state=""):
    command = [sys.executable, "-c", SCRIPT, str(folder), state]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_same_batches_and_no_worker_left(folder):
    iterator = iter(make_dataset(DataConfig(str(folder)), STAGE, seed=0))
    expected = [zlib.crc32(np.ascontiguousarray(next(iterator)["tokens"])) for _ in range(7)]
    with begin(folder) as first:
        answers = [ask(first) for _ in range(2)]
        workers = answers[-1]["workers"]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)  # as to all processes of a job
        answers += [ask(first) for _ in range(2)]
        first.kill()
    with begin(folder, json.dumps(answers[-1]["state"])) as second:
        answers += [ask(second) for _ in range(3)]
        time.sleep(1)  # batches ahead are made
        begun = time.monotonic()
    assert time.monotonic() - begun < CLOSING_SECONDS
    assert second.returncode == 0
    assert [answer["crc"] for answer in answers] == expected
    workers += answers[-1]["workers"]
    end = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, workers))
