"""The search for the fastest config of each kernel, among those that compute the right results."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import dispatch, tuning
from sparsex_jax.benchmarks.attention import describe_errors
from sparsex_jax.benchmarks.kernel_cases import KernelCase, make_case
from sparsex_jax.benchmarks.results import check_writable, provenance
from sparsex_jax.benchmarks.runner import judge, require_positive, require_some
from sparsex_jax.benchmarks.timing import compile_program, measure
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.config import AttentionConfig, ConfigError

ATTENTION = AttentionConfig()
_ENTRIES_GROUPS = (8, 16)  # query heads per KV head that block-sparse attention does not pad
_MOST_GROUPS = 16


class Step(NamedTuple):
    """A kernel to tune, at a head dimension."""

    kernel: tuning.Kernel
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is tuned, at which shapes.

    Attributes:
      kernels: names of kernels, or of primitives for all of theirs.
      head_dims: widths of a head; of features, for block selection.
      length: tokens.
      query_heads: Hq.
      kv_heads: Hkv.
      samples: times taken for each candidate, at most.
      seconds: time budget of a candidate.
      seed: of the operands.

    Raises:
      ConfigError: a value is not allowed, or kernels do not take it.
    """

    kernels: tuple[str, ...] = dispatch.PRIMITIVES
    head_dims: tuple[int, ...] = (64, 128)
    length: int = 1 << 17
    query_heads: int = 16
    kv_heads: int = 2
    samples: int = 20
    seconds: float = 2.0
    seed: int = 0

    def __post_init__(self):
        require_some(self, "kernels", "head_dims")
        require_positive(self, "samples", "seconds")
        known = tuning.kernels()
        for name in self.kernels:
            if name not in known and name not in dispatch.PRIMITIVES:
                names = ", ".join((*dispatch.PRIMITIVES, *known))
                raise ConfigError(f"kernels={name!r} is not known: use {names}")
        steps = self.steps()
        for head_dim in self.head_dims:
            if head_dim not in {step.head_dim for step in steps}:
                taken = {dim for kernel in self._chosen() for dim in kernel.head_dims}
                raise ConfigError(
                    f"head_dims={head_dim} is taken by none of the kernels: use"
                    f" {', '.join(map(str, sorted(taken)))}"
                )
        for step in steps:
            self._check_groups(step.kernel, self.workload(step))

    def _check_groups(self, kernel: tuning.Kernel, work: Workload) -> None:
        groups = f"query_heads={self.query_heads} are {work.groups} for each of"
        groups += f" kv_heads={self.kv_heads}, but"
        if kernel.primitive == "block_sparse_attention" and work.groups not in _ENTRIES_GROUPS:
            raise ConfigError(f"{groups} {kernel.name} takes 8 or 16: use {8 * self.kv_heads}")
        if work.groups > _MOST_GROUPS:
            raise ConfigError(f"{groups} {kernel.name} takes 16 at most: use {16 * self.kv_heads}")

    def _chosen(self) -> list[tuning.Kernel]:
        return [
            kernel
            for name, kernel in tuning.kernels().items()
            if not {name, kernel.primitive}.isdisjoint(self.kernels)
        ]

    def steps(self) -> list[Step]:
        """The chosen kernels with those of the head dimensions that they take."""
        return [
            Step(kernel, head_dim)
            for kernel in self._chosen()
            for head_dim in sorted(set(self.head_dims))
            if head_dim in kernel.head_dims
        ]

    def workload(self, step: Step) -> Workload:
        """The shapes of a step."""
        config = ATTENTION
        if step.kernel.primitive == "block_selection":
            config = dataclasses.replace(config, score_dim=step.head_dim)
        return Workload(
            self.length, self.query_heads, self.kv_heads, step.head_dim, config, seed=self.seed
        )


