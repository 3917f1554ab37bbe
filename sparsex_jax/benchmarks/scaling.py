"""How long work takes where chips and tokens grow together: modelled, nothing runs.

A step or a prefill is traced for ever more chips with as many tokens on each; its operations and
what it sends are counted, and divided by what chips and links do at best.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.ahead_of_time import TPU_TARGETS
from sparsex_jax.benchmarks import runner
from sparsex_jax.benchmarks.hlo import COLLECTIVES
from sparsex_jax.benchmarks.operations import count_operations, count_sent
from sparsex_jax.benchmarks.planned import (
    Prefill,
    TrainingStep,
    Work,
    absent_devices,
    rounds_of,
    trace,
)
from sparsex_jax.benchmarks.results import compiled_for
from sparsex_jax.benchmarks.rooflines import find_chip, link_seconds
from sparsex_jax.benchmarks.runner import Row, require_some
from sparsex_jax.config import ConfigError, TrainConfig
from sparsex_jax.parallel.mesh import make_mesh
from sparsex_jax.training.checkpoints import to_json

# By numbers of chips.
_SLICES = {math.prod(map(int, name.partition(":")[2].split("x"))): name for name in TPU_TARGETS}
# Stands in results files.
METHOD = (
    "modelled, not measured. arithmetic_seconds: operations of the traced program, attention as the"
    " kernels for TPUs do it, at the chip's peak. links_seconds: what a chip sends, as the trace"
    " asks for it (XLA may send more), dispatch in as many rounds as even choices take. On TPU v5e:"
    " all-gather, reduce-scatter and all-reduce over all four links, collective-permute over one,"
    " all-to-all as fast as the links that cross the middle of the slice's longer side. On GPUs:"
    " over NVLink in a host, over the network where there are several. Memory's bandwidth, latency"
    " and waiting for each other are not in it."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is modelled.

    Attributes:
      config: of the model and its training; the mesh has all chips along "seq".
      work: "training" or "prefill".
      target: "v5e", "h100" or "h200".
      chips: numbers of them, ascending.
      tokens: of each chip.
    """

    config: TrainConfig
    work: str
    target: str
    chips: tuple[int, ...]
    tokens: int

    def __post_init__(self):
        require_some(self, "chips")
        if self.target == "v5e" and not set(self.chips) <= set(_SLICES):
            raise ConfigError(
                f"chips={self.chips} must be slices of v5e: use {', '.join(map(str, _SLICES))}"
            )

    def describe(self) -> dict[str, Any]:
        """What the rows have in common, for the results file."""
        return {"config": to_json(self.config), "method": METHOD}


class Benchmark(runner.Benchmark[int]):
    """Models the time for `settings`, by the number of chips; see `runner.Benchmark`."""

    name = "scaling"
    fields = (
        "operations", *(f"{kind.replace('-', '_')}_bytes" for kind in COLLECTIVES),
        "arithmetic_seconds", *(f"{kind.replace('-', '_')}_seconds" for kind in COLLECTIVES),
        "links_seconds", "status", "note",
    )  # fmt: skip

    def __init__(self, settings: Settings, path, command: str, *, resume: bool = False):
        self.settings = settings
        for chips in settings.chips:
            self._work(chips)  # what cannot be split is refused before anything is traced
        super().__init__(settings.describe(), path, command, resume=resume)

    def hardware(self) -> dict[str, Any]:
        """What was modelled; no such chip was there."""
        return compiled_for(self._devices(self.settings.chips[0])[0])

    def _devices(self, chips: int) -> list[Any]:
        v5e = self.settings.target == "v5e"
        return absent_devices(_SLICES[chips] if v5e else self.settings.target, chips)

    def all_steps(self) -> list[int]:
        """The numbers of chips."""
        return list(self.settings.chips)

    def identity(self, step: int) -> Row:
        """The fields that tell rows apart."""
        settings = self.settings
        return {
            "system": "sparsex",
            "work": settings.work,
            "target": settings.target,
            "chips": step,
            "tokens": settings.tokens,
            "length": step * settings.tokens,
        }

    def run(self, step: int) -> Row:
        """The fields beyond `identity`."""
        work, devices = self._work(step), self._devices(step)
        sizes = {} if work.mesh is None else dict(work.mesh.shape)
        jaxpr, rounds = trace(work), rounds_of(work)
        sent = count_sent(jaxpr, sizes, rounds)
        chip = find_chip(devices[0].device_kind)
        assert chip is not None
        operations = count_operations(jaxpr, rounds)
        seconds = {kind: link_seconds(kind, size, step, chip) for kind, size in sent.items()}
        return {
            "operations": operations,
            **{f"{kind.replace('-', '_')}_bytes": size for kind, size in sent.items()},
            "arithmetic_seconds": operations / (chip.tflops * 1e12),
            **{f"{kind.replace('-', '_')}_seconds": x for kind, x in seconds.items()},
            "links_seconds": sum(seconds.values()),
            "status": "modelled",
        }

    def _work(self, step: int) -> Work:
        settings, length = self.settings, step * self.settings.tokens
        shape = dataclasses.replace(settings.config.mesh, data=1, fsdp=1, seq=-1, tensor=1)
        stage = dataclasses.replace(settings.config.stages[-1], length=length, batch_size=1)
        config = dataclasses.replace(settings.config, mesh=shape, stages=(stage,), accumulation=1)
        mesh = make_mesh(shape, self._devices(step))
        if settings.work == "prefill":
            return Prefill(config, length, mesh)
        return TrainingStep(config, 0, mesh)
