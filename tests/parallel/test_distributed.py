"""Processes that train together: as one would, stopped together, none left waiting."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import time

import pytest

from sparsex_jax.config import ConfigError
from sparsex_jax.parallel import distributed
from sparsex_jax.parallel.distributed import DistributedConfig
from sparsex_jax.parallel.watch import LOST, Group
from tests.test_cli import fail, preset, text
from tests.training import tiny
from tests.training.test_interruption import (
    assert_close_run,
    assert_same_run,
    complete,
    start,
    wait_for,
    zygote,
)

__all__ = ["fail", "preset", "start", "text", "zygote"]  # fixtures
SILENT_SECONDS = 5


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_processes(start, run_dir, count=2, each=None, limits=(), **options):
    """Starts a run of several processes with a device each; `each` has more options for each."""
    process = {
        "coordinator": f"localhost:{free_port()}",
        "num_processes": count,
        "silent_seconds": SILENT_SECONDS,
        **dict(limits),
    }
    return [
        start(run_dir, process={**process, "process_id": index}, **options, **more)
        for index, more in enumerate(each or [{}] * count)
    ]


def finish(processes, status=0):
    """Outputs (stdout, stderr) of processes that end with a status."""
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == status for process in processes), outputs
    return outputs


def interrupt(processes, run_dir, victim, number):
    """Sends a signal after the next checkpoint; outputs of the others, and how long they took."""
    before = max(complete(run_dir)[0], default=0)
    wait_for(processes[0], lambda: max(complete(run_dir)[0], default=0) > before)
    begin = time.monotonic()
    processes[victim].send_signal(number)
    others = [process for process in processes if process is not processes[victim]]
    outputs = finish(others, 0 if number == signal.SIGTERM else LOST)
    return outputs, time.monotonic() - begin


def assert_tells(output, *parts):
    """One line of stderr is for the user, and has these parts.

    JAX's runtime may add a stack trace behind it, on a busy machine, while the process ends.
    """
    (line,) = [x for x in output[1].splitlines() if x.startswith("sparsex: process ")]
    assert all(part in line for part in parts), line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a process with one device."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert tiny.run(run_dir).status == "finished"
    return run_dir


def test_processes_train_as_one_does_and_go_on_after_every_end(start, whole, tmp_path):
    """Bit for bit as one process with as many devices; but for rounding, as one device."""
    one, several = tmp_path / "one", tmp_path / "several"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    alone = start(one, environment=flags)
    finish([alone])

    processes = start_processes(start, several, slow=0.1)
    outputs, _ = interrupt(processes, several, 1, signal.SIGTERM)
    stopped = f"interrupted {max(complete(several)[0])} stopped by a signal to"
    assert all(stopped in output for output, _ in [*outputs, *finish(processes[1:])])

    processes = start_processes(start, several, slow=0.1)
    outputs, seconds = interrupt(processes, several, 1, signal.SIGKILL)
    assert_tells(outputs[0], "process 1 of 2", "has not answered for", "with the same command")
    assert "resumes from step" in outputs[0][1] and seconds < SILENT_SECONDS + 10

    processes = start_processes(start, several, slow=0.1)
    outputs, seconds = interrupt(processes, several, 0, signal.SIGKILL)
    assert_tells(outputs[0], "process 0 of 2 at localhost:", "has ended", "resumes from step")
    assert seconds < SILENT_SECONDS + 10

    outputs = finish(start_processes(start, several))
    assert "step 21/21" in outputs[0][1] and "step" not in outputs[1][1]  # process 0 alone shows
    assert_same_run(several, one)
    assert_close_run(several, whole)


def test_each_process_writes_its_shards_and_gathers_none(start, tmp_path):
    options = {"model_dim": 256, "checkpoint_every": 2}
    processes = start_processes(start, tmp_path, slow=0.1, gathers=False, **options)
    interrupt(processes, tmp_path, 1, signal.SIGTERM)
    finish(processes)
    last = max(complete(tmp_path)[0])
    arrays = tmp_path / "checkpoints" / str(last) / "arrays"
    files = [path for path in arrays.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    for number in range(2):
        own = [path for path in files if arrays / f"ocdbt.process_{number}" in path.parents]
        assert 0.4 * total < sum(path.stat().st_size for path in own) < 0.6 * total
    assert total > 4 * 3 * (2 * 256**2 + 32 * 256) / 2  # random numbers: little to compress
    assert not list(arrays.parent.glob(".manifest*"))

    damaged = max(own, key=lambda path: path.stat().st_size)  # of process 1
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 255]) + content[-8:])
    processes = start_processes(start, tmp_path, **options)
    outputs = [process.communicate() for process in processes]
    assert sorted(process.returncode for process in processes) == [1, LOST]
    told = outputs[[process.returncode for process in processes].index(LOST)]
    what = f"checkpoints/{last} cannot be read, files are missing or damaged (arrays/ocdbt.process"
    assert_tells(told, " stopped: ", what, "was altered): delete it to go on from step")
    shutil.rmtree(arrays.parent)
    finish(start_processes(start, tmp_path, **options))


@pytest.mark.parametrize("how", ["killed", pytest.param("full", marks=pytest.mark.long)])
def test_a_process_that_fails_while_it_writes_leaves_the_last_checkpoint(start, tmp_path, how):
    processes = start_processes(start, tmp_path, each=({}, {"fault": (8, how)}))
    outputs = [process.communicate() for process in processes]
    assert processes[0].returncode == LOST
    if how == "killed":
        assert_tells(outputs[0], "process 1 of 2", "has not answered for", "resumes from step 4")
    else:
        assert_tells(outputs[0], "process 1 of 2 stopped: ", "no space left on the device. The one")
        assert "CheckpointError" in outputs[1][1] and "step 4 is intact" in outputs[1][1]
    assert complete(tmp_path) == ({4}, True)
    finish(start_processes(start, tmp_path))
    assert complete(tmp_path) == ({20, 21}, False)


@pytest.mark.long
def test_one_of_four_hangs_and_other_numbers_of_devices_go_on(start, tmp_path):
    run_dir, options = tmp_path / "run", {"batch_size": 8, "checkpoint_every": 2}
    processes = start_processes(start, run_dir, 4, slow=0.1, **options)
    outputs, seconds = interrupt(processes, run_dir, 2, signal.SIGSTOP)
    for output in outputs:
        assert_tells(output, "process 2 of 4", f"has not answered for {SILENT_SECONDS} s")
    assert seconds < SILENT_SECONDS + 10
    runs = []
    for devices in (2, 8):
        runs.append(tmp_path / str(devices))
        shutil.copytree(run_dir, runs[-1])
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        (output,) = finish([start(runs[-1], environment=flags, **options)])
        assert "resuming" in output[1]
    one = tmp_path / "one"
    config = dataclasses.replace(tiny.with_batch_size(8), checkpoint_every=2)
    assert tiny.run(one, config).status == "finished"
    for run in runs:
        assert_close_run(run, one)


def test_an_error_of_one_ends_the_other(start, tmp_path):
    first, second = start_processes(start, tmp_path, each=({}, {"seed": 4}))
    (told,), (own,) = finish([first], LOST), finish([second], 1)
    why = "process 1 does not train what process 0 does: config.seed is 3 there and 4 here"
    assert_tells(told, f"process 1 of 2 stopped: {why}")
    assert f"TrainingError: {why}" in own[1]
    assert not complete(tmp_path)[0]


def test_a_batch_that_does_not_come_ends_all(start, tmp_path):
    processes = start_processes(
        start, tmp_path, each=({}, {"slow": 60}), limits={"stall_seconds": 6}
    )
    for output in finish(processes, LOST):
        assert_tells(output, "process 1 of 2 has waited 6 s for the batch of step 1: restart all")
        assert "begins anew, for it has no checkpoint" in output[1]


CONFIGS = [
    ({"coordinator": "a:1"}, "coordinator without num_processes and process_id: give all three"),
    ({"process_id": 0}, "process_id without coordinator and num_processes"),
    ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "'a' must be host:port"),
    ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "a port from 1 to 65535"),
    ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes=0 must be pos"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "numbered from 0 to 1"),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 0, "cluster": "off"}, "leave one"),
    ({"silent_seconds": 0}, "silent_seconds=0 must be positive: use at least 1"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS)
def test_what_does_not_fit_together_says_so(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DistributedConfig(**fields)


def test_mistakes_give_one_line(preset, fail):
    assert "without process_id" in fail(
        "train", preset, "--coordinator", "node0:1234", "--num-processes", 2
    )
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        given = ("--coordinator", address, "--num-processes", 2, "--process-id", 0)
        assert f"process 0 cannot listen on port {address[10:]}" in fail("train", preset, *given)


def test_who_waits_for_whom_at_the_start(start, tmp_path):
    """Process 0 for another, and another for process 0."""
    ports = free_port(), free_port()
    processes = [
        start(
            tmp_path,
            process={
                "coordinator": f"localhost:{ports[number]}",
                "num_processes": 2,
                "process_id": number,
                "start_seconds": 2,
            },
        )
        for number in range(2)
    ]
    first, second = finish(processes, LOST)
    assert_tells(first, "0 of 2 has waited 2 s at", str(ports[0]), "not all of the others came")
    assert_tells(second, "1 of 2 has waited 2 s for process 0", f"answer at localhost:{ports[1]}")


@pytest.fixture
def bare(monkeypatch):
    """An environment that no cluster made."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "KUBERNETES_", "JOB_", "OMPI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_on_its_own_is_no_group(bare):
    assert distributed.find_group(DistributedConfig()) is None
    alone = DistributedConfig(coordinator="a:1", num_processes=1, process_id=0)
    assert distributed.find_group(alone) is None
    bare.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod, but of no job
    assert distributed.find_group(DistributedConfig()) is None


