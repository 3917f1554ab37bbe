"""`sparsex profile`."""

import dataclasses
from typing import TYPE_CHECKING

import rich.console

from sparsex_jax.benchmarks.names import Direction, Part, Selection
from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands.arguments import format_length, make_console, parse, parse_lengths
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.profiling import Profile


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Names the GPU's kernels that the attention op, or a part of it, spends its time in.

    Nothing is compared and nothing is stored: that is `sparsex bench attention`.

    Attributes:
      lengths: tokens of the sequence, a multiple of 64 from 1K on; 4096, 16K and 1M are understood.
      parts: what to profile.
      direction: forward alone, or with the backward pass.
      query_heads: Hq.
      kv_heads: Hkv; each serves a group of query heads.
      head_dim: width of a head.
      implementation: of the primitives (mosaic_gpu, xla, reference); by default what `sparsex info`
        names.
      selection: of blocks; with "correlated" neighbouring tokens share about 80 % of theirs.
      top: kernels to name, those that take longest.
      seed: decides the inputs.
    """

    lengths: tuple[str, ...] = ("128K",)
    parts: tuple[Part, ...] = ("op",)
    direction: Direction = "forward"
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    implementation: str | None = None
    selection: Selection = "random"
    top: int = 15
    seed: int = 0


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    parsed = parse(Arguments, "profile", arguments)
    lengths = parse_lengths(parsed.lengths)
    if parsed.top < 1:
        raise ConfigError(f"top={parsed.top} must be positive: use 15, say")
    import jax

    from sparsex_jax.benchmarks import cases
    from sparsex_jax.benchmarks.profiling import profile_case
    from sparsex_jax.benchmarks.workload import Workload

    works = [
        Workload(
            length, parsed.query_heads, parsed.kv_heads, parsed.head_dim,
            selection=parsed.selection, implementation=parsed.implementation, seed=parsed.seed,
        )
        for length in lengths
    ]  # fmt: skip
    if jax.default_backend() != "gpu":
        raise ConfigError(
            f"kernels are profiled on a GPU, but JAX runs on {jax.default_backend()}: use `sparsex"
            " bench attention` for the times of the parts"
        )
    found = cases.find_cases(parsed.parts, parsed.direction)
    chosen = [case for case in found if case.system == "sparsex"]
    if not chosen:
        raise ConfigError(
            f"parts={' '.join(parsed.parts) or 'none'} have no {parsed.direction}: use"
            " --direction forward, or name other parts"
        )
    console = make_console()
    for work in works:
        for case in chosen:
            name = f"{format_length(work.tokens)} {case.part}, {parsed.direction}"
            _print(console, name, profile_case(case, work, parsed.direction), parsed.top)


def _print(console: rich.console.Console, name: str, found: "Profile", top: int) -> None:
    """Prints the time of a call, and of its kernels."""
    whole = format_number(found.milliseconds)
    busy = format_number(sum(map(sum, found.kernels.values())))
    launches = sum(map(len, found.kernels.values()))
    memory = f"{found.temporaries / 2**30:.2f} GiB"
    text = f"{name}: {whole} ms; kernels {busy} ms in {launches} launches; temporaries {memory}"
    console.print(text, markup=False, soft_wrap=True)
    for kernel, times in list(found.kernels.items())[:top]:
        line = f"{sum(times):12.3f} ms {len(times):6d} x  {kernel}"
        console.print(line, markup=False, no_wrap=True, crop=True)
