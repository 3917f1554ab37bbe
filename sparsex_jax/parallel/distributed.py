"""Several processes that train together: how they find each other, begin and end."""

import collections
import dataclasses
import importlib.util
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import jax
from jax._src import clusters
from jax._src import distributed as runtime

from sparsex_jax.config import ConfigError
from sparsex_jax.parallel.watch import DAY_MS, Group, Watch

_watch: Watch | None = None
_asked: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other, and how long they wait for each other.

    Attributes:
      coordinator: host:port on which process 0 listens, for all processes the same; with
        `num_processes` and `process_id`, where no cluster tells them.
      num_processes: processes of the run.
      process_id: number of this one, from 0.
      cluster: "auto" asks Slurm, Open MPI, Cloud TPU or Kubernetes where one of them started this
        process; "off" makes it a run of its own.
      start_seconds: how long a process waits at the start for the others.
      silent_seconds: how long a process may give no sign of life before all others end.
      stall_seconds: how long a batch, or the result of a step, may take before all end.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster: Literal["auto", "off"] = "auto"
    start_seconds: int = 300
    silent_seconds: int = 35
    stall_seconds: int = 1800

    def __post_init__(self):
        for name in ("start_seconds", "silent_seconds", "stall_seconds"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}={value} must be positive: use at least 1")
        names = ("coordinator", "num_processes", "process_id")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            return
        if len(given) < len(names):
            missing = [name for name in names if name not in given]
            raise ConfigError(
                f"{' and '.join(given)} without {' and '.join(missing)}: give all three, or none"
                " of them where Slurm, Open MPI, Cloud TPU or Kubernetes starts the processes"
            )
        if self.cluster == "off":
            raise ConfigError(
                f"cluster='off' is for a process on its own, coordinator={self.coordinator!r} for"
                " several: leave one of them out"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        host, _, port = (self.coordinator or "").rpartition(":")
        if not host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise ConfigError(
                f"coordinator={self.coordinator!r} must be host:port with a port from 1 to 65535:"
                " use the name of the host of process 0 and a port that is free there, node0:1234,"
                " say"
            )
        count, number = self.num_processes or 0, self.process_id or 0
        if count < 1:
            raise ConfigError(f"num_processes={count} must be positive: use at least 1")
        if not 0 <= number < count:
            raise ConfigError(
                f"process_id={number} must lie in [0, num_processes={count}): processes are"
                f" numbered from 0 to {count - 1}"
            )


def find_group(config: DistributedConfig) -> Group | None:
    """The processes that this one belongs to; None for one on its own.

    Where the config names none, JAX is asked which cluster started this process.

    Raises:
      ConfigError: a cluster started it, but does not say what is needed.
    """
    if config.coordinator is not None:
        assert config.num_processes is not None and config.process_id is not None
        group = Group(config.coordinator, config.num_processes, config.process_id)
    elif config.cluster == "off" or (found := _ask_cluster(config.start_seconds)) is None:
        return None
    else:
        group = found
    return group if group.size > 1 else None


def _find_cluster() -> Any:
    """JAX's class for the cluster that started this process, or None."""
    in_job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster is clusters.K8sCluster and not in_job:
            continue  # it would ask the API server about a pod that belongs to no job
        if cluster is clusters.K8sCluster and importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "this pod is number JOB_COMPLETION_INDEX="
                f"{os.environ['JOB_COMPLETION_INDEX']} of a job, whose other pods cannot be found"
                " without the package kubernetes: install jax[k8s], or give --coordinator,"
                " --num-processes and --process-id as scripts/gke_jobset.yaml does, or"
                " --cluster off for a run of this pod alone"
            )
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster
    return None