def test_flags_go_before_what_the_cluster_says(bare):
    slurm(bare, 4)
    given = DistributedConfig(coordinator="a:1", num_processes=2, process_id=1)
    assert distributed.find_group(given) == Group("a:1", 2, 1)
    assert distributed.find_group(DistributedConfig(cluster="off")) is None


def slurm(environment, tasks):
    for name, value in {
        "JOB_ID": "77", "STEP_NODELIST": "node[003-004],other", "NTASKS": str(tasks),
        "PROCID": "3", "LOCALID": "1",
    }.items():  # fmt: skip
        environment.setenv(f"SLURM_{name}", value)


def test_slurm_tells_the_processes(bare):
    slurm(bare, 4)
    group = distributed.find_group(DistributedConfig())
    assert (group.size, group.number, group.local_device) == (4, 3, 1)
    assert group.address == f"node003:{65535 - 4096 + 1 + 77}"
    slurm(bare, 1)
    assert distributed.find_group(DistributedConfig()) is None


def test_tpu_on_gke_tells_the_processes(bare):
    bare.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    bare.setenv("TPU_WORKER_HOSTNAMES", "localhost,host-1,host-2")
    bare.setenv("TPU_WORKER_ID", "2")
    bare.setenv("TPU_SKIP_MDS_QUERY", "true")  # as GKE does
    bare.setenv("MEGASCALE_NUM_SLICES", "1")
    bare.setenv("MEGASCALE_SLICE_ID", "0")
    bare.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    group = distributed.find_group(DistributedConfig())
    assert group == Group("localhost:8482", 3, 2)


def test_a_pod_that_cannot_find_the_others_does_not_train_alone(bare):
    bare.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    bare.setenv("JOB_COMPLETION_INDEX", "3")
    with pytest.raises(ConfigError, match=r"JOB_COMPLETION_INDEX=3 .* install jax\[k8s\], or give"):
        distributed.find_group(DistributedConfig())
