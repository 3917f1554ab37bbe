"""Each kernel on its own: operands as the attention has them, and what plain JAX makes of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper, shapes, tuning
from pallas_kernels.block_selection import mosaic_gpu as selection
from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.entries import Sizes, combine_by_token
from pallas_kernels.block_sparse_attention.mosaic_gpu import block_walk, entry_walk, packing
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import Chunk, by_token, plan_chunks
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from pallas_kernels.range_attention.mosaic_gpu import key_walk, query_walk
from sparsex_jax.benchmarks.reference import (
    OUTPUT_TOLERANCE,
    SCORE_TOLERANCE,
    Error,
    device_deviation,
    gradient_errors,
)
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.spans import remote_end


class KernelCase(NamedTuple):
    """A kernel, ready to run.

    Attributes:
      run: of a config and the operands; what is timed: the kernel and its plan.
      operands: trees of arrays on the device.
      compare: of what `run` returns; its differences from plain JAX in the same dtypes.
    """

    run: Callable[..., Any]
    operands: tuple[Any, ...]
    compare: Callable[[Any], list[Error]]


def make_case(kernel: tuning.Kernel, work: Workload) -> KernelCase:
    """Operands of a kernel at the shapes of a workload; its implementation is not looked at.

    range_attention: the local window. block_sparse_attention: the selected blocks, for dK and dV of
    all queries, else of the last `tokens / top_k`: as many as have one query's worth of partial
    results. block_selection: the selection.
    """
    cases = {
        "range_attention": _range_attention,
        "block_sparse_attention": _block_sparse_attention,
        "block_selection": _block_selection,
    }
    return cases[kernel.primitive](kernel.function, work)


def _output_errors(computed, expected) -> list[Error]:
    return [
        Error("outputs", float(device_deviation(x, y, floored=False)[0]), OUTPUT_TOLERANCE)
        for x, y in zip(computed, expected, strict=True)
    ]


def _errors_of_gradients(computed, expected) -> list[Error]:
    return [
        error
        for x, y in zip(computed, expected, strict=True)
        for error in gradient_errors(*map(float, device_deviation(x, y, floored=True)))
    ]


def _differentiated(attend: Callable, cotangent, *operands):
    """lse and delta of plain JAX, f32 [B, T, Hq], and its gradients of the operands."""

    @jax.jit
    def run(cotangent, *operands):
        (out, lse), pull = jax.vjp(attend, *operands)
        delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        return jnp.where(lse > -jnp.inf, lse, 0), delta, pull((cotangent, jnp.zeros_like(lse)))

    return run(cotangent, *operands)


def _range_attention(function: str, work: Workload) -> KernelCase:
    q, k, v = work.make("qkv").values()
    positions = jnp.arange(work.tokens, dtype=jnp.int32)[None]
    bounds = remote_end(positions, 0, work.config), positions + 1
    scale = work.head_dim**-0.5

    def attend(q, k, v):
        return range_attention(q, k, v, *bounds, implementation="xla")

    def run(kernel, config, q, k, v, start, end, *rows):
        return kernel(q, k, v, start, end, None, *rows, scale=scale, config=config)

    if function == "forward":
        expected = jax.jit(attend)(q, k, v)
        forward = functools.partial(run, key_walk.forward)
        compare = functools.partial(_output_errors, expected=expected)
        return KernelCase(forward, (q, k, v, *bounds), compare)
    cotangent = work.random("cotangent", work.spec("q"))
    lse, delta, (q_bar, *bars) = _differentiated(attend, cotangent, q, k, v)
    operands = q, k, v, *bounds, cotangent, lse * hopper.LOG2E, delta
    if function == "query_gradient":
        return KernelCase(
            functools.partial(run, key_walk.query_gradient), operands,
            lambda found: _errors_of_gradients([found], [q_bar]),
        )  # fmt: skip
    return KernelCase(
        functools.partial(run, query_walk.key_gradients), operands,
        lambda found: _errors_of_gradients(found[:2], bars),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="sizes")
def _plan(blocks: BlockCSR, scales, sizes: Sizes):
    pattern = blocks.indptr, blocks.indices, blocks.values
    return plan_chunks(jnp.zeros(1, jnp.int32), *pattern, sizes, scales=scales).chunk(0)


@functools.partial(jax.jit, static_argnames="sizes")
def _combine(words, lse, chunk: Chunk, sizes: Sizes):
    out = packing.unpack_entries(words, chunk.scale)
    operands = chunk.value[:, None], chunk.filled[:, None], out, lse
    return combine_by_token(*(by_token(x, sizes) for x in operands))


def _block_sparse_attention(function: str, work: Workload) -> KernelCase:
    made = work.make(("q", "k", "v", "index", "score"))
    count, block_size = work.config.top_k, work.config.block_size
    queries = work.tokens if function == "key_gradients" else work.tokens // count // 8 * 8
    q, index, score = (made[name][:, -queries:] for name in ("q", "index", "score"))
    k, v = made["k"], made["v"]
    blocks = BlockCSR.from_selection(index, score, work.blocks)
    sizes = Sizes(
        1, work.kv_heads, work.groups, work.head_dim, work.tokens, block_size, work.blocks, count,
        queries, work.head_dim**-0.5,
    )  # fmt: skip
    chunk = _plan(blocks, packing.scales(v, block_size), sizes)

    def attend(q, k, v, values):
        pattern = BlockCSR(blocks.indptr, blocks.indices, values, work.blocks, count)
        return block_sparse_attention(q, k, v, pattern, block_size=block_size, implementation="xla")

    def run(kernel, config, *operands):
        return kernel(*operands, sizes, config)

    if function == "forward":
        expected = jax.jit(attend)(q, k, v, blocks.values)

        def compare(parts):
            found = zip(_combine(*parts, chunk, sizes=sizes), expected, strict=True)
            return _output_errors([x.reshape(y.shape) for x, y in found], expected)

        forward = functools.partial(run, entry_walk.forward)
        return KernelCase(forward, (q, k, v, chunk), compare)
    cotangent = work.random("cotangent", jax.ShapeDtypeStruct(q.shape, q.dtype))
    lse, delta, bars = _differentiated(attend, cotangent, q, k, v, blocks.values)
    operands = q, k, v, cotangent, lse, delta, chunk
    if function == "query_gradient":
        q_bar, _, _, values_bar = bars
        return KernelCase(
            functools.partial(run, entry_walk.query_gradient), operands,
            lambda parts: _errors_of_gradients(
                _sum_entries(*parts, chunk, sizes), [q_bar, values_bar]
            ),
        )  # fmt: skip
    _, *bars, _ = bars
    return KernelCase(
        functools.partial(run, block_walk.key_gradients), operands,
        lambda found: _errors_of_gradients([x.reshape(k.shape) for x in found], bars),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="sizes")
def _sum_entries(q_bar, bias_bar, chunk: Chunk, sizes: Sizes):
    """dQ [1, chunk, Hq, D] and the gradient of the values, [1, Hkv, E], from those of entries."""
    filled = chunk.filled[:, None]
    q_bar = jnp.where(filled[..., None], q_bar.astype(jnp.float32), 0)
    q_bar, values_bar = (by_token(x, sizes) for x in (q_bar, jnp.where(filled, bias_bar, 0)))
    values_bar = jnp.moveaxis(jnp.sum(values_bar, axis=4), 1, 2).reshape(1, sizes.heads, -1)
    return jnp.sum(q_bar, axis=3).reshape(1, sizes.chunk, -1, sizes.head_dim), values_bar


def _block_selection(_: str, work: Workload) -> KernelCase:
    u, c = work.make(("query_features", "block_features")).values()
    positions = jnp.arange(work.tokens, dtype=jnp.int32)[None]
    limit = remote_end(positions, 0, work.config) // work.config.block_size
    count = work.config.top_k
    plain = jax.jit(lambda u, c: select_blocks(u, c, limit, count, implementation="xla")[1])
    expected = plain(u, c)

    def run(config, u, c, limit, start):
        return selection.select(u, c, limit, start, count=-(-count // 8) * 8, config=config)

    def compare(found):
        index, score = (x[..., :count] for x in found)
        return [
            Error("outputs", float(x), SCORE_TOLERANCE)
            for x in _selection_deviations(u, c, index, score, expected)
        ]

    operands = u, shapes.pad(c, 1, 8), limit, jnp.zeros_like(limit)
    return KernelCase(run, operands, compare)


@jax.jit
def _selection_deviations(u, c, index, score, expected):
    """Of the scores, and of the true scores of the selected blocks, from the best scores.

    Where two blocks are as good to rounding, either may be selected. inf where a block is selected
    twice, or where one is missing or too many.
    """
    heads = jnp.arange(u.shape[2])[:, None]
    chosen = c[0, jnp.maximum(index[0], 0), heads]  # [T, Hkv, K, d]
    true = jnp.einsum(
        "thd,thkd->thk", u[0], chosen, precision="highest", preferred_element_type=jnp.float32
    )[None]
    missing, order = expected == -jnp.inf, jnp.sort(index, axis=-1)
    twice = jnp.any((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0))
    sound = ~twice & jnp.all(index < c.shape[1]) & jnp.all((index < 0) == missing)
    sound &= jnp.all((score == -jnp.inf) == missing)

    def deviation(x):
        found, best = (jnp.where(missing, 0, each) for each in (x, expected))
        return jnp.where(sound, device_deviation(found, best, floored=True)[0], jnp.inf)

    return deviation(score), deviation(true)
