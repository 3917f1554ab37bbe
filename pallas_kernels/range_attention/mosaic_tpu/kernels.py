"""The kernels: forward and dQ, tiles of queries that walk over keys; dK and dV, the reverse."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tpu
from pallas_kernels.range_attention.mosaic_tpu import plan
from pallas_kernels.range_attention.mosaic_tpu.plan import Sizes
from pallas_kernels.tpu import LANES, LOG2E, LOWEST

_IN_HBM = pl.BlockSpec(memory_space=pltpu.HBM)
BLIND = -LOWEST  # instead of the log-sum-exp of a query without keys: exp2(x - BLIND) is 0
_TURN = pltpu.SMEM((1,), jnp.int32)


def _side_by_side(heads):
    """What G heads have for the tokens of a tile, as columns: [..., tokens] each."""
    return jnp.concatenate(list(heads), axis=-1)


def _matrix(x):
    """A tile of queries, [G, D, tokens], as [D, columns]."""
    return _side_by_side(x[g] for g in range(x.shape[0]))


def _row(x):
    """A number for each query of a tile, [G, tokens], as [1, columns]."""
    return _side_by_side(x[g : g + 1] for g in range(x.shape[0]))


def _per_head(x, sizes: Sizes):
    """The inverse: [..., columns] as G times [..., tokens]."""
    return (x[..., g * sizes.width : (g + 1) * sizes.width] for g in range(sizes.groups))


def _keep(some, *arrays):
    """Matrices [D, n], zero in the columns that `some` [1, n] excludes, whatever they hold."""
    return (jnp.where(some, x.astype(jnp.float32), 0).astype(x.dtype) for x in arrays)


def _logits(sizes: Sizes, q, k, v, bias, ranges, tile, masked: bool):
    """k^T q in units of log 2, [keys, columns], and k and v.

    Keys that no query of the tile sees may hold anything: they are made zero, for 0 * NaN is none.

    Args:
      sizes: of the call.
      q: [D, columns].
      k: [D, keys].
      v: [D, keys].
      bias: [1, keys] or None.
      ranges: int32 [2, tokens], of the queries.
      tile: of the keys.
      masked: whether some queries do not see all of the keys.
    """
    keys, width = sizes.key_width, sizes.width
    usable = None if bias is None else bias > -jnp.inf
    if masked:
        key = tile * keys + lax.broadcasted_iota(jnp.int32, (keys, width), 0)
        seen = (ranges[0:1] <= key) & (key < ranges[1:2])
        ones = jnp.ones((8, width), jnp.bfloat16)
        by = tpu.product(ones, jnp.where(seen, 1.0, 0.0).astype(jnp.bfloat16), 1, 1)
        used = by[:1] > 0
        usable = used if usable is None else used & usable
    if usable is not None:
        k, v = _keep(usable, k, v)
    logits = tpu.product(k, q, 0, 0) * (sizes.scale * LOG2E)
    if bias is not None:
        logits = logits + tpu.column(bias, keys) * LOG2E
    if masked:
        heads = _per_head(logits, sizes)
        logits = _side_by_side(jnp.where(seen, x, -jnp.inf) for x in heads)
    return logits, k, v


def _key_copies(at, tile, slot):
    """The copies of a tile of keys, for `tpu.walk`."""
    sequence, width = pl.program_id(0), at.k_tile.shape[2]
    keys = pl.ds(pl.multiple_of(tile * width, width), width)
    pairs = [(at.k.at[sequence, :, keys], at.k_tile), (at.v.at[sequence, :, keys], at.v_tile)]
    if at.bias is not None:
        pairs.append((at.bias.at[sequence, :, keys], at.bias_tile))
    return [
        pltpu.make_async_copy(source, target.at[slot], at.semaphores.at[n, slot])
        for n, (source, target) in enumerate(pairs)
    ]


def _store_queries(sizes: Sizes, ref, x):
    """Stores [D, columns] as a tile of queries."""
    for g, matrix in enumerate(_per_head(x, sizes)):
        ref[g] = matrix.astype(ref.dtype)


def _forward(sizes: Sizes, at):
    at.acc[...] = jnp.zeros(at.acc.shape, jnp.float32)
    at.top[...] = jnp.full(at.top.shape, LOWEST)
    at.total[...] = jnp.zeros(at.total.shape, jnp.float32)

    def step(tile, slot, masked):
        bias = None if at.bias is None else at.bias_tile[slot]
        logits, _, v = _logits(
            sizes, _matrix(at.q[...]), at.k_tile[slot], at.v_tile[slot], bias, at.ranges[...],
            tile, masked,
        )  # fmt: skip
        top = jnp.maximum(at.top[...], jnp.max(logits, axis=0, keepdims=True))
        decay = jnp.exp2(at.top[...] - top)
        weights = jnp.exp2(logits - top)
        at.top[...] = top
        at.total[...] = at.total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
        at.acc[...] = at.acc[...] * decay + tpu.product(v, weights.astype(v.dtype), 1, 0)

    tpu.walk(at.plan, at.turn, functools.partial(_key_copies, at), step)
    some = at.total[...] > 0
    total = jnp.where(some, at.total[...], 1.0)
    _store_queries(sizes, at.out, jnp.where(some, at.acc[...] / total, 0.0))
    lse = jnp.where(some, at.top[...] * (1 / LOG2E) + jnp.log(total), -jnp.inf)
    for g, row in enumerate(_per_head(lse, sizes)):
        at.lse[g : g + 1] = row


def _logits_bar(logits, v, out_bar, lse, delta):
    """The softmax weights and the gradient of the logits."""
    weights = jnp.exp2(logits - lse)
    return weights, weights * (tpu.product(v, out_bar, 0, 0) - delta)


def _query_gradient(sizes: Sizes, at):
    at.acc[...] = jnp.zeros(at.acc.shape, jnp.float32)
    lse, delta = (_row(x) for x in (at.sums[0], at.sums[1]))

    def step(tile, slot, masked):
        bias = None if at.bias is None else at.bias_tile[slot]
        logits, k, v = _logits(
            sizes, _matrix(at.q[...]), at.k_tile[slot], at.v_tile[slot], bias, at.ranges[...],
            tile, masked,
        )  # fmt: skip
        _, logits_bar = _logits_bar(logits, v, _matrix(at.out_bar[...]), lse, delta)
        at.acc[...] += tpu.product(k, logits_bar.astype(k.dtype), 1, 0)

    tpu.walk(at.plan, at.turn, functools.partial(_key_copies, at), step)
    q_bar = jnp.where(lse < BLIND, at.acc[...] * sizes.scale, 0.0)
    _store_queries(sizes, at.q_bar, q_bar)


def _query_copies(sizes: Sizes, at, tile, slot):
    """The copies of a tile of queries, for `tpu.walk`."""
    width, sequence = sizes.width, pl.program_id(0)
    tokens = pl.ds(pl.multiple_of(tile * width, width), width)
    pairs = (
        (at.q.at[sequence, :, :, tokens], at.q_tile),
        (at.out_bar.at[sequence, :, :, tokens], at.out_bar_tile),
        (at.sums.at[sequence, :, :, tokens], at.sums_tile),
        (at.ranges.at[lax.div(sequence, sizes.num_kv_heads), :, tokens], at.ranges_tile),
    )
    return [
        pltpu.make_async_copy(source, target.at[slot], at.semaphores.at[n, slot])
        for n, (source, target) in enumerate(pairs)
    ]


def _key_gradients(sizes: Sizes, at):
    for acc in (at.k_acc, at.v_acc, at.bias_acc):
        if acc is not None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def step(tile, slot, masked):
        del tile
        q, out_bar = _matrix(at.q_tile[slot]), _matrix(at.out_bar_tile[slot])
        bias = None if at.bias is None else at.bias[...]
        lse, delta = (_row(at.sums_tile[slot, n]) for n in (0, 1))
        if masked or bias is not None:
            q, out_bar = _keep(lse < BLIND, q, out_bar)
        logits, _, v = _logits(
            sizes, q, at.k[...], at.v[...], bias, at.ranges_tile[slot], pl.program_id(1), masked
        )
        weights, logits_bar = _logits_bar(logits, v, out_bar, lse, delta)
        at.v_acc[...] += tpu.product(out_bar, weights.astype(q.dtype), 1, 1)
        at.k_acc[...] += tpu.product(q, logits_bar.astype(q.dtype), 1, 1)
        if at.bias_acc is not None:
            at.bias_acc[...] += sum(
                logits_bar[:, i : i + LANES] for i in range(0, sizes.columns, LANES)
            )

    tpu.walk(at.plan, at.turn, functools.partial(_query_copies, sizes, at), step)
    at.k_bar[...] = (at.k_acc[...] * sizes.scale).astype(at.k_bar.dtype)
    at.v_bar[...] = at.v_acc[...].astype(at.v_bar.dtype)
    if at.bias_acc is not None:
        at.bias_bar[...] = jnp.sum(at.bias_acc[...].T, axis=0, keepdims=True)


def _numbers_block(sizes: Sizes, *leading):
    """A tile of numbers of queries, [sequences, *leading, G, T]."""
    zeros = (0,) * (len(leading) + 1)
    return pl.BlockSpec(
        (None, *leading, sizes.groups, sizes.width), lambda sequence, i: (sequence, *zeros, i)
    )


def _launch_key_walk(name, run, sizes: Sizes, operands, outputs, scratch, *, products: int):
    """Launches a kernel of tiles of queries.

    `operands` has the arrays k, v, bias and ranges, and (array, BlockSpec) of others.
    """
    k, v, bias, ranges = (operands[each] for each in ("k", "v", "bias", "ranges"))
    keys, dim = sizes.key_width, sizes.head_dim
    ranges_block = pl.BlockSpec(
        (None, 2, sizes.width), lambda sequence, i: (sequence // sizes.num_kv_heads, 0, i)
    )
    tile = pltpu.VMEM((2, dim, keys), sizes.dtype)
    return tpu.launch(
        name,
        functools.partial(run, sizes),
        grid=(sizes.sequences, sizes.tiles),
        operands=operands
        | {
            "plan": (plan.plan_queries(ranges, sizes), sizes.plan_block(sizes.tiles)),
            "ranges": (ranges, ranges_block),
            "k": (k, _IN_HBM),
            "v": (v, _IN_HBM),
            "bias": None if bias is None else (bias, _IN_HBM),
        },
        outputs=outputs,
        scratch=scratch
        | {
            "acc": pltpu.VMEM((dim, sizes.columns), jnp.float32),
            "k_tile": tile,
            "v_tile": tile,
            "bias_tile": None if bias is None else pltpu.VMEM((2, 1, keys), jnp.float32),
            "turn": _TURN,
            "semaphores": pltpu.SemaphoreType.DMA((3, 2)),
        },
        temporaries=sizes.temporaries,
        products=products * sizes.logits,
        head_dim=dim,
    )


def forward(q, k, v, start, end, key_bias, *, scale):
    """out [B, T, Hq, D] and lse f32 [B, T, Hq]; key_bias is [B, N, Hkv] or None."""
    sizes = Sizes.of(q, k, scale)
    queries = plan.queries_of(q, sizes)
    lse_shape = (sizes.sequences, sizes.groups, queries.shape[-1])
    total = pltpu.VMEM((1, sizes.columns), jnp.float32)
    results = _launch_key_walk(
        "range_forward",
        _forward,
        sizes,
        operands={
            "q": (queries, sizes.query_block()),
            "k": plan.keys_of(k, sizes),
            "v": plan.keys_of(v, sizes),
            "bias": plan.bias_of(key_bias, sizes),
            "ranges": plan.ranges_of(start, end, sizes),
        },
        outputs={
            "out": (queries, sizes.query_block()),
            "lse": (jax.ShapeDtypeStruct(lse_shape, jnp.float32), _numbers_block(sizes)),
        },
        scratch={"top": total, "total": total},
        products=2,
    )
    return plan.from_queries(results["out"], sizes), plan.from_queries(results["lse"], sizes)


def backward(q, k, v, start, end, key_bias, out_bar, lse, delta, *, scale):
    """dQ, dK, dV and the bias' gradient, or None.

    lse is in units of log 2, and BLIND for queries without keys; their q and out_bar may hold
    anything, delta may not.
    """
    sizes = Sizes.of(q, k, scale)
    queries, out_bar = plan.queries_of(q, sizes), plan.queries_of(out_bar, sizes)
    k, v, bias = plan.keys_of(k, sizes), plan.keys_of(v, sizes), plan.bias_of(key_bias, sizes)
    ranges = plan.ranges_of(start, end, sizes)
    sums = jnp.stack([plan.queries_of(x, sizes) for x in (lse, delta)], axis=1)
    q_bar = _launch_key_walk(
        "range_query_gradient",
        _query_gradient,
        sizes,
        operands={
            "q": (queries, sizes.query_block()),
            "out_bar": (out_bar, sizes.query_block()),
            "sums": (sums, _numbers_block(sizes, 2)),
            "k": k, "v": v, "bias": bias, "ranges": ranges,
        },
        outputs={"q_bar": (queries, sizes.query_block())},
        scratch={},
        products=3,
    )["q_bar"]  # fmt: skip
    bars = _key_gradients_of(sizes, queries, k, v, ranges, bias, out_bar, sums)
    bias_bar = None if bias is None else plan.from_bias(bars["bias_bar"], sizes)
    k_bar, v_bar = (plan.from_keys(bars[each], sizes) for each in ("k_bar", "v_bar"))
    return plan.from_queries(q_bar, sizes), k_bar, v_bar, bias_bar


def _key_gradients_of(sizes: Sizes, q, k, v, ranges, bias, out_bar, sums):
    """Launches the kernel of tiles of keys."""
    keys, dim, width = sizes.key_width, sizes.head_dim, sizes.width
    q_tile = pltpu.VMEM((2, sizes.groups, dim, width), sizes.dtype)
    acc = pltpu.VMEM((dim, keys), jnp.float32)
    biased = None if bias is None else (bias, sizes.bias_block())
    return tpu.launch(
        "range_key_gradients",
        functools.partial(_key_gradients, sizes),
        grid=(sizes.sequences, sizes.key_tiles),
        operands={
            "plan": (plan.plan_keys(ranges, sizes), sizes.plan_block(sizes.key_tiles)),
            "q": (q, _IN_HBM),
            "k": (k, sizes.key_block()),
            "v": (v, sizes.key_block()),
            "bias": biased,
            "ranges": (ranges, _IN_HBM),
            "out_bar": (out_bar, _IN_HBM),
            "sums": (sums, _IN_HBM),
        },
        outputs={
            "k_bar": (k, sizes.key_block()),
            "v_bar": (v, sizes.key_block()),
            "bias_bar": biased,
        },
        scratch={
            "q_tile": q_tile,
            "out_bar_tile": q_tile,
            "sums_tile": pltpu.VMEM((2, 2, sizes.groups, width), jnp.float32),
            "ranges_tile": pltpu.VMEM((2, 2, width), jnp.int32),
            "k_acc": acc,
            "v_acc": acc,
            "bias_acc": None if bias is None else pltpu.VMEM((keys, LANES), jnp.float32),
            "turn": _TURN,
            "semaphores": pltpu.SemaphoreType.DMA((4, 2)),
        },
        temporaries=sizes.temporaries,
        products=4 * sizes.logits,
        head_dim=dim,
    )