class Trial(NamedTuple):
    """What was found out about a candidate.

    Attributes:
      config: of the kernel.
      status: "measured", or why it has no time: "wrong", "failed", "out_of_memory".
      note: more about that.
      milliseconds: first quartile, median and third quartile of a call; None without a time.
      samples: times taken.
    """

    config: Any
    status: str
    note: str | None = None
    milliseconds: tuple[float, float, float] | None = None
    samples: int = 0

    @property
    def median(self) -> float:
        """Milliseconds; inf without a time."""
        return self.milliseconds[1] if self.milliseconds else math.inf


class Tuner:
    """Tunes kernel after kernel, and stores the result of each.

    Args:
      settings: what to tune.
      folder: of the files of tuned configs.
      command: as typed.
      resume: passes over what the device's file has.

    Raises:
      ConfigError: there is no Hopper GPU, or the file cannot be written.
      ValueError: the file is broken.
    """

    def __init__(self, settings: Settings, folder: Path, command: str, *, resume: bool = False):
        device = dispatch.target_device()
        if why_not := dispatch.not_hopper(device):
            raise ConfigError(f"tuning {why_not}")
        self.settings, self.command, self.device_kind = settings, command, device.device_kind
        self.path = tuning.path_for(folder, self.device_kind)
        check_writable(self.path)
        found = tuning.load(self.path)
        self.kept = {key for key in found if resume}

    def steps(self) -> list[Step]:
        """What is still to tune."""
        return [
            step
            for step in self.settings.steps()
            if (step.kernel.name, step.head_dim) not in self.kept
        ]

    def try_all(self, step: Step) -> Iterator[Trial]:
        """Tries one candidate after the other, the default first."""
        case = make_case(step.kernel, self.settings.workload(step))
        for config in step.kernel.candidates(step.head_dim):
            yield self._try(case, config)

    def _try(self, case: KernelCase, config: Any) -> Trial:
        try:
            specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.operands)
            run, _ = compile_program(functools.partial(case.run, config), *specs)
            errors = case.compare(run(*case.operands))
            if not all(error.value <= error.tolerance for error in errors):
                return Trial(config, "wrong", describe_errors(errors))
            settings = self.settings
            timing = measure(lambda: run(*case.operands), settings.samples, settings.seconds)
        except Exception as error:
            return Trial(config, *judge(error))
        return Trial(config, "measured", None, timing.quartiles(), len(timing.seconds))

    def conclude(self, step: Step, trials: list[Trial]) -> Trial | None:
        """Stores the best candidate of a step and returns it; None if none is right."""
        best = choose_best(trials)
        if best is not None:
            evidence = self._evidence(best, trials)
            tuning.store(
                self.path, self.device_kind, step.kernel, step.head_dim, best.config, evidence
            )
        return best

    def _evidence(self, best: Trial, trials: list[Trial]) -> dict[str, Any]:
        settings = self.settings
        return {
            **_times(best),
            "samples": best.samples,
            "default": {"config": dataclasses.asdict(trials[0].config), **_times(trials[0])},
            "candidates": dict(collections.Counter(trial.status for trial in trials)),
            "tokens": settings.length,
            "query_heads": settings.query_heads,
            "kv_heads": settings.kv_heads,
            "seed": settings.seed,
            "command": self.command,
            **provenance(),
        }


def _times(trial: Trial) -> dict[str, float | None]:
    q1, median, q3 = trial.milliseconds or (None, None, None)
    return {"milliseconds": median, "milliseconds_q1": q1, "milliseconds_q3": q3}


def choose_best(trials: list[Trial]) -> Trial | None:
    """The fastest of the measured trials, the first of which is the default's; None if none is.

    Only a candidate whose third quartile is below the default's first one is faster than it.
    """
    default, best = trials[0], min(trials, key=lambda trial: trial.median)
    if best.milliseconds is None:
        return None
    if default.milliseconds is None or best.milliseconds[2] < default.milliseconds[0]:
        return best
    return default