def _ask_cluster(seconds: int) -> Group | None:
    """What the cluster that started this process knows about it; None where none did."""
    cluster = None
    try:
        cluster = _find_cluster()
        if cluster is None or (size := cluster.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cluster.get_coordinator_address(
            timeout_secs=seconds, override_coordinator_port=port
        )
        # On TPUs a process has all devices of its host.
        on_tpu = issubclass(cluster, clusters.cloud_tpu_cluster.BaseTpuCluster)
        local = None if on_tpu else cluster.get_local_process_id()
        return Group(address, size, cluster.get_process_id(), local)
    except ConfigError:
        raise
    except Exception as error:  # each cluster has its own ways to fail
        name = "the cluster" if cluster is None else cluster.__name__
        raise ConfigError(
            f"{name} that started this process does not tell its place among the others ({error}):"
            " give --coordinator, --num-processes and --process-id, or --cluster off"
        ) from error


@contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Joins the processes of a run for as long as the context lasts.

    Within it no process is left alone: one that dies, hangs or fails ends all others, with a line
    on stderr and exit status `watch.LOST`, at most 1.7 times `silent_seconds` later. Where there is
    one process only, nothing is done. Before it, JAX must not have computed anything.

    Raises:
      ConfigError: the processes cannot be found, or do not fit together.
    """
    global _watch
    group = find_group(config)
    if group is None:
        yield
        return
    # What processes on CPUs talk to each other by, and what makes them stop at the same step.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", True)
    _watch = Watch(group, config.start_seconds, config.silent_seconds, config.stall_seconds)
    deadline = time.monotonic() + config.start_seconds
    _wait_for_address(group, config.start_seconds)
    try:
        jax.distributed.initialize(
            group.address,
            group.size,
            group.number,
            local_device_ids=group.local_device,
            # By flags a process has all devices of its host, whatever started it.
            cluster_detection_method="deactivate",
            initialization_timeout=max(5, round(deadline - time.monotonic())),
            heartbeat_timeout_seconds=_watch.runtime_seconds,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the processes must meet before JAX is used ({error}): let the preset compute nothing"
        ) from error
    _watch.begin(runtime.global_state.client)
    try:
        _check_devices()
        yield
    except BaseException as error:
        _watch.failed(error)
        raise
    _watch.finish(jax.distributed.shutdown)
    _watch = None


def _wait_for_address(group: Group, seconds: int) -> None:
    """Returns when process 0 listens, or may begin to; ends this process after so many seconds."""
    assert _watch is not None
    host, _, port = group.address.rpartition(":")
    if group.number == 0:
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", int(port)), family=family, dualstack_ipv6=both):
                return
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} of coordinator {group.address}"
                f" ({error.strerror}): use another port, for all processes the same"
            ) from error
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                _watch.end(
                    f"process {group.number} of {group.size} has waited {seconds} s for process 0,"
                    f" which does not answer at {group.address} ({error.strerror or error}): start"
                    " it, and see that this host may connect to it; then start all"
                    f" {group.size} again"
                )
        time.sleep(0.2)


def _check_devices() -> None:
    """Raises ConfigError unless this process has its share of all devices."""
    local, total, count = jax.local_device_count(), jax.device_count(), jax.process_count()
    if local * count != total:
        raise ConfigError(
            f"process {jax.process_index()} has {local} of the {total} devices of {count}"
            " processes: start all processes with the same number of devices"
        )


def failed(error: BaseException) -> None:
    """Tells the other processes that this one ends by an error, before anything waits for them.

    Where the error comes from the end of another process, this one ends, too, with what is known
    about the other.
    """
    if _watch is not None:
        _watch.failed(error)


def resume_from(last_step: Callable[[], int | None]) -> None:
    """Says how to find the step that a restarted run goes on from, for messages."""
    if _watch is not None:
        _watch.last_step = last_step


def waiting_for(what: str) -> AbstractContextManager[None]:
    """A context in which the main thread waits for something that may never come."""
    return nullcontext() if _watch is None else _watch.waiting_for(what)


def of_process_0(name: str, value: str) -> str:
    """The value that process 0 has for something; the own one where there is one process.

    All processes have to ask for it, and as often; they wait for each other, without a collective.
    """
    client = runtime.global_state.client
    if client is None:
        return value
    _asked[name] += 1
    key = f"sparsex/given/{name}/{_asked[name]}"
    if runtime.global_state.process_id == 0:
        client.key_value_set(key, value)
    client.wait_at_barrier(key, DAY_MS)
    return client.blocking_key_value_get(key, DAY_MS)
