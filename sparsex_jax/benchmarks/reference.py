"""The same numbers again for a few query rows, plainly, in NumPy and f64, and what they differ by.

Gradients, too: the cotangents of all other rows are zero, so that the gradients of keys, values
and features come from these rows alone. Dense attention, whose rows see every key, is computed on
the device in f32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax.benchmarks.cases import WINDOW, Case, Inputs, is_dense
from sparsex_jax.benchmarks.reference_keys import (
    best_blocks,
    block_keys,
    clear_tokens,
    fetch,
    for_heads,
    landmark_keys,
    local_keys,
    scores,
    searched,
)
from sparsex_jax.benchmarks.workload import Workload

# What is put down to rounding: bfloat16 has 8 bits, to which weights of a softmax, outputs of
# branches and results are rounded. Of outputs, each number counts (see `deviation`). Single numbers
# of gradients may be small differences of large ones, so all of them together are held to more.
OUTPUT_TOLERANCE = 0.03
GRADIENT_TOLERANCE = 0.25
GRADIENT_NORM_TOLERANCE = 0.015
SCORE_TOLERANCE = 1e-4  # scores are sums in f32
MOST_ROWS = 64
DENSE_LOGITS = 2**28  # at a time


class Error(NamedTuple):
    """A difference from the reference.

    Attributes:
      of: "outputs", "gradients" (as `deviation`) or "norm" (of gradients, relative).
      value: what it is.
      tolerance: what rounding may make it.
    """

    of: str
    value: float
    tolerance: float


class Rows(NamedTuple):
    """What is compared of a result.

    Attributes:
      tokens: int [R], ascending, distinct.
      outputs: of these tokens, each f64 [R, ...].
      indices: likewise, int.
      cotangents: likewise, of the outputs; empty in the forward direction.
      gradients: whole, on the device, [1, T, ...] by name; empty in the forward direction.
    """

    tokens: np.ndarray
    outputs: tuple[np.ndarray, ...]
    indices: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...]
    gradients: dict[str, jax.Array]


def deviation(computed: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """max |computed - expected| / (RMS(expected) + |expected|); inf if a number is not finite.

    The scale of long-range attention is the RMS of its output, far below 1; numbers well above
    that may be off by their own rounding.

    Args:
      computed: any shape.
      expected: the same shape; the RMS is taken over its last axis.
      floor: of the RMS.
    """
    if not expected.size:
        return 0.0
    if not np.isfinite(computed).all():
        return math.inf
    rms = np.sqrt(np.mean(np.square(expected), axis=-1, keepdims=True))
    scale = np.maximum(rms, floor) + np.abs(expected)
    return float(np.max(np.abs(computed - expected) / np.where(scale > 0, scale, 1)))


def _output_error(computed: np.ndarray, expected: np.ndarray) -> Error:
    return Error("outputs", deviation(computed, expected), OUTPUT_TOLERANCE)


def gradient_errors(largest: float, distance: float) -> list[Error]:
    """Of a gradient, from its `deviation` and from the relative norm of its difference."""
    return [
        Error("gradients", largest, GRADIENT_TOLERANCE),
        Error("norm", distance, GRADIENT_NORM_TOLERANCE),
    ]


class _Sparse:
    """Gradients by an input [1, T, H, ...], zero but at some pairs of token and head."""

    def __init__(self) -> None:
        self.entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, tokens: np.ndarray, heads: np.ndarray, values: np.ndarray, mask=None) -> None:
        """Adds values [*s, ...] at tokens and heads, both of a shape that broadcasts to s."""
        shape = np.broadcast_shapes(tokens.shape, heads.shape)
        tokens, heads = (np.broadcast_to(x, shape) for x in (tokens, heads))
        keep = np.ones(shape, bool) if mask is None else mask
        self.entries.append((tokens[keep], heads[keep], values[keep]))

    def compare(self, computed: jax.Array) -> list[Error]:
        """Those of a whole gradient, inf if it is not zero elsewhere."""
        tokens, heads, values = (np.concatenate(x) for x in zip(*self.entries, strict=True))
        count = computed.shape[2]
        place, inverse = np.unique(tokens * count + heads, return_inverse=True)
        expected = np.zeros((len(place), *values.shape[1:]))
        np.add.at(expected, inverse, values)
        touched = fetch(computed, place // count, place % count)
        if np.count_nonzero(touched) != int(_count_nonzero(computed)):
            return gradient_errors(math.inf, math.inf)
        distance = np.linalg.norm(touched - expected) / max(np.linalg.norm(expected), 1e-30)
        largest = deviation(touched, expected, floor=np.sqrt(np.mean(np.square(expected))))
        return gradient_errors(largest, float(distance))


@jax.jit
def _count_nonzero(x: jax.Array) -> jax.Array:
    """Elements that are not 0 (NaN is not), exact to 2^32."""
    return jnp.sum(x != 0, dtype=jnp.uint32)


class _Attention:
    """Softmax attention of R rows, each to its own M keys of a KV head.

    Args:
      q: f64 [R, Hkv, G, D].
      k: f64 [R, Hkv, M, D].
      v: f64 [R, Hkv, M, D].
      bias: f64 [R, Hkv, M], -inf without a key.
    """

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray):
        self.q, self.k, self.v, self.scale = q, k, v, q.shape[-1] ** -0.5
        logits = q @ k.swapaxes(-1, -2) * self.scale + bias[:, :, None]
        top = np.max(logits, axis=-1, keepdims=True, initial=-1e30)
        weights = np.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        self.weights = weights / np.where(total > 0, total, 1)
        self.out = self.weights @ v

    def gradients(self, out_bar: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of q, k, v and bias, from the cotangent of out, [R, Hkv, G, D]."""
        weights_bar = out_bar @ self.v.swapaxes(-1, -2)
        delta = np.sum(out_bar * self.out, axis=-1, keepdims=True)
        logits_bar = self.weights * (weights_bar - delta)
        q_bar = logits_bar @ self.k * self.scale
        k_bar = logits_bar.swapaxes(-1, -2) @ self.q * self.scale
        return q_bar, k_bar, self.weights.swapaxes(-1, -2) @ out_bar, logits_bar.sum(axis=2)


