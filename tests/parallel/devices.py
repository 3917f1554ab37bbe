"""Tests on simulated devices: they run in one other process, for JAX counts devices only once."""

import atexit
import concurrent.futures
import concurrent.futures.process
import functools
import multiprocessing
import os

COUNT = 8
# On a machine with more to do devices wait long for each other; XLA would end the process.
_FLAGS = (
    f"--xla_force_host_platform_device_count={COUNT}"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
_HERE = "SPARSEX_TEST_DEVICES"


@functools.cache
def _process():
    executor = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    )
    atexit.register(executor.shutdown, cancel_futures=True)
    names = _HERE, "XLA_FLAGS", "JAX_ENABLE_COMPILATION_CACHE"
    before = {name: os.environ.get(name) for name in names}
    os.environ[_HERE] = "1"
    os.environ["XLA_FLAGS"] = f"{before['XLA_FLAGS'] or ''} {_FLAGS}".strip()
    # Programs that XLA reads back from the cache no longer keep their collectives in order.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    try:
        executor.submit(os.getpid).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return executor


def on_devices(test):
    """A test that runs where JAX has COUNT devices; its arguments are sent there."""

    @functools.wraps(test)
    def send(*args, **kwargs):
        if _HERE in os.environ:
            return test(*args, **kwargs)
        try:
            return _process().submit(send, *args, **kwargs).result()
        except concurrent.futures.process.BrokenProcessPool:
            _process.cache_clear()  # the next test gets another process
            raise

    return send


def compile_quickly(lowered):
    """Compiles a lowered program without what makes it fast."""
    return lowered.compile({
        "xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 2
    })  # fmt: skip
