"""Errors of attention over millions of keys: float32 and bfloat16 arithmetic against float64.

A few queries see all keys. The reference takes the very operands that the arithmetic takes, rounded
as they are, so that nothing but the arithmetic is judged. Keys and values are normal numbers:
attention then averages values that cancel each other, and a relative error of what remains is the
hardest measure.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.range_attention import range_attention
from sparsex_jax.benchmarks import runner
from sparsex_jax.benchmarks.names import Logits, Precision
from sparsex_jax.benchmarks.runner import Row, require_some
from sparsex_jax.benchmarks.workload import normal
from sparsex_jax.config import ConfigError, check_seed
from sparsex_jax.fusion import Branch, SoftmaxSum, merge_softmax

BAR = 1e-6  # relative error that float32 may have: of any query's output, and of any lse
PEAK = 20.0  # logit of the one key that each "peaked" query singles out; the others' spread is 1
LARGE = 6.0  # spread of "large" logits: the largest of millions are near 30
KEYS_AT_ONCE = 2**16  # of the reference


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      lengths: keys, ascending; each a multiple of 64, and at least as many as queries.
      logits: kinds: "normal" (spread 1), "peaked" (of spread 1, and one of PEAK), "large" (spread
        LARGE).
      systems: "f32", "bf16": `range_attention` over all keys. "f32_merged": over blocks, each
        merged with the (out, lse) of those before by `merge_softmax`. "f32_summed": likewise,
        added to a `SoftmaxSum`.
      queries: query heads of one token, all of one KV head.
      head_dim: D.
      block: keys of the blocks that are merged.
      implementation: of range attention; None picks by platform.
      seed: of the inputs.

    Raises:
      ConfigError: a value is not allowed.
      ValueError: the implementation does not exist, or cannot run here or with these operands.
    """

    lengths: tuple[int, ...]
    logits: tuple[Logits, ...]
    systems: tuple[Precision, ...]
    queries: int = 32
    head_dim: int = 128
    block: int = 2**16
    implementation: str | None = None
    seed: int = 0

    def __post_init__(self):
        require_some(self, "lengths", "logits", "systems")
        for name in ("queries", "head_dim", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive: use 64, say")
        for length in self.lengths:
            if length % 64 or length < self.queries:
                raise ConfigError(
                    f"length={length} must be a multiple of 64 and at least queries={self.queries}:"
                    f" use {64 * math.ceil(max(length, self.queries) / 64)}"
                )
        check_seed(self.seed)
        for system in self.systems:
            self.implementation_of(system)

    def implementation_of(self, system: Precision) -> str:
        """The name given, or taken on this device."""
        if self.implementation is None:
            return {name: taken for name, taken, _ in dispatch.explain()}["range_attention"]
        q, k = (
            jax.ShapeDtypeStruct((1, tokens, heads, self.head_dim), dtype_of(system))
            for tokens, heads in ((1, self.queries), (self.lengths[0], 1))
        )
        dispatch.select("range_attention", self.implementation, q, k)
        return self.implementation


class Step(NamedTuple):
    """A row to measure."""

    length: int
    logits: Logits
    system: Precision


class Inputs(NamedTuple):
    """Operands of all kinds of logits.

    Attributes:
      k: [1, N, 1, D].
      v: [1, N, 1, D].
      q: of each kind, [1, 1, R, D].
      places: of the keys that "peaked" queries single out, int32 [R].
      peaks: these keys, [R, D].
    """

    k: jax.Array
    v: jax.Array
    q: dict[Logits, jax.Array]
    places: jax.Array
    peaks: jax.Array

    def of(self, logits: Logits) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v of a kind; only "peaked" queries meet the peaks, in a copy of k."""
        k = self.k.at[0, self.places, 0].set(self.peaks) if logits == "peaked" else self.k
        return self.q[logits], k, self.v


class Exact(NamedTuple):
    """Results in float64: out [R, D], lse [R], and each query's largest logit, [R]."""

    out: np.ndarray
    lse: np.ndarray
    top: np.ndarray


def dtype_of(system: Precision) -> np.dtype:
    """The operands' dtype."""
    return jnp.dtype(jnp.bfloat16 if system == "bf16" else jnp.float32)


def make_inputs(length: int, queries: int, head_dim: int, dtype: np.dtype, seed: int = 0) -> Inputs:
    """Random inputs of all kinds of logits.

    Args:
      length: N, keys.
      queries: R, at most N.
      head_dim: D.
      dtype: of all arrays; the numbers are those of float32, rounded.
      seed: decides all numbers.
    """
    key = jax.random.fold_in(jax.random.key(seed), length)
    keys = [jax.random.fold_in(key, number) for number in range(5)]
    plain, peaked = (normal(x, (1, 1, queries, head_dim), jnp.float32) for x in keys[:2])
    places = jax.random.choice(keys[2], length, (queries,), replace=False)
    peaks = peaked * (PEAK * math.sqrt(head_dim)) / jnp.sum(peaked**2, -1, keepdims=True)
    q: dict[Logits, jax.Array] = {"normal": plain, "peaked": peaked, "large": LARGE * plain}
    k, v = (normal(x, (1, length, 1, head_dim), dtype) for x in keys[3:])
    rounded = {name: x.astype(dtype) for name, x in q.items()}
    return Inputs(k, v, rounded, places, peaks[0, 0].astype(dtype))


def attend_exactly(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Exact:
    """Softmax attention in float64, in two passes over blocks of keys: the maximum, then the sums.

    Args:
      q: [R, D], of any floating dtype.
      k: [N, D].
      v: [N, D].

    Returns:
      The results of the logits q.k / sqrt(D).
    """
    wide = q.astype(np.float64) / math.sqrt(q.shape[1])
    blocks = [slice(i, i + KEYS_AT_ONCE) for i in range(0, len(k), KEYS_AT_ONCE)]
    top = np.full(len(q), -np.inf)
    for block in blocks:
        top = np.maximum(top, (wide @ k[block].astype(np.float64).T).max(axis=1))
    total, out = np.zeros(len(q)), np.zeros(q.shape)
    for block in blocks:
        weights = np.exp(wide @ k[block].astype(np.float64).T - top[:, None])
        total += weights.sum(axis=1)
        out += weights @ v[block].astype(np.float64)
    return Exact(out / total[:, None], top + np.log(total), top)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _attend_to_block(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, size: int, implementation: str
) -> Branch:
    """Range attention to the keys `first` to `first + size`."""
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k, v))
    start, end = jnp.zeros(1, jnp.int32), jnp.full(1, size, jnp.int32)
    return range_attention(q, k, v, start, end, implementation=implementation)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, system: Precision, block: int, implementation: str
) -> Branch:
    """Attention of the queries to all keys, computed as a system does.

    Args:
      q: [1, 1, R, D].
      k: [1, N, 1, D].
      v: [1, N, 1, D].
      system: see `Settings`.
      block: keys of a block, for the systems that merge.
      implementation: of range attention.

    Returns:
      out [1, 1, R, D] and lse [1, 1, R].
    """
    tokens = k.shape[1]
    if system in ("f32", "bf16"):
        return _attend_to_block(q, k, v, jnp.int32(0), tokens, implementation)
    branches = (
        _attend_to_block(q, k, v, jnp.int32(i), min(block, tokens - i), implementation)
        for i in range(0, tokens, block)
    )
    if system == "f32_merged":
        return functools.reduce(jax.jit(merge_softmax), branches)
    total = SoftmaxSum.of(next(branches))
    return functools.reduce(jax.jit(SoftmaxSum.add), branches, total).branch(q.dtype)


