"""Tokens a second of a model that reads a long context in chunks, and the memory that it takes."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsex_jax.benchmarks import runner
from sparsex_jax.benchmarks.decode import relative_error
from sparsex_jax.benchmarks.runner import Row, require_positive, require_some
from sparsex_jax.benchmarks.timing import OutOfMemory, measure
from sparsex_jax.cache import CacheMemoryError, Engine, Tier
from sparsex_jax.cache.engine import SUFFIX_UNIT
from sparsex_jax.cache.layer import empty_layers
from sparsex_jax.cache.memory import Shape
from sparsex_jax.cache.model import attending_tokens, extend
from sparsex_jax.config import ConfigError, ModelConfig
from sparsex_jax.modules import Transformer

TOLERANCE = 0.05  # of logits, relative in norm: bfloat16 throughout, in another order


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      lengths: tokens of the context, ascending.
      chunk: tokens read at a time.
      tiers: of the cache; each length is measured in all of them.
      samples: times taken for a row, at most.
      seconds: time budget of a row; a prefill that takes longer is timed once.
      check_length: where chunked reading is compared with the forward pass; None for nowhere.
      seed: decides the tokens.
    """

    lengths: tuple[int, ...]
    chunk: int
    tiers: tuple[Tier, ...]
    samples: int
    seconds: float
    check_length: int | None
    seed: int

    def __post_init__(self):
        require_some(self, "lengths", "tiers")
        require_positive(self, "chunk", "samples", "seconds")
        if self.lengths[-1] >= 2**31:
            raise ConfigError(f"length={self.lengths[-1]} must be below 2^31: use 1024M, say")

    def tokens(self, length: int, vocab_size: int) -> np.ndarray:
        """Random tokens, int32 [1, length]."""
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, vocab_size, (1, length), dtype=np.int32)


class Step(NamedTuple):
    """A row to measure."""

    length: int
    tier: Tier


class Benchmark(runner.Benchmark[Step]):
    """Times prefills of a model; see `runner.Benchmark`.

    Args:
      model: what reads.
      describe: what the rows have in common beside the settings: the model, by name and config.
    """

    name = "prefill"
    fields = (
        "milliseconds", "milliseconds_q1", "milliseconds_q3", "samples", "tokens_per_second",
        "cache_bytes", "host_bytes", "peak_bytes", "max_error", "status", "note",
    )  # fmt: skip

    def __init__(
        self,
        model: Transformer,
        describe: dict[str, Any],
        settings: Settings,
        path: Path,
        command: str,
        *,
        resume: bool = False,
    ):
        config = describe | dataclasses.asdict(settings)
        for name in ("lengths", "chunk", "tiers"):  # they stand in the rows
            del config[name]
        super().__init__(config, path, command, resume=resume)
        self.model, self.settings = model, settings
        self.error: float | None = None

    def all_steps(self) -> list[Step]:
        """A step for each row, in order: peaks of the device's memory only rise."""
        small_first = [x for x in ("compressed", "host", "device") if x in self.settings.tiers]
        return [Step(length, tier) for length in self.settings.lengths for tier in small_first]

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        config = self.model.config
        return {
            "system": "sparsex",
            "part": "prefill",
            "tokens": step.length,
            "layers": config.layers,
            "query_heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "chunk": self.settings.chunk,
            "tier": step.tier,
        }

    def check(self) -> None:
        """Compares logits after a chunked prefill with those of the forward pass."""
        length = self.settings.check_length
        assert length is not None
        tokens = self.settings.tokens(length, self.model.config.vocab_size)
        expected = nnx.jit(lambda model: model.logits(model(tokens)[:, -1]))(self.model)
        chunk = max(1, length // 4)
        step = nnx.jit(extend)
        layers = empty_layers(self.model.config, length, 1, chunk)
        for begin in range(0, length, chunk):
            part = jnp.asarray(tokens[:, begin : begin + chunk])
            found, layers = step(
                self.model, layers, part, jnp.int32(begin), jnp.int32(part.shape[1])
            )
        assert found is not None
        self.error = relative_error(found, expected)

    def run(self, step: Step) -> Row:
        """The fields beyond `identity`."""
        settings = self.settings
        if self.error is not None and not self.error <= TOLERANCE:
            note = (
                f"logits after {settings.check_length} tokens differ from the forward pass by"
                f" {self.error:.3g}, over {TOLERANCE:g}"
            )
            return {"status": "wrong", "note": note}
        try:
            engine = Engine(self.model, step.length, chunk=settings.chunk, tier=step.tier)
        except CacheMemoryError as error:
            raise OutOfMemory(str(error)) from error
        tokens = settings.tokens(step.length, engine.vocab_size)
        before = _peak_bytes()
        # Compiles: the last chunk is read by another program than those that others follow.
        engine.prefill(tokens[:, : 2 * settings.chunk]).block_until_ready()

        def prefill() -> None:
            engine.prefill(tokens).block_until_ready()

        timing = measure(prefill, settings.samples, settings.seconds)
        q1, median, q3 = timing.quartiles()
        peak, notes = _peak_bytes(), []
        if peak is not None and peak == before:
            peak = None
            notes.append("an earlier part of this process took as much memory or more")
        notes += _who_attends(self.model.config, settings.chunk)
        cache = Shape(engine.config, step.length, 1, settings.chunk + SUFFIX_UNIT)
        return {
            "milliseconds": median,
            "milliseconds_q1": q1,
            "milliseconds_q3": q3,
            "samples": len(timing.seconds),
            "tokens_per_second": step.length / median * 1e3,
            "cache_bytes": cache.cache_bytes(step.tier),
            "host_bytes": cache.needed(step.tier).host,
            "peak_bytes": peak,
            "max_error": self.error,
            "status": "measured",
            "note": "; ".join(notes) or None,
        }


def _who_attends(config: ModelConfig, chunk: int) -> list[str]:
    """A remark where not all tokens of a chunk attend in sparse layers."""

    def most(goes_on: bool) -> int:
        counts = attending_tokens(config, chunk, logits=False, goes_on=goes_on)
        return max(
            (n for n, x in zip(counts, config.layers, strict=True) if x == "s"), default=chunk
        )

    if most(goes_on=True) == chunk:
        return []
    return [
        f"in sparse layers {most(goes_on=True)} tokens of a chunk attend, {most(goes_on=False)} of"
        " the last: nobody reads the others' output"
    ]


def _peak_bytes() -> int | None:
    """The most memory that this process has taken of the device; None where it does not count."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
