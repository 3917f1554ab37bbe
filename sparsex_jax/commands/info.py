"""`sparsex info`."""

import dataclasses
import os
import sys

from sparsex_jax.commands.arguments import parse


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Shows devices, versions, and for each primitive the implementation it would take and why."""


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    parse(Arguments, "info", arguments)
    import jax

    from pallas_kernels import dispatch
    from sparsex_jax.benchmarks.results import hardware
    from sparsex_jax.training.checkpoints import versions

    machine = hardware()
    print(f"{'python':<18}{sys.version.split()[0]}, {os.cpu_count()} CPU cores")
    for name, version in versions().items():
        print(f"{name:<18}{version}")
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    print(f"{jax.default_backend():<18}{machine['count']} x {machine['kind']}{driver}")
    for primitive, implementation, reason in dispatch.explain():
        print(f"{primitive}: {implementation} ({reason})")