def measure_errors(out: np.ndarray, lse: np.ndarray, exact: Exact) -> dict[str, float]:
    """Differences from the exact results.

    Args:
      out: [R, D].
      lse: [R].
      exact: what they should be.

    Returns:
      output_error, the norm of all queries' difference over the norm of all outputs;
      output_error_max, the largest of a single query's; lse_error, the largest difference;
      lse_relative_error, the largest over the size of lse.
    """
    difference = out.astype(np.float64) - exact.out
    by_query = np.linalg.norm(difference, axis=1) / np.linalg.norm(exact.out, axis=1)
    lse_error = np.abs(lse.astype(np.float64) - exact.lse)
    found = {
        "output_error": np.linalg.norm(difference) / np.linalg.norm(exact.out),
        "output_error_max": by_query.max(),
        "lse_error": lse_error.max(),
        "lse_relative_error": (lse_error / np.abs(exact.lse)).max(),
    }
    return {name: float(value) for name, value in found.items()}


class Benchmark(runner.Benchmark[Step]):
    """Measures the errors that `settings` asks for; see `runner.Benchmark`."""

    name = "numerics"
    fields = (
        "largest_logit", "output_error", "output_error_max", "lse_error", "lse_relative_error",
        "status", "note",
    )  # fmt: skip

    def __init__(self, settings: Settings, path: Path, command: str, *, resume: bool = False):
        config = {"bar": BAR, "seed": settings.seed}
        super().__init__(config, path, command, resume=resume)
        self.settings = settings
        # Of the last step only: the next often has the same.
        self._inputs = functools.lru_cache(1)(self._make_inputs)
        self._exact = functools.lru_cache(1)(self._attend_exactly)

    def all_steps(self) -> list[Step]:
        """A step for each row, such that neighbours share inputs and reference."""
        return [
            Step(length, logits, system)
            for length in self.settings.lengths
            for dtype in (jnp.float32, jnp.bfloat16)
            for logits in self.settings.logits
            for system in self.settings.systems
            if dtype_of(system) == dtype
        ]

    def identity(self, step: Step) -> Row:
        """The fields that tell rows apart."""
        settings = self.settings
        return {
            "system": step.system,
            "logits": step.logits,
            "tokens": step.length,
            "queries": settings.queries,
            "head_dim": settings.head_dim,
            "block": settings.block if step.system in ("f32_merged", "f32_summed") else None,
            "implementation": settings.implementation_of(step.system),
        }

    def run(self, step: Step) -> Row:
        """The errors; "wrong" if they are no numbers, or float32's are over the bar."""
        dtype = dtype_of(step.system)
        q, k, v = self._inputs(step.length, dtype).of(step.logits)
        settings, taken = self.settings, self.settings.implementation_of(step.system)
        out, lse = attend(q, k, v, step.system, settings.block, taken)
        del q, k, v  # the reference makes its own
        exact = self._exact(step.length, step.logits, dtype)
        row: Row = {"largest_logit": float(exact.top.max()), "status": "measured"}
        errors = measure_errors(np.asarray(out[0, 0]), np.asarray(lse[0, 0]), exact)
        if not np.isfinite(list(errors.values())).all():
            return row | {"status": "wrong", "note": "outputs or lse are no finite numbers"}
        worst = max(errors["output_error_max"], errors["lse_relative_error"])
        if dtype == jnp.float32 and worst > BAR:
            note = f"a relative error of {worst:.3g}, over {BAR:g}"
            row |= {"status": "wrong", "note": note}
        return row | errors

    def _make_inputs(self, length: int, dtype: np.dtype) -> Inputs:
        self._inputs.cache_clear()  # before the next are made: both would not fit
        return make_inputs(
            length, self.settings.queries, self.settings.head_dim, dtype, self.settings.seed
        )

    def _attend_exactly(self, length: int, logits: Logits, dtype: np.dtype) -> Exact:
        q, k, v = (np.asarray(x)[0] for x in self._inputs(length, dtype).of(logits))
        return attend_exactly(q[0], k[:, 0], v[:, 0])
