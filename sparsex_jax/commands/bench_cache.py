"""`sparsex bench decode` and `sparsex bench prefill`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsex_jax.benchmarks.names import DECODE_PARTS, DecodePart
from sparsex_jax.benchmarks.tables.cells import format_number
from sparsex_jax.commands.arguments import SHIPPED_MODEL, parse_length
from sparsex_jax.commands.running import given_settings, run_benchmark
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.benchmarks.runner import Row


@dataclasses.dataclass(frozen=True)
class DecodeArguments:
    """Times the attention of one decoding step over a full cache against dense attention over it.

    Part "writing" is what it takes to remember the step's token: keys, values, features, landmarks.

    The cache has random keys, in bfloat16. A sample is a loop of steps in one program, each of
    which needs the one before, so that launching from the host does not count. Nothing gets a time
    whose output differs from a reference in float32; the command then exits with 1.

    Attributes:
      lengths: tokens in the cache, a multiple of 64 from 1K on; 4096, 16K and 1M are understood.
      parts: what to time; "op" is all of them with fusion, and comes with dense attention (cuDNN's
        and XLA's on a GPU).
      query_heads: Hq.
      kv_heads: Hkv; each serves a group of query heads.
      head_dim: width of a head.
      implementation: of the primitives (mosaic_gpu, xla); by default what `sparsex info` names.
      steps: decoding steps of a sample.
      samples: times taken for a row, at most.
      seconds: time budget of a row.
      seed: decides the inputs.
      out: results file (JSON); by default results/HARDWARE/decode.json (cpu, h200, ...).
      resume: keeps the rows that the file has, except failed ones, and measures the others.
    """

    lengths: tuple[str, ...] = ("4K", "128K", "1M", "4M")
    parts: tuple[DecodePart, ...] = DECODE_PARTS
    query_heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    implementation: str | None = None
    steps: int = 64
    samples: int = 20
    seconds: float = 10.0
    seed: int = 0
    out: Path | None = None
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class PrefillArguments:
    """Times how a model reads a long context in chunks, and the device memory that this takes.

    Logits after a chunked prefill are first compared with those of the forward pass; if they
    differ, nothing is timed and the command exits with 1. Tokens are random. In the last layer
    nobody attends in a prefill, and few do in a layer before local ones; give --layers to see what
    another order costs.

    Attributes:
      checkpoint: directory of a model; by default the one that comes with sparsex.
      preset: a Python file like configs/nano.py, whose model is taken with random weights instead.
      layers: letters of the preset's layers, "lsls" say, instead of its own.
      lengths: tokens; 4096, 16K and 1M are understood.
      chunk: tokens read at a time; in the tier host at most 32704.
      tiers: where keys and values of old blocks are kept: device, host or compressed.
      samples: times taken for a row, at most.
      seconds: time budget of a row; a prefill that takes longer is timed once.
      check_length: where the comparison is made; 0 for nowhere.
      seed: decides the tokens, and the weights of a preset.
      out: results file (JSON); by default results/HARDWARE/prefill.json (cpu, h200, ...).
      resume: keeps the rows that the file has, except failed ones, and measures the others.
    """

    checkpoint: Path = SHIPPED_MODEL
    preset: Path | None = None
    layers: str | None = None
    lengths: tuple[str, ...] = ("1M", "4M", "16M", "64M")
    chunk: str = "16K"
    tiers: tuple[Literal["device", "host", "compressed"], ...] = ("device",)
    samples: int = 5
    seconds: float = 60.0
    check_length: str = "4K"
    seed: int = 0
    out: Path | None = None
    resume: bool = False


def decode(arguments: DecodeArguments, command: str) -> int:
    """Runs the command, which is quoted in what it writes; 1 if a row is wrong or failed."""
    from sparsex_jax.benchmarks.decode import Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable, default_path

    path = arguments.out or default_path("decode")
    settings = Settings(**given_settings(arguments))
    check_writable(path)
    return run_benchmark(
        Benchmark(settings, path, command, resume=arguments.resume), _describe_decode
    )


def prefill(arguments: PrefillArguments, command: str) -> int:
    """Runs the command, which is quoted in what it writes; 1 if a row is wrong or failed."""
    from sparsex_jax.benchmarks.prefill import Benchmark, Settings
    from sparsex_jax.benchmarks.results import check_writable, default_path

    path = arguments.out or default_path("prefill")
    given = given_settings(arguments)
    for name in ("checkpoint", "preset", "layers"):
        del given[name]
    check = arguments.check_length
    given["chunk"] = parse_length(arguments.chunk, "chunk")
    given["check_length"] = None if check == "0" else parse_length(check, "check_length")
    settings = Settings(**given)
    check_writable(path)
    model, described = _load(arguments)
    benchmark = Benchmark(model, described, settings, path, command, resume=arguments.resume)
    checks = [("comparing with the forward pass", benchmark.check)]
    wanted = settings.check_length is not None and benchmark.steps()
    return run_benchmark(benchmark, _describe_prefill, checks if wanted else ())


def _load(arguments: PrefillArguments):
    """The model, and what it is, for the results file."""
    from flax import nnx

    from sparsex_jax.commands.model import load, name_of, on_cpu
    from sparsex_jax.commands.train import load_preset
    from sparsex_jax.modules import Transformer
    from sparsex_jax.training import model_crc32
    from sparsex_jax.training.checkpoints import to_json

    if arguments.preset is None:
        if arguments.layers is not None:
            raise ConfigError(
                f"layers={arguments.layers!r} is for a preset: give --preset configs/nano.py, or"
                " leave it out"
            )
        model, _, _ = load(arguments.checkpoint)
        described = {
            "model_name": name_of(arguments.checkpoint),
            "model_crc32": model_crc32(arguments.checkpoint),
        }
        return model, described | {"model": to_json(model.config)}
    config = load_preset(arguments.preset).model
    if arguments.layers is not None:
        config = dataclasses.replace(config, layers=arguments.layers)
    if on_cpu():
        config = dataclasses.replace(config, dtype="float32")
    model = nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(arguments.seed)))()
    described = {"model_name": f"{arguments.preset}, random weights", "model_crc32": None}
    return model, described | {"model": to_json(config)}


def _describe_decode(row: "Row") -> str:
    parts = [f"{format_number(row['milliseconds'])} ms a step"]
    if row["speedup_over_dense"] and row["system"] == "sparsex":
        parts.append(f"{format_number(row['speedup_over_dense'])} times as fast as dense")
    return ", ".join(parts)


def _describe_prefill(row: "Row") -> str:
    parts = [
        f"{row['tokens_per_second']:,.0f} tokens a second",
        f"cache {row['cache_bytes'] / 2**30:.2f} GiB",
    ]
    if row["peak_bytes"] is not None:
        parts.append(f"peak {row['peak_bytes'] / 2**30:.2f} GiB")
    return ", ".join(parts)
