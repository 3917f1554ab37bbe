import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.benchmarks import rooflines, timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only calls move on: `clock.cost` seconds each."""

    class Clock:
        now, cost, calls = 0.0, 1.0, 0

        def perf_counter(self):
            return self.now

        def call(self):
            self.now += self.cost
            self.calls += 1
            return jnp.zeros(())

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    return clock


@pytest.mark.parametrize(
    ("cost", "budget", "samples", "calls"),
    [
        (1e-4, 10, 20, 500),  # short calls are taken together
        (1e-9, 10, 20, 1000),
        (1, 10, 10, 1),  # the budget ends it
        (30, 10, 1, 1),  # one, though longer than the budget
    ],
)
def test_samples_and_budget(cost, budget, samples, calls, clock):
    clock.cost = cost
    found = timing.measure(clock.call, 20, budget)
    assert (len(found.seconds), found.calls) == (samples, calls)
    np.testing.assert_allclose(found.seconds, cost, rtol=1e-3)
    assert clock.now <= 3.1 * max(cost, budget)


def test_quartiles():
    found = timing.Timing(np.arange(1, 6) / 1e3, 1).quartiles()
    np.testing.assert_allclose(found, (2, 3, 4))


def test_memory_is_checked_before_anything_runs(monkeypatch):
    spec = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    run, temporaries = timing.compile_program(lambda x: jnp.sort(x) @ x, spec)
    assert temporaries >= spec.size * 4  # the sorted array
    assert run(jnp.ones(spec.shape)).shape == spec.shape
    monkeypatch.setattr(timing, "device_memory", lambda: 2**20)
    with pytest.raises(timing.OutOfMemory, match="of 0.0 GiB"):
        timing.compile_program(lambda x: jnp.sort(x) @ x, spec)


def test_rooflines():
    h200 = rooflines.find_chip("NVIDIA H200")
    assert (h200.tflops, h200.gigabytes) == (989.4, 4800)
    assert rooflines.find_chip("NVIDIA H100 80GB HBM3").gigabytes == 3350
    assert rooflines.find_chip("NVIDIA A100-SXM4-80GB").tflops == 312
    assert rooflines.find_chip("TPU v5 lite").tflops == 197
    for kind in ("cpu", "NVIDIA H100 PCIe", "TPU v5p"):
        assert rooflines.find_chip(kind) is None
    assert rooflines.least_seconds(989.4e12, 1, h200) == pytest.approx(1)
    assert rooflines.least_seconds(1, 4800e9, h200) == pytest.approx(1)
