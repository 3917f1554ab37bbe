"""Bytes that attention over a split sequence sends, counted in programs compiled for TPU slices."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.ahead_of_time import TPU_TARGETS, compile_for
from sparsex_jax.benchmarks import runner
from sparsex_jax.benchmarks.hlo import COLLECTIVES, Program
from sparsex_jax.benchmarks.names import Strategy
from sparsex_jax.benchmarks.planned import absent_devices
from sparsex_jax.benchmarks.results import compiled_for
from sparsex_jax.benchmarks.runner import Row, require_some
from sparsex_jax.config import AttentionConfig, ConfigError, MeshConfig
from sparsex_jax.parallel.costs import dispatch_bytes, ring_bytes
from sparsex_jax.parallel.dispatch import plan_rounds
from sparsex_jax.parallel.mesh import make_mesh
from sparsex_jax.parallel.sequence import sparse_attention

PATH = Path("results") / "tpu-v5e" / "traffic.json"
FIELDS = tuple(f"{kind.replace('-', '_')}_bytes" for kind in COLLECTIVES)
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled: the op, forward and backward, of a sequence that all chips share.

    Attributes:
      targets: of TPU_TARGETS, ascending.
      strategies: of sequence parallelism.
      tokens: of each chip.
      query_heads: Hq.
      kv_heads: Hkv.
      head_dim: D.
    """

    targets: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    tokens: int
    query_heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self):
        require_some(self, "targets", "strategies")
        for target in self.targets:
            if target not in TPU_TARGETS:
                raise ConfigError(f"target={target!r} must be one of {', '.join(TPU_TARGETS)}")

    def describe(self) -> dict[str, Any]:
        """What the rows have in common, for the results file; the rest stands in them."""
        return {
            "attention": dataclasses.asdict(AttentionConfig()),
            "dtype": jnp.dtype(DTYPE).name,
            "direction": "forward_backward",
            "method": "bytes that a chip sends: operands of the collectives of the compiled"
            " program, times (P - 1) / P of an all-to-all or a reduce-scatter, P - 1 of an"
            " all-gather, 2 (P - 1) / P of an all-reduce; loops times their trips, those of"
            " dispatch times the rounds that even choices take",
        }


class Step(NamedTuple):
    """A row to compile."""

    target: str
    strategy: Strategy


class Benchmark(runner.Benchmark[Step]):
    """Compiles the op for `settings`; see `runner.Benchmark`."""

    name = "traffic"
    fields = (*FIELDS, "total_bytes", "rule_bytes", "rounds", "temporary_bytes", "status", "note")

    def __init__(self, settings: Settings, path: Path, command: str, *, resume: bool = False):
        self.settings = settings
        super().__init__(settings.describe(), path, command, resume=resume)

    def hardware(self) -> dict[str, Any]:
        """What was compiled for; no such chip was there."""
        return compiled_for(absent_devices(self.settings.targets[0])[0])

    def all_steps(self) -> list[Step]:
        """A step for each row, in order."""
        settings = self.settings
        return [Step(x, strategy) for x in settings.targets for strategy in settings.strategies]

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        settings = self.settings
        return {
            "system": "sparsex",
            "strategy": step.strategy,
            "target": step.target,
            "chips": len(absent_devices(step.target)),
            "tokens": settings.tokens,
            "query_heads": settings.query_heads,
            "kv_heads": settings.kv_heads,
            "head_dim": settings.head_dim,
        }

    def run(self, step: Step) -> Row:
        """The fields beyond `identity`."""
        settings, chips = self.settings, absent_devices(step.target)
        sizes = len(chips), 1, settings.tokens
        heads = settings.query_heads, settings.kv_heads, settings.head_dim
        itemsize, count = jnp.dtype(DTYPE).itemsize, AttentionConfig().top_k
        rounds = plan_rounds(*sizes, settings.query_heads, settings.head_dim, count).expected
        if step.strategy == "ring":
            rule, rounds = ring_bytes(*sizes, *heads[1:], itemsize), 0
        else:
            rule = dispatch_bytes(*sizes, *heads, itemsize, count)
        compilation = compile_op(settings, step, chips)
        sent = Program(compilation.executable.as_text(), max(rounds, 1)).sent()
        return {
            **dict(zip(FIELDS, (sent[kind] for kind in COLLECTIVES), strict=True)),
            "total_bytes": sum(sent.values()),
            "rule_bytes": rule,
            "rounds": rounds,
            "temporary_bytes": compilation.temporary_bytes,
            "status": "compiled",
            "note": "compiled, not run",
        }


def compile_op(settings: Settings, step: Step, chips: list[Any]):
    """The op and its gradients, of a sequence split over all chips."""
    mesh = make_mesh(MeshConfig(fsdp=1, seq=-1), chips)
    assert mesh is not None
    config, split = AttentionConfig(), P(None, "seq")
    tokens = settings.tokens * len(chips)

    def spec(length, *shape, dtype=DTYPE):
        sharding = NamedSharding(mesh, split)
        return jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=sharding)

    query, key = ((n, settings.head_dim) for n in (settings.query_heads, settings.kv_heads))
    features = settings.kv_heads, config.score_dim
    inputs = {
        "q": spec(tokens, *query),
        "k": spec(tokens, *key),
        "v": spec(tokens, *key),
        "salience": spec(tokens, settings.kv_heads, dtype=jnp.float32),
        "query_features": spec(tokens, *features),
        "block_features": spec(tokens // config.block_size, *features),
        "landmark_gate": spec(tokens, settings.query_heads, dtype=jnp.float32),
        "dynamic_gate": spec(tokens, settings.query_heads, dtype=jnp.float32),
    }

    def both(inputs, out_bar):
        def attend(inputs):
            return sparse_attention(**inputs, config=config, strategy=step.strategy)

        out, pull_back = jax.vjp(attend, inputs)
        return out, pull_back(out_bar)[0]

    def on_chips(*operands):
        return jax.shard_map(both, mesh=mesh, in_specs=split, out_specs=split)(*operands)

    return compile_for(step.target, on_chips, inputs, inputs["q"], mesh=mesh)
