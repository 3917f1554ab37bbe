"""For all tests: the CPU unless told otherwise, compiled programs kept on disk, fixed examples."""

import contextlib
import os
import pathlib
import sys

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Interpreted kernels are threads that wait for each other: with fewer in the pool they may hang.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))
# The compilers for GPUs (scripts/setup.sh compiler), which JAX looks for when it is imported.
sys.path.append(str(pathlib.Path(sys.prefix) / "compiler"))
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "sparsex" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most programs run once or twice: optimizing them took longer than they do.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax  # noqa: E402  (after what it looks at when it is imported)

from pallas_kernels import ahead_of_time  # noqa: E402

hypothesis.settings.register_profile(
    "sparsex",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sparsex")


@pytest.fixture(scope="module", autouse=True)
def let_programs_go():
    """After a module its compiled programs go: a worker had 4 GiB of them, and crashed twice."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def compile_fully_for_accelerators():
    """What is compiled for them is compiled as for use."""
    compile_as_always = ahead_of_time._compile

    def compile_fully(*args, **kwargs):
        with _optimized():
            return compile_as_always(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead_of_time, "_compile", compile_fully)
        yield


@contextlib.contextmanager
def _optimized():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def optimized():
    """For a test whose programs work for long, or that looks at what the compiler makes of them."""
    with _optimized():
        yield


@pytest.fixture(scope="session")
def project():
    """The root of the source tree."""
    return pathlib.Path(__file__).parents[1]
