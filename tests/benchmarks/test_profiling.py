"""Which kernels take the time."""

import types

import pytest

from sparsex_jax import cli
from sparsex_jax.benchmarks.profiling import kernel_times


def namespace(**fields):
    return types.SimpleNamespace(**fields)


def test_kernels_are_those_of_the_gpu_streams_and_the_longest_come_first():
    def line(name, *events):
        return namespace(
            name=name, events=[namespace(name=kernel, duration_ns=ns) for kernel, ns in events]
        )

    gpu = [
        line("Stream #1", ("short", 2e6), ("long", 3e6), ("long", 4e6)),
        line("Stream #2", ("short", 1e6)),
        line("XLA Modules", ("jit_f", 9e6)),
    ]
    planes = [
        namespace(name="/host:CPU", lines=[line("Stream #1", ("python", 5e6))]),
        namespace(name="/device:GPU:0", lines=gpu),
    ]
    found = kernel_times(planes)
    assert list(found.items()) == [("long", [3, 4]), ("short", [2, 1])]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "profiled on a GPU, but JAX runs on cpu: use `sparsex bench attention`"),
        (("--top", "0"), "top=0 must be positive"),
        (("--lengths", "100"), "length=100 must be a multiple of 64"),
        (("--parts", "everything"), "invalid choice 'everything'"),
    ],
)
def test_what_cannot_be_profiled(arguments, problem, capsys):
    assert cli.run(["profile", *arguments]) == 2
    assert problem in capsys.readouterr().err