def _turn(x: np.ndarray, tokens: np.ndarray, base: float, sign: int = 1) -> np.ndarray:
    """RoPE of x [*s, D] by the angles of tokens (broadcast to s), or back with sign -1."""
    half = x.shape[-1] // 2
    steps = np.round(base ** (-np.arange(half) / half) / (2 * np.pi) * 2.0**32).astype(np.uint64)
    phases = tokens.astype(np.uint64)[..., None] * steps % np.uint64(2**32)
    angle = sign * 2 * np.pi * phases.astype(np.float64) / 2**32
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)


class _Branch:
    """A branch of the op at some rows: its attention, and where its gradients belong.

    Args:
      work: sizes.
      inputs: q, k, v; also salience, if `bias` names it.
      tokens: int [R].
      keys: int [R, Hkv, M], -1 for none.
      bias: f64 [R, Hkv, M] or None.
      turned: with RoPE.
    """

    def __init__(self, work: Workload, inputs: Inputs, tokens, keys, bias=None, turned=False):
        self.tokens, self.keys, self.seen = tokens, np.maximum(keys, 0), keys >= 0
        self.base = work.config.rope_base if turned else None
        self.kv_heads = np.arange(work.kv_heads)[:, None]
        grouped = (len(tokens), work.kv_heads, work.groups, work.head_dim)
        q = fetch(inputs["q"], tokens).reshape(grouped)
        k, v = (fetch(inputs[name], self.keys, self.kv_heads) for name in "kv")
        if self.base is not None:
            q = _turn(q, tokens[:, None, None], self.base)
            k = _turn(k, self.keys, self.base)
        allowed = np.where(self.seen, 0.0 if bias is None else bias, -np.inf)
        self.attention = _Attention(q, k, v, allowed)
        self.out = self.attention.out.reshape(len(tokens), work.query_heads, work.head_dim)

    def add_gradients(self, out_bar: np.ndarray, found: dict[str, _Sparse]) -> np.ndarray:
        """Adds those of q, k and v; returns that of the bias, [R, Hkv, M]."""
        grouped = out_bar.reshape(self.attention.q.shape)
        q_bar, k_bar, v_bar, bias_bar = self.attention.gradients(grouped)
        if self.base is not None:
            q_bar = _turn(q_bar, self.tokens[:, None, None], self.base, -1)
            k_bar = _turn(k_bar, self.keys, self.base, -1)
        heads = np.arange(out_bar.shape[1])
        found["q"].add(self.tokens[:, None], heads, q_bar.reshape(out_bar.shape))
        found["k"].add(self.keys, self.kv_heads, k_bar, self.seen)
        found["v"].add(self.keys, self.kv_heads, v_bar, self.seen)
        return bias_bar


