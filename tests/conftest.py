"""For all tests: the CPU unless told otherwise, compiled programs kept on disk, fixed examples."""

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

import jax  # noqa: E402  (after what it looks at when it is imported)

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


@pytest.fixture(scope="session")
def project():
    """The root of the source tree."""
    return pathlib.Path(__file__).parents[1]
