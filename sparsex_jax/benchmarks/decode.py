"""Times of one decoding step's attention over a full cache, against dense attention over it.

A sample is many steps in one jitted loop, each of which needs the one before, so that the host's
time to launch a step does not count. Each step has its own query and features, so that it selects
its own blocks. Nothing gets a time whose output differs from a reference in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from sparsex_jax.benchmarks import runner
from sparsex_jax.benchmarks.names import DecodePart
from sparsex_jax.benchmarks.runner import Row, require_positive, require_some
from sparsex_jax.benchmarks.timing import compile_program, measure
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.cache.device import DeviceRemote, touched
from sparsex_jax.cache.layer import attend_one
from sparsex_jax.cache.near import Near, reach
from sparsex_jax.config import ConfigError
from sparsex_jax.landmarks import build_pyramid, leaf_nodes
from sparsex_jax.modules.attention import KeySide, QuerySide
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.scoring import Blocks

TOLERANCE = 0.02  # relative error in norm: outputs and weights are rounded to bfloat16
SCORE_TOLERANCE = 1e-4
_PRIMITIVES = {
    "op": dispatch.PRIMITIVES,
    "selection": ("block_selection",),
    "local": ("range_attention",),
    "landmarks": ("range_attention",),
    "dynamic": ("block_sparse_attention",),
    "writing": (),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      lengths: tokens in the cache, ascending.
      parts: of the op.
      query_heads: Hq.
      kv_heads: Hkv.
      head_dim: D.
      implementation: of the primitives; None picks by platform.
      steps: decoding steps of one sample.
      samples: taken for each row, at most.
      seconds: time budget of a row.
      seed: of the inputs.
    """

    lengths: tuple[int, ...]
    parts: tuple[DecodePart, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    implementation: str | None
    steps: int
    samples: int
    seconds: float
    seed: int

    def __post_init__(self):
        require_some(self, "lengths", "parts")
        require_positive(self, "steps", "samples", "seconds")
        for length in self.lengths:
            size = self.workload(length).config.block_size
            if "writing" in self.parts and self.steps % size:
                raise ConfigError(
                    f"steps={self.steps} must be a multiple of the block size for part 'writing':"
                    f" use {size}"
                )

    def workload(self, length: int) -> Workload:
        """The shapes at a length."""
        return Workload(
            length, self.query_heads, self.kv_heads, self.head_dim,
            implementation=self.implementation, seed=self.seed,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What the rows have in common, for the results file; the rest stands in them."""
        return {
            "attention": dataclasses.asdict(self.workload(self.lengths[0]).config),
            "dtype": "bfloat16",
            "method": "times are of one step; a sample is a jitted loop of `steps` of them",
            "steps": self.steps,
            "samples": self.samples,
            "seconds": self.seconds,
            "seed": self.seed,
        }


class Step(NamedTuple):
    """A row to measure."""

    system: str
    part: DecodePart
    length: int


class Queries(NamedTuple):
    """What the steps attend with, [steps, 1, 1, ...]."""

    q: jax.Array
    features: jax.Array
    landmark_gate: jax.Array
    dynamic_gate: jax.Array
    selected: jax.Array
    score: jax.Array


class Past(NamedTuple):
    """A full cache: landmarks and window as they are while an answer is generated, and the rest."""

    near: Near
    remote: DeviceRemote


def make_past(work: Workload) -> Past:
    """A full cache of random keys, the last of which is the query's own."""
    made = work.make(("k", "v", "salience", "block_features"))
    config = work.config
    first = work.tokens - reach(config) - 1
    window_k, window_v = (made[name][:, first:] for name in "kv")
    window_k = apply_rotary(
        window_k, first + jnp.arange(reach(config) + 1, dtype=jnp.int32), config.rope_base
    )
    leaves = leaf_nodes(made["salience"], 0, config.segment_length, config.landmarks_per_segment)
    pyramid = tuple(build_pyramid(leaves, config, sliding=False))
    blocks = Blocks(made["block_features"], None)
    remote = DeviceRemote(made["k"], made["v"], made["salience"], blocks, None, pyramid)
    position = jnp.int32(work.tokens - 1)
    window = window_k[:, :-1], window_v[:, :-1]
    near = Near.open(window, remote.landmarks(position, 1, config), position, config)
    return Past(near.write(window_k[:, -1:], window_v[:, -1:], position, config), remote)


def make_queries(work: Workload, past: Past, steps: int) -> Queries:
    """Random queries of all steps, and what they select."""
    config, key = work.config, jax.random.key(work.seed + 1)
    heads, kv_heads = work.query_heads, work.kv_heads
    keys = jax.random.split(key, 4)
    q = jax.random.normal(keys[0], (steps, 1, 1, heads, work.head_dim), jnp.bfloat16)
    features = jax.random.normal(keys[1], (steps, 1, 1, kv_heads, config.score_dim))
    features = (features * config.score_dim**-0.5).astype(jnp.bfloat16)
    landmark_gate, dynamic_gate = (
        2 * jax.nn.sigmoid(jax.random.normal(k, (steps, 1, 1, heads))) for k in keys[2:]
    )
    limit = jnp.full(1, _local_start(work) // config.block_size, jnp.int32)
    select = jax.jit(functools.partial(select_blocks, count=config.top_k))
    found = [select(u, past.remote.block_index.features, limit) for u in features]
    index, score = (jnp.stack(x) for x in zip(*found, strict=True))
    return Queries(q, features, landmark_gate, dynamic_gate, index, score)


def _local_start(work: Workload) -> int:
    """a(t) of the last token; the window is shorter than the sequence."""
    size = work.config.block_size
    return (work.tokens - work.config.window) // size * size


def _attend(work: Workload, part: str, implementation: str | None, past: Past, queries: Queries):
    """The output of one step, [1, 1, heads, ...]; `queries` are those of the step."""
    config, remote = work.config, past.remote
    position = jnp.int32(work.tokens - 1)
    start = jnp.full(1, _local_start(work), jnp.int32)
    if part == "op":
        side = QuerySide(queries.q, queries.features, queries.landmark_gate, queries.dynamic_gate)
        return attend_one(side, position, past.near, remote, config, implementation)[0]
    if part == "selection":
        limit = start // config.block_size
        return select_blocks(
            queries.features, remote.block_index.features, limit, config.top_k,
            implementation=implementation,
        )[1]  # fmt: skip
    if part in ("local", "landmarks"):
        q, near = queries.q, past.near
        local, landmarks = near.attend(q, q, position, start[0], config, implementation)
        assert landmarks is not None
        return (local if part == "local" else landmarks)[0]
    blocks = BlockCSR.from_selection(queries.selected, queries.score, work.blocks)
    size = config.block_size
    return block_sparse_attention(
        queries.q, remote.k, remote.v, blocks, block_size=size, implementation=implementation
    )[0]


def _dense(library: Literal["cudnn", "xla"], past: Past, queries: Queries):
    return jax.nn.dot_product_attention(
        queries.q, past.remote.k, past.remote.v, implementation=library
    )


def _loop(step: Callable, past: Past, queries: Queries) -> jax.Array:
    """Runs all steps; the queries of each depend on the output of the one before."""

    def body(last, queries: Queries):
        # Too little to change what is selected, but nothing that could be left out.
        shift = (last * 1e-6).astype(queries.q.dtype)
        queries = queries._replace(q=queries.q + shift, features=queries.features + shift)
        return jnp.max(step(past, queries).astype(jnp.float32)), None

    return jax.lax.scan(body, jnp.float32(0), queries)[0]


def _write(work: Workload, settled: bool, remote: DeviceRemote, queries: Queries):
    """Writes a token a step, keys and values made of the queries.

    As in an answer landmarks are brought up to date, and gathered, once a block; if `settled` they
    are brought up to date after each token.
    """
    config, heads, size = work.config, work.kv_heads, work.config.block_size
    first = work.tokens // 2  # behind it is room, as a cache has at its end

    def write(n, state):
        remote, near = state
        k = jax.lax.dynamic_index_in_dim(queries.q, n, keepdims=False)[:, :, :heads]
        feature = jax.lax.dynamic_index_in_dim(queries.features, n, keepdims=False)
        keys = KeySide(k, k, k[..., 0].astype(jnp.float32), feature, k[..., 0])
        # Two, of which the second one is of no block yet, as the cache makes them.
        features = jnp.concatenate((feature, feature), axis=1)[:, : touched(1, size)]
        blocks = Blocks(features, None)
        remote = remote.append(keys, blocks, first + n, jnp.int32(1), config, settled)
        return remote, near.write(k, k, first + n, config)

    def write_block(n, state):
        remote, window = state
        begin = first + n * size
        near = Near.open(window, remote.landmarks(begin, 1, config), begin, config)
        remote, near = jax.lax.fori_loop(n * size, (n + 1) * size, write, (remote, near))
        if not settled:
            remote = remote.settle(begin + size, size, config)
        return remote, near.window(begin + size, config)

    window = tuple(x[:, first - reach(config) : first] for x in (remote.k, remote.v))
    blocks = len(queries.q) // size
    return jax.lax.fori_loop(0, blocks, write_block, (remote, window))


class Benchmark(runner.Benchmark[Step]):
    """Times the parts of `settings` and dense attention; see `runner.Benchmark`."""

    name = "decode"
    fields = (
        "milliseconds", "milliseconds_q1", "milliseconds_q3", "samples", "steps",
        "speedup_over_dense", "peak_bytes", "max_error", "status", "note",
    )  # fmt: skip

    def __init__(self, settings: Settings, path: Path, command: str, *, resume: bool = False):
        super().__init__(settings.describe(), path, command, resume=resume)
        self.settings = settings
        self._inputs: tuple[int, Past, Queries] | None = None

    def all_steps(self) -> list[Step]:
        """A step for each row, in order; dense attention comes with the op, and first."""
        libraries = ["xla"] if jax.default_backend() != "gpu" else ["cudnn", "xla"]
        dense = [f"dense_{library}" for library in libraries]
        steps = []
        for length in self.settings.lengths:
            for part in self.settings.parts:
                systems = [*dense, "sparsex"] if part == "op" else ["sparsex"]
                steps += [Step(system, part, length) for system in systems]
        return steps

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        settings = self.settings
        return {
            "system": step.system,
            "part": step.part,
            "direction": "forward",
            "tokens": step.length,
            "query_heads": settings.query_heads,
            "kv_heads": settings.kv_heads,
            "head_dim": settings.head_dim,
            "implementation": self._implementation(step),
        }

    def _implementation(self, step: Step) -> str:
        if step.system != "sparsex":
            return step.system.removeprefix("dense_")
        if self.settings.implementation is not None:
            for primitive in _PRIMITIVES[step.part]:
                dispatch.select(primitive, self.settings.implementation)
            return self.settings.implementation
        taken = {primitive: name for primitive, name, _ in dispatch.explain()}
        return ", ".join(dict.fromkeys(taken[name] for name in _PRIMITIVES[step.part]))

    def inputs(self, length: int) -> tuple[Past, Queries]:
        """Those of a length, which all its rows share."""
        if self._inputs is None or self._inputs[0] != length:
            self._inputs = None  # gone before others are made
            work = self.settings.workload(length)
            past = make_past(work)
            self._inputs = length, past, make_queries(work, past, self.settings.steps)
        return self._inputs[1:]

    def run(self, step: Step) -> Row:
        """The fields beyond `identity`."""
        work = self.settings.workload(step.length)
        past, queries = self.inputs(step.length)
        if step.part == "writing":
            return self._time_writing(work, past, queries)
        attend = self._function(step, work)
        one = jax.tree.map(lambda x: x[0], queries)
        error = relative_error(
            jax.jit(attend)(past, one), jax.jit(_reference(step, work))(past, one)
        )
        tolerance = SCORE_TOLERANCE if step.part == "selection" else TOLERANCE
        if not error <= tolerance:
            note = f"the output differs from the reference by {error:.3g}, over {tolerance:g}"
            return {"max_error": _finite(error), "status": "wrong", "note": note}
        program, temporaries = compile_program(functools.partial(_loop, attend), past, queries)
        row = self._time(lambda: program(past, queries), temporaries)
        speedup = self._speedup(step, row["milliseconds"])
        return row | {"speedup_over_dense": speedup, "max_error": error}

    def _time_writing(self, work: Workload, past: Past, queries: Queries) -> Row:
        landmarks = [
            jax.jit(lambda *x, settled=settled: _write(work, settled, *x)[0].pyramid)
            for settled in (False, True)
        ]
        found = [jax.tree.leaves(function(past.remote, queries)) for function in landmarks]
        if not all(map(np.array_equal, *found)):
            note = "landmarks differ from those that are brought up to date after each token"
            return {"status": "wrong", "note": note}
        write = functools.partial(_write, work, False)
        program, temporaries = compile_program(write, past.remote, queries, donate=(0,))
        state = [jax.tree.map(jnp.copy, past.remote)]

        def run():
            state[0], window = program(state[0], queries)
            return window

        return self._time(run, temporaries)

    def _time(self, run: Callable, temporaries: int) -> Row:
        """Times of a step, of what runs all of them."""
        settings = self.settings
        timing = measure(run, settings.samples, settings.seconds)
        q1, median, q3 = (x / settings.steps for x in timing.quartiles())
        return {
            "milliseconds": median,
            "milliseconds_q1": q1,
            "milliseconds_q3": q3,
            "samples": len(timing.seconds),
            "steps": settings.steps,
            "peak_bytes": temporaries,
            "status": "measured",
        }

    def _function(self, step: Step, work: Workload) -> Callable:
        if step.system == "sparsex":
            given = self.settings.implementation
            return functools.partial(_attend, work, step.part, given)
        return functools.partial(_dense, "cudnn" if step.system == "dense_cudnn" else "xla")

    def _speedup(self, step: Step, milliseconds: float) -> float | None:
        """Over the fastest dense attention of this length; its parts have none."""
        if step.part != "op":
            return None
        dense = [
            row["milliseconds"]
            for row in self.rows
            if row["system"].startswith("dense_")
            and row["tokens"] == step.length
            and row["status"] == "measured"
        ]
        if step.system == "sparsex":
            return min(dense) / milliseconds if dense else None
        return 1.0


def _reference(step: Step, work: Workload) -> Callable:
    """The same step in plain JAX and float32."""

    def compute(past: Past, queries: Queries):
        with jax.default_matmul_precision("highest"):
            past, queries = jax.tree.map(_widened, (past, queries))
            if step.system == "sparsex":
                return _attend(work, step.part, "reference", past, queries)
            return _dense("xla", past, queries)

    return compute


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def relative_error(found: jax.Array, wanted: jax.Array) -> float:
    """Norm of the difference over the norm of what is right, in f64."""
    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None
