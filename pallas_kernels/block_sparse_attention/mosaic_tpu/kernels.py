"""The kernels: a step takes one piece of the sorted entries, of one window and one key block.

The window's queries [entries, G * D] become rows [G * entries, D], head by head. Logits are
[S, rows], so that rows fill the lanes whatever S is, and maxima and sums go across sublanes.
A window's pieces follow each other, and so do a block's: neither is copied twice. Each piece
computes all rows of the window, and keeps its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_tpu.plan import Chunk, window_entries

# Results of a query that are added at a time, and elements of the block that holds those of many.
_SUMMANDS = 16
_SUM_ELEMENTS = 2**20


def _product(a, b, contract_a: int, contract_b: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((contract_a,), (contract_b,)), ((), ())
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


class _Piece:
    """What a step works on."""

    def __init__(self, begin_ref, column_ref, sizes: Sizes):
        self.sizes, self.width = sizes, window_entries(sizes.groups)
        self.number = pl.program_id(0)
        begin, self.end = begin_ref[self.number], begin_ref[self.number + 1]
        self.filled = self.end > begin
        self.column = column_ref[self.number]
        self.first = lax.rem(begin, self.width)
        self.last = self.first + self.end - begin

    def heads(self):
        """The columns of each head in [entries, G * D]."""
        dim = self.sizes.head_dim
        return [slice(g * dim, (g + 1) * dim) for g in range(self.sizes.groups)]

    def rows(self, ref):
        """[entries, G * D] -> [G * entries, D]."""
        return jnp.concatenate([ref[:, head] for head in self.heads()], axis=0)

    def put_rows(self, ref, rows):
        """Writes the piece's rows of [G * entries, D] to [entries, G * D]."""
        entry = lax.broadcasted_iota(jnp.int32, (self.width, self.sizes.head_dim), 0)
        mine = (entry >= self.first) & (entry < self.last)
        for g, head in enumerate(self.heads()):
            new = rows[g * self.width : (g + 1) * self.width]
            # In f32, since v5e selects nothing narrower.
            ref[:, head] = jnp.where(mine, new, ref[:, head].astype(jnp.float32)).astype(ref.dtype)

    def mine(self):
        """Which rows are the piece's: [1, G * entries]."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.sizes.groups * self.width), 1)
        entry = lax.rem(row, self.width)
        return (entry >= self.first) & (entry < self.last)

    def keys_and_values(self, ref):
        return ref[:, : self.sizes.head_dim], ref[:, self.sizes.head_dim :]

    def logits(self, keys, queries):
        """[S, G * entries], -inf where there is no key."""
        sizes = self.sizes
        logits = _product(keys, queries, 1, 1) * sizes.scale
        if sizes.num_keys % sizes.block_size == 0:
            return logits
        keys_left = sizes.num_keys - lax.rem(self.column, sizes.num_blocks) * sizes.block_size
        return jnp.where(
            lax.broadcasted_iota(jnp.int32, logits.shape, 0) < keys_left, logits, -jnp.inf
        )


def _forward_kernel(begin_ref, column_ref, q_ref, kv_ref, out_ref, lse_ref, *, sizes: Sizes):
    piece = _Piece(begin_ref, column_ref, sizes)

    @pl.when(piece.filled)
    def _():
        keys, payload = piece.keys_and_values(kv_ref)
        logits = piece.logits(keys, piece.rows(q_ref))
        top = jnp.max(logits, axis=0, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=0, keepdims=True)
        # Weights up to 1 exactly: normalised ones would be rounded, the largest too. Their sums
        # come from the MXU, since those from above lie along lanes.
        payload = jnp.concatenate([payload, jnp.ones_like(payload)], axis=1)
        out = _product(weights.astype(payload.dtype), payload, 0, 0)
        piece.put_rows(out_ref, out[:, : sizes.head_dim] / out[:, sizes.head_dim :])
        lse_ref[...] = jnp.where(piece.mine(), top + jnp.log(total), lse_ref[...])


def _backward_kernel(
    begin_ref, column_ref, q_ref, out_bar_ref, shift_ref, delta_ref, kv_ref, before_ref,
    q_bar_ref, bias_bar_ref, kv_bar_ref, *, sizes: Sizes,
):  # fmt: skip
    piece = _Piece(begin_ref, column_ref, sizes)
    previous = column_ref[jnp.maximum(piece.number - 1, 0)]

    # The sum of a block stays in VMEM as long as its pieces follow each other.
    @pl.when((piece.number == 0) | (piece.column != previous))
    def _():
        kv_bar_ref[...] = before_ref[...]

    @pl.when(piece.filled)
    def _():
        dim = sizes.head_dim
        keys, payload = piece.keys_and_values(kv_ref)
        queries, out_bar = piece.rows(q_ref), piece.rows(out_bar_ref)
        mine = piece.mine()
        # Other rows may overflow, or be no numbers: they are chosen away, not multiplied by 0.
        weights = jnp.where(mine, jnp.exp(piece.logits(keys, queries) + shift_ref[...]), 0)
        weights_bar = _product(payload, out_bar, 1, 1)
        logits_bar = jnp.where(mine, weights * (weights_bar - delta_ref[...]), 0)
        bias_bar = jnp.sum(logits_bar, axis=0, keepdims=True)
        bias_bar_ref[...] = jnp.where(mine, bias_bar, bias_bar_ref[...])
        logits_bar = (logits_bar * sizes.scale).astype(queries.dtype)
        piece.put_rows(q_bar_ref, _product(logits_bar, keys, 0, 0))
        kv_bar_ref[:, :dim] += _product(logits_bar, queries, 1, 0)
        kv_bar_ref[:, dim:] += _product(weights.astype(out_bar.dtype), out_bar, 1, 0)


def _sum_kernel(parts_ref, weights_ref, out_ref, total_ref, *, dim: int):
    step = pl.program_id(1)
    count, groups = len(parts_ref), parts_ref.shape[2] // dim

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    for g in range(groups):
        head = slice(g * dim, (g + 1) * dim)
        total = total_ref[:, head]
        for n in range(count):
            weight = weights_ref[:, n * groups + g : n * groups + g + 1]
            # What weighs nothing may never have been written.
            total += jnp.where(weight != 0, weight * parts_ref[n, :, head].astype(jnp.float32), 0)
        total_ref[:, head] = total

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def vmem_bytes(kernel: str, groups: int, head_dim: int, block_size: int, itemsize: int) -> int:
    """What "forward" or "backward" takes of VMEM: blocks, twice, and what is computed of them."""
    rows = window_entries(groups) * groups
    windows, products = (2, 4) if kernel == "forward" else (3, 8)
    keys = block_size * 2 * head_dim
    blocks = windows * rows * head_dim * itemsize + keys * itemsize + 3 * 8 * rows * 4
    if kernel == "backward":
        blocks += 2 * keys * 4
    # Rows of 64 take whole lanes once they stand below each other.
    return 2 * blocks + products * block_size * rows * 4 + 2 * windows * rows * 128 * 4


class _Blocks:
    """Blocks of the kernels' operands."""

    def __init__(self, sizes: Sizes):
        width, dim = window_entries(sizes.groups), sizes.head_dim
        windows = -(-sizes.entries // width)

        def window(i, begin, column):
            # Pieces past the last one begin where the entries end.
            return jnp.minimum(begin[i] // width, windows - 1)

        rows = (None, width, sizes.groups * dim)
        self.rows = pl.BlockSpec(rows, lambda *i: (window(*i), 0, 0))
        numbers = (None, 1, width * sizes.groups)
        self.numbers = pl.BlockSpec(numbers, lambda *i: (window(*i), 0, 0))
        keys = (None, sizes.block_size, 2 * dim)
        self.keys = pl.BlockSpec(keys, lambda i, begin, column: (column[i], 0, 0))


def _call(kernel: str, chunk: Chunk, sizes: Sizes, operands, results, **options):
    """Runs a kernel on pairs of a block and an array; results are pairs of a block and a shape."""
    body: Callable = _forward_kernel if kernel == "forward" else _backward_kernel
    products = 3 if kernel == "forward" else 5  # of [rows, D] and [S, D], or so large
    blocks, arrays = zip(*operands, strict=True)
    result_blocks, shapes = zip(*results, strict=True)
    rows = window_entries(sizes.groups) * sizes.groups
    logits = len(chunk.column) * rows * sizes.block_size
    itemsize = arrays[0].dtype.itemsize
    return pl.pallas_call(
        functools.partial(body, sizes=sizes),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(chunk.column),),
            in_specs=blocks,
            out_specs=result_blocks,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes(
                kernel, sizes.groups, sizes.head_dim, sizes.block_size, itemsize
            ),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * sizes.head_dim,
            transcendentals=logits,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        name=f"block_sparse_attention_{kernel}",
        **options,
    )(chunk.begin, chunk.column, *arrays)


def _like(x, shape=None, dtype=None):
    """The shape of a result that varies over a mesh as x does."""
    return jax.ShapeDtypeStruct(
        shape or x.shape, dtype or x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
    )


def forward(q, kv, chunk: Chunk, sizes: Sizes):
    """Normalised results of the sorted entries.

    Args:
      q: [windows, entries, G * D], the entries' queries.
      kv: [columns, S, 2 * D], keys and values side by side.
      chunk: what the entries are.
      sizes: of the call.

    Returns:
      out, like q, and lse, f32 [windows, 1, G * entries], head by head; anything where a sorted
      entry is empty.
    """
    blocks = _Blocks(sizes)
    lse = _like(q, (len(q), 1, q.shape[1] * sizes.groups), jnp.float32)
    operands = (blocks.rows, q), (blocks.keys, kv)
    return _call(
        "forward", chunk, sizes, operands, ((blocks.rows, _like(q)), (blocks.numbers, lse))
    )


def backward(q, out_bar, shift, delta, kv, kv_bar, chunk: Chunk, sizes: Sizes):
    """Gradients by the sorted entries, and the sums of those of keys and values.

    Args:
      q: [windows, entries, G * D], the entries' queries.
      out_bar: likewise, the cotangent of their queries' results.
      shift: f32 [windows, 1, G * entries], head by head: the entry's value less its query's lse.
      delta: likewise: the query's out . out_bar, less the cotangent of its lse.
      kv: [columns, S, 2 * D].
      kv_bar: f32, likewise: what the gradients are added to, in place.
      chunk: what the entries are.
      sizes: of the call.

    Returns:
      The gradients of q, like it, and of the value, of each head, like shift, anything where a
      sorted entry is empty; and of kv, with kv_bar added.
    """
    blocks = _Blocks(sizes)
    operands = (
        (blocks.rows, q), (blocks.rows, out_bar), (blocks.numbers, shift), (blocks.numbers, delta),
        (blocks.keys, kv), (blocks.keys, kv_bar),
    )  # fmt: skip
    results = (blocks.rows, _like(q)), (blocks.numbers, _like(shift)), (blocks.keys, _like(kv_bar))
    return _call("backward", chunk, sizes, operands, results, input_output_aliases={7: 2})


def weighted_sum(parts, weights, head_dim: int):
    """The sum over the first axis of [capacity, rows, G * D], weighted by f32 [capacity, rows, G].

    What weighs 0 may be anything. XLA would take ten times as long, since it spreads each weight
    over the lanes by way of memory.
    """
    capacity, rows, lanes = parts.shape
    count = next(n for n in range(min(capacity, _SUMMANDS), 0, -1) if capacity % n == 0)
    height = _SUM_ELEMENTS // (count * lanes) // 16 * 16
    height = min(max(16, height), 128, -(-rows // 16) * 16)
    groups, steps = weights.shape[2], capacity // count
    # A row's weights side by side: on their own, few heads would leave most lanes empty.
    weights = weights.reshape(steps, count, rows, groups).swapaxes(1, 2)
    weights = weights.reshape(steps, rows, count * groups)
    operands = (
        (parts, pl.BlockSpec((count, height, lanes), lambda i, j: (j, i, 0))),
        (weights, pl.BlockSpec((None, height, count * groups), lambda i, j: (j, i, 0))),
    )
    result = _like(parts, (rows, lanes)), pl.BlockSpec((height, lanes), lambda i, j: (i, 0))
    total = pltpu.VMEM((height, lanes), jnp.float32)
    temporaries = 2**20 + 4 * count * height * lanes  # the block's results in f32
    return pl.pallas_call(
        functools.partial(_sum_kernel, dim=head_dim),
        out_shape=result[0],
        grid=(-(-rows // height), steps),
        in_specs=[block for _, block in operands],
        out_specs=result[1],
        scratch_shapes=[total],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu.vmem_bytes((*operands, result), total, temporaries),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * parts.size,
            transcendentals=0,
            bytes_accessed=(parts.size + rows * lanes) * parts.dtype.itemsize + 4 * weights.size,
        ),
        name="block_sparse_attention_sum",
    )(parts, weights)