def _score_gradients(work, inputs, tokens, index, score_bar, found) -> None:
    """Adds the gradients of features from those of the scores of selected blocks, [R, Hkv, K]."""
    chosen, heads = index >= 0, np.arange(work.kv_heads)
    u = fetch(inputs["query_features"], tokens)
    c = fetch(inputs["block_features"], np.maximum(index, 0), heads[:, None])
    score_bar = np.where(chosen, score_bar, 0)
    u_bar = np.einsum("rhk,rhkd->rhd", score_bar, c)
    found["query_features"].add(tokens[:, None], heads, u_bar)
    c_bar = score_bar[..., None] * u[:, :, None]
    found["block_features"].add(index, heads[:, None], c_bar, chosen)


def _compare_gradients(found: dict[str, _Sparse], rows: Rows) -> list[Error]:
    return [error for name, each in found.items() for error in each.compare(rows.gradients[name])]


def _one_branch(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    """Of a part that is one branch, or of a window of the library."""
    tokens, bias, index = rows.tokens, None, None
    if case.part == "landmarks":
        keys = landmark_keys(work, inputs["salience"], tokens)
        heads = np.arange(work.kv_heads)[:, None]
        bias = fetch(inputs["salience"], np.maximum(keys, 0), heads)
    elif case.part == "dynamic":
        index = np.asarray(inputs["index"][0, tokens])
        keys = block_keys(work, index)
        bias = np.repeat(fetch(inputs["score"], tokens), work.config.block_size, axis=-1)
    elif case.system == "sparsex":
        keys = local_keys(work, tokens)
    else:
        keys = for_heads(work, np.maximum(tokens[:, None] - np.arange(WINDOW), -1))
    branch = _Branch(work, inputs, tokens, keys, bias)
    errors = [_output_error(rows.outputs[0], branch.out)]
    if rows.gradients:
        found = {name: _Sparse() for name in case.differentiable}
        bias_bar = branch.add_gradients(rows.cotangents[0], found)
        if case.part == "landmarks":
            found["salience"].add(branch.keys, branch.kv_heads, bias_bar, branch.seen)
        elif index is not None:
            score_bar = bias_bar.reshape(*index.shape, -1).sum(axis=-1)
            found["score"].add(tokens[:, None], np.arange(work.kv_heads), score_bar)
        errors += _compare_gradients(found, rows)
    return errors


def _op(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    tokens, heads = rows.tokens, np.arange(work.query_heads)
    index, score = best_blocks(scores(work, inputs, tokens), work.config.top_k)
    marks = landmark_keys(work, inputs["salience"], tokens)
    kv_heads = np.arange(work.kv_heads)[:, None]
    salience = fetch(inputs["salience"], np.maximum(marks, 0), kv_heads)
    local = _Branch(work, inputs, tokens, local_keys(work, tokens), turned=True)
    landmarks = _Branch(work, inputs, tokens, marks, salience)
    bias = np.repeat(score, work.config.block_size, axis=-1)
    dynamic = _Branch(work, inputs, tokens, block_keys(work, index), bias)
    gated = {"landmark_gate": landmarks, "dynamic_gate": dynamic}
    gates = {name: fetch(inputs[name], tokens)[..., None] for name in gated}
    total = local.out + sum(gates[name] * branch.out for name, branch in gated.items())
    errors = [_output_error(rows.outputs[0], total)]
    if rows.gradients:
        found = {name: _Sparse() for name in case.differentiable}
        out_bar = rows.cotangents[0]
        for name, branch in gated.items():
            found[name].add(tokens[:, None], heads, np.sum(out_bar * branch.out, axis=-1))
        local.add_gradients(out_bar, found)
        salience_bar = landmarks.add_gradients(out_bar * gates["landmark_gate"], found)
        found["salience"].add(landmarks.keys, kv_heads, salience_bar, landmarks.seen)
        bias_bar = dynamic.add_gradients(out_bar * gates["dynamic_gate"], found)
        score_bar = bias_bar.reshape(*index.shape, -1).sum(axis=-1)
        _score_gradients(work, inputs, tokens, index, score_bar, found)
        errors += _compare_gradients(found, rows)
    return errors


def _selection(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    """Of the scores from the best ones, and of the chosen blocks' true scores from these.

    Where two blocks are as good to rounding, either may be chosen.
    """
    (computed,), (index,) = rows.outputs, rows.indices
    everything = scores(work, inputs, rows.tokens)
    if case.part == "selection_in_nodes":
        everything = np.where(searched(work, inputs, rows.tokens)[0], everything, -np.inf)
    _, best = best_blocks(everything, index.shape[-1])
    chosen = np.take_along_axis(everything, np.maximum(index, 0), axis=-1)
    chosen = np.where(index >= 0, chosen, -np.inf)
    missing, order = np.isneginf(best), np.sort(index, axis=-1)
    errors = []
    if ((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)).any():
        errors.append(Error("outputs", math.inf, SCORE_TOLERANCE))  # a block was chosen twice
    for each in (chosen, computed):
        same = (np.isneginf(each) == missing).all()
        error = deviation(each[~missing], best[~missing]) if same else math.inf
        errors.append(Error("outputs", error, SCORE_TOLERANCE))
    if rows.gradients:
        found = {name: _Sparse() for name in case.differentiable}
        _score_gradients(work, inputs, rows.tokens, index, rows.cotangents[0], found)
        errors += _compare_gradients(found, rows)
    return errors


def _rotary(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    tokens, errors = rows.tokens, []
    for number, name in enumerate(case.inputs):
        turned = _turn(fetch(inputs[name], tokens), tokens[:, None], work.config.rope_base)
        errors.append(_output_error(rows.outputs[number], turned))
        if rows.gradients:
            found = {name: _Sparse()}
            out_bar = rows.cotangents[number]
            q_bar = _turn(out_bar, tokens[:, None], work.config.rope_base, -1)
            found[name].add(tokens[:, None], np.arange(out_bar.shape[1]), q_bar)
            errors += _compare_gradients(found, rows)
    return errors


def _fusion(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    tokens, heads = rows.tokens, np.arange(work.query_heads)
    local, landmarks, dynamic, *gates = (fetch(inputs[name], tokens) for name in case.inputs)
    gates = [gate[..., None] for gate in gates]
    total = local + gates[0] * landmarks + gates[1] * dynamic
    errors = [_output_error(rows.outputs[0], total)]
    if rows.gradients:
        out_bar = rows.cotangents[0]
        values = (
            out_bar, out_bar * gates[0], out_bar * gates[1],
            np.sum(out_bar * landmarks, axis=-1), np.sum(out_bar * dynamic, axis=-1),
        )  # fmt: skip
        found = {name: _Sparse() for name in case.inputs}
        for each, value in zip(found.values(), values, strict=True):
            each.add(tokens[:, None], heads, value)
        errors += _compare_gradients(found, rows)
    return errors


@jax.jit
def _dense_rows(q, k, v, tokens, out_bar):
    """out [R, Hq, D] of rows of causal attention, and the gradients of q, k, v; all in f32."""

    def attend(q, k, v):
        rows, _, dim = q.shape
        grouped = q.reshape(rows, k.shape[2], -1, dim)
        logits = jnp.einsum("rhgd,nhd->rhgn", grouped, k[0], precision="highest") * dim**-0.5
        seen = jnp.arange(k.shape[1]) <= tokens[:, None, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("rhgn,nhd->rhgd", weights, v[0], precision="highest").reshape(q.shape)

    out, pull = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, pull(out_bar)


@functools.partial(jax.jit, static_argnames="floored")
def device_deviation(computed, expected, *, floored: bool) -> tuple[jax.Array, jax.Array]:
    """`deviation` of whole arrays, and that of their norm, without leaving the device.

    Args:
      computed: any shape.
      expected: the same shape.
      floored: the RMS of a row counts as at least that of all.
    """
    computed, expected = (x.astype(jnp.float32) for x in (computed, expected))
    difference = jnp.abs(computed - expected)
    rms = jnp.sqrt(jnp.mean(jnp.square(expected)))
    scale = jnp.sqrt(jnp.mean(jnp.square(expected), axis=-1, keepdims=True))
    scale = (jnp.maximum(scale, rms) if floored else scale) + jnp.abs(expected)
    largest = jnp.max(difference / jnp.where(scale > 0, scale, 1))
    distance = jnp.sqrt(jnp.mean(jnp.square(difference))) / rms
    # On the CPU a maximum may drop NaN.
    finite = jnp.isfinite(computed).all()
    return jnp.where(finite, largest, jnp.inf), jnp.where(finite, distance, jnp.inf)


def _dense(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    tokens = rows.tokens
    out_bar = rows.cotangents[0] if rows.gradients else np.zeros(rows.outputs[0].shape)
    out, (q_bar, *others) = _dense_rows(
        inputs["q"][0, tokens], inputs["k"], inputs["v"], tokens, jnp.float32(out_bar)
    )
    errors = [_output_error(rows.outputs[0], np.asarray(out, np.float64))]
    if rows.gradients:
        found = {"q": _Sparse()}
        found["q"].add(tokens[:, None], np.arange(work.query_heads), np.asarray(q_bar, np.float64))
        errors += _compare_gradients(found, rows)
        for name, expected in zip(("k", "v"), others, strict=True):
            largest, distance = device_deviation(rows.gradients[name], expected, floored=True)
            errors += gradient_errors(float(largest), float(distance))
    return errors


def compare(case: Case, work: Workload, inputs: Inputs, rows: Rows) -> list[Error]:
    """Differences of outputs and gradients from the reference."""
    if is_dense(case):
        return _dense(case, work, inputs, rows)
    functions = {
        "op": _op, "scoring": _selection, "selection": _selection,
        "selection_in_nodes": _selection, "rotary": _rotary, "fusion": _fusion,
    }  # fmt: skip
    return functions.get(case.part, _one_branch)(case, work, inputs, rows)


def choose_tokens(case: Case, work: Workload, inputs: Inputs) -> np.ndarray:
    """The first, the last and random tokens of a sequence, int [R], ascending.

    Dense attention has fewer at great lengths; the op only those whose choice of blocks is certain,
    and selection in nodes those whose choice of nodes is.
    """
    count = MOST_ROWS
    if is_dense(case):
        count = int(np.clip(DENSE_LOGITS // (work.query_heads * work.tokens), 4, MOST_ROWS))
    rng = np.random.default_rng([work.seed, work.tokens])
    inner = 1 + rng.choice(work.tokens - 2, size=count - 2, replace=False)
    tokens = np.sort(np.concatenate(([0], inner, [work.tokens - 1])))
    if case.part == "selection_in_nodes":
        return tokens[searched(work, inputs, tokens)[1]]
    if case.part == "op" and not is_dense(case):
        return clear_tokens(work, inputs, tokens)
    return tokens


def recall(work: Workload, inputs: Inputs, rows: Rows) -> float:
    """The share of the best blocks of all that a selection has found; 1 where there are none."""
    best, _ = best_blocks(scores(work, inputs, rows.tokens), work.config.top_k)
    found = (best[..., :, None] == rows.indices[0][..., None, :]).any(axis=-1)
    return float(found[best >= 0].mean()) if (best >= 0).any() else 1.0
