"""Where the kernels of accelerators run in tests."""

import pytest

from tests.pallas_kernels.hopper_interpreter import interpret


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def hopper(request):
    """Kernels for Hopper GPUs run: interpreted on the CPU, or on a GPU (make test-gpu)."""
    if request.param == "gpu":
        yield
        return
    with interpret():
        yield


@pytest.fixture(autouse=True)
def optimized_kernels(optimized):
    """Without optimizations an interpreted kernel was not the same to the bit twice."""
