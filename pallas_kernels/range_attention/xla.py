"""Attention to a range of keys per query in plain JAX, with memory linear in T and N.

Forward and dQ: tiles of queries side by side, each walking over its own keys, one key tile a
step, with an online softmax (arXiv:1805.02867, arXiv:2205.14135). dK, dV and the bias gradient:
tiles of keys side by side, each walking over the queries that see it; these are contiguous,
because start and end do not decrease. Nothing is scattered, so results are deterministic.

Strict causality: a tile's walk starts at the first key of its first query that has one, steps
have static sizes, and a step without keys for a query changes none of its bits.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mesh_axes import vary_with

# Logits of a step, over all tiles that walk side by side.
_LOGITS_PER_STEP = 2**23
# Logits of one tile and head. Tiles of few queries (decoding) take longer steps, so fewer.
_LOGITS_PER_TILE = 2**14
_TILE = 128
_MAX_STEP = 2048
# Steps whose sums are begun anew and then joined: rounding adds up over the steps of a group and
# over groups, not over all the thousands of steps of a long walk.
_GROUP = 64


class _Plan(NamedTuple):
    """How B sequences are cut: `tiles` each, of `rows` tokens; `chunks` of `width` tiles."""

    batch: int
    tokens: int
    rows: int
    tiles: int
    width: int
    chunks: int


def _plan(batch, tokens, rows, logits_per_tile) -> _Plan:
    tiles = math.ceil(tokens / rows)
    rows = math.ceil(tokens / tiles)
    chunks = math.ceil(batch * tiles / max(1, _LOGITS_PER_STEP // logits_per_tile))
    return _Plan(batch, tokens, rows, tiles, math.ceil(batch * tiles / chunks), chunks)


def _chunked(x, plan: _Plan):
    """[B * tiles, ...] -> [chunks, width, ...], padded with zeros."""
    missing = plan.chunks * plan.width - len(x)
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(plan.chunks, plan.width, *x.shape[1:])


def _split(x, plan: _Plan):
    """[B, T, ...] -> [chunks, width, rows, ...], padded with zeros."""
    rest = x.shape[2:]
    missing = plan.tiles * plan.rows - plan.tokens
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return _chunked(x.reshape(plan.batch * plan.tiles, plan.rows, *rest), plan)


def _join(x, plan: _Plan):
    """The inverse of `_split`."""
    rest = x.shape[3:]
    x = x.reshape(plan.chunks * plan.width, plan.rows, *rest)[: plan.batch * plan.tiles]
    return x.reshape(plan.batch, plan.tiles * plan.rows, *rest)[:, : plan.tokens]


def _owners(plan: _Plan):
    """The batch element of each tile, [chunks, width]."""
    tile = jnp.arange(plan.chunks * plan.width, dtype=jnp.int32)
    owner = jnp.minimum(tile // plan.tiles, plan.batch - 1)
    return owner.reshape(plan.chunks, plan.width)


def _accumulator(dtype):
    return jnp.promote_types(jnp.float32, dtype)


def _einsum(subscripts, a, b):
    precision = None if a.dtype == jnp.bfloat16 else "highest"
    return jnp.einsum(
        subscripts, a, b, precision=precision, preferred_element_type=_accumulator(a.dtype)
    )


class _Walk(NamedTuple):
    """Tiles that step side by side over [first, last) of axis 1 of other arrays, `size` a step."""

    owner: jax.Array  # [width]
    first: jax.Array  # [width]
    last: jax.Array  # [width]
    size: int
    length: int  # of the axis

    def run(self, step, carry):
        """The carry after `step(position [width], fresh [width, size], carry)` at each place.

        Near the axis' end a slab is moved back to fit: what it then holds again is not fresh.
        """
        return self._run(0, self._count(), step, carry)

    def run_in_groups(self, step, empty, join):
        """Like `run`, but each _GROUP of steps begins with `empty`; `join` adds it to the rest."""
        count = self._count()

        def body(j, carry):
            first = j * _GROUP
            return join(carry, self._run(first, jnp.minimum(first + _GROUP, count), step, empty))

        return jax.lax.fori_loop(0, -(-count // _GROUP), body, vary_with(self.first, empty))

    def _count(self):
        return jnp.max(-((self.first - self.last) // self.size), initial=0)

    def _run(self, first_step, last_step, step, carry):
        def body(j, carry):
            begin = self.first + j * self.size
            position = jnp.clip(begin, 0, self.length - self.size)
            index = position[:, None] + jnp.arange(self.size, dtype=jnp.int32)
            fresh = (begin[:, None] <= index) & (index < self.last[:, None])
            return step(position, fresh, carry)

        return jax.lax.fori_loop(first_step, last_step, body, vary_with(self.first, carry))

    def slabs(self, x, position):
        """[B, length, ...] -> [width, size, ...]: what the tiles see at their positions."""

        def slab(owner, position):
            corner = (owner, position, *[jnp.int32(0)] * (x.ndim - 2))
            return jax.lax.dynamic_slice(x, corner, (1, self.size, *x.shape[2:]))[0]

        return jax.vmap(slab)(self.owner, position)


def _mask(start, end, key, bias):
    """Whether a query sees a key, [P, h or 1, t, s].

    From start and end [P, t], the keys' places [P, s] and their bias [P, s, h] or None.
    """
    mask = (start[:, :, None] <= key[:, None]) & (key[:, None] < end[:, :, None])
    mask = mask[:, None]
    if bias is not None:
        mask = mask & (jnp.swapaxes(bias, 1, 2)[:, :, None] > -jnp.inf)
    return mask


def _keys(walk, position, fresh, start, end, k, v, key_bias):
    """A step's k, v [P, s, h, d], bias [P, s, h] and mask, of queries that walk over keys."""
    bias = None if key_bias is None else walk.slabs(key_bias, position)
    key = position[:, None] + jnp.arange(walk.size, dtype=jnp.int32)
    mask = _mask(start, end, key, bias) & fresh[:, None, None]
    # Keys that no query of the tile sees may hold anything: 0 * NaN must not reach the sums.
    used = jnp.swapaxes(jnp.any(mask, axis=2), 1, 2)[..., None]
    k, v = (jnp.where(used, walk.slabs(x, position), 0) for x in (k, v))
    return k, v, bias, mask


def _logits(q, k, bias, mask, scale):
    """q [P, t, h, g, d] and k [P, s, h, d] -> [P, h, t, g, s], -inf where masked."""
    logits = _einsum("pthgd,pshd->phtgs", q, k) * scale
    if bias is not None:
        logits = logits + jnp.swapaxes(bias, 1, 2)[:, :, None, None]
    return jnp.where(mask[:, :, :, None], logits, -jnp.inf)


def _head_major(x):
    """[P, t, h, g, ...] -> [P, h, t, g, ...], and back."""
    return jnp.swapaxes(x, 1, 2)


def _finite(x):
    return jnp.where(x > -jnp.inf, x, 0)


def _key_walk(owner, start, end, num_keys, size):
    some = start < end
    first = jnp.min(jnp.where(some, start, num_keys), axis=1)
    last = jnp.max(jnp.where(some, end, 0), axis=1)
    return _Walk(owner, first, jnp.maximum(first, last), size, num_keys)


def _tile_sizes(length, walked):
    """Tokens of a tile of an axis, and of a step of its walk over another axis."""
    rows = min(_TILE, length)
    return rows, min(max(_TILE, _LOGITS_PER_TILE // rows), _MAX_STEP, walked)


def _query_plan(q, num_keys):
    batch, tokens, num_kv_heads, groups, _ = q.shape
    rows, size = _tile_sizes(tokens, num_keys)
    return _plan(batch, tokens, rows, rows * size * num_kv_heads * groups), size


class _Sums(NamedTuple):
    """Of the keys so far, for queries [P, h, t, g].

    A wrong total scales the whole output, so what rounding takes from it is kept; errors of the
    values are independent of each other.
    """

    top: jax.Array  # the largest logit
    total: jax.Array  # of the weights exp(logit - top)
    lost: jax.Array  # by rounding from total
    out: jax.Array  # weighted values, [P, h, t, g, d]

    def scaled(self, top):
        """The same, relative to a `top` that is no smaller."""
        decay = jnp.exp(self.top - _finite(top))
        return _Sums(top, self.total * decay, self.lost * decay, self.out * decay[..., None])

    def plus(self, total, out, lost=0):
        """With more weights and values, relative to the same top; exact if they are 0."""
        new = self.total + total
        taken = new - self.total  # Knuth's two-sum
        lost += self.lost + ((self.total - (new - taken)) + (total - taken))
        return _Sums(self.top, new, lost, self.out + out)

    def joined(self, other):
        """The sums over the keys of both."""
        top = jnp.maximum(self.top, other.top)
        _, total, lost, out = other.scaled(top)
        return self.scaled(top).plus(total, out, lost)


def _forward(q, k, v, start, end, key_bias, scale):
    """out [B, T, Hkv, G, D] and lse [B, T, Hkv, G] of the grouped q."""
    plan, size = _query_plan(q, k.shape[1])
    dtype = _accumulator(q.dtype)

    def chunk(_, operands):
        owner, q, start, end = operands
        walk = _key_walk(owner, start, end, k.shape[1], size)

        def step(position, fresh, sums):
            k_tile, v_tile, bias, mask = _keys(walk, position, fresh, start, end, k, v, key_bias)
            logits = _logits(q, k_tile, bias, mask, scale)
            top = jnp.maximum(sums.top, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - _finite(top)[..., None])
            update = _einsum("phtgs,pshd->phtgd", weights.astype(v.dtype), v_tile)
            return sums.scaled(top).plus(jnp.sum(weights, axis=-1), update)

        shape = _head_major(q).shape
        nothing = jnp.zeros(shape[:-1], dtype)
        empty = _Sums(nothing - jnp.inf, nothing, nothing, jnp.zeros(shape, dtype))
        top, total, lost, out = walk.run_in_groups(step, empty, _Sums.joined)
        total += lost
        seen = total > 0
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0)
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        return None, (_head_major(out).astype(q.dtype), _head_major(lse))

    operands = _owners(plan), _split(q, plan), _split(start, plan), _split(end, plan)
    _, (out, lse) = jax.lax.scan(chunk, None, operands)
    return _join(out, plan), _join(lse, plan)


def _weights_and_logits_bar(q, k, v, bias, mask, lse, out_bar, delta, scale):
    """The softmax weights and the gradient of the logits, [P, h, t, g, s]."""
    lse, delta = _head_major(lse)[..., None], _head_major(delta)[..., None]
    weights = jnp.exp(_logits(q, k, bias, mask, scale) - _finite(lse))
    weights_bar = _einsum("pthgd,pshd->phtgs", out_bar, v)
    return weights, jnp.where(mask[:, :, :, None], weights * (weights_bar - delta), 0)


def _query_gradient(q, k, v, start, end, key_bias, lse, out_bar, delta, scale):
    plan, size = _query_plan(q, k.shape[1])

    def chunk(_, operands):
        owner, q, start, end, lse, out_bar, delta = operands
        walk = _key_walk(owner, start, end, k.shape[1], size)

        def step(position, fresh, q_bar):
            k_tile, v_tile, bias, mask = _keys(walk, position, fresh, start, end, k, v, key_bias)
            _, logits_bar = _weights_and_logits_bar(
                q, k_tile, v_tile, bias, mask, lse, out_bar, delta, scale
            )
            return q_bar + _einsum("phtgs,pshd->phtgd", logits_bar.astype(k.dtype), k_tile)

        zeros = jnp.zeros(_head_major(q).shape, _accumulator(q.dtype))
        q_bar = walk.run(step, zeros) * scale
        return None, _head_major(q_bar).astype(q.dtype)

    operands = [_split(x, plan) for x in (q, start, end, lse, out_bar, delta)]
    return _join(jax.lax.scan(chunk, None, (_owners(plan), *operands))[1], plan)


def _key_gradients(q, k, v, start, end, key_bias, lse, out_bar, delta, scale):
    batch, tokens, num_kv_heads, groups, _ = q.shape
    rows, size = _tile_sizes(k.shape[1], tokens)
    plan = _plan(batch, k.shape[1], rows, rows * size * num_kv_heads * groups)
    # The queries from the first whose end is past a tile's first key to the last whose start is
    # before the next tile's.
    boundary = jnp.arange(plan.tiles + 1, dtype=jnp.int32) * plan.rows
    first = jax.vmap(lambda x: jnp.searchsorted(x, boundary[:-1], side="right"))(end)
    last = jax.vmap(lambda x: jnp.searchsorted(x, boundary[1:], side="left"))(start)
    key = boundary[:-1, None] + jnp.arange(plan.rows, dtype=jnp.int32)
    key = jnp.broadcast_to(key, (batch, *key.shape)).reshape(-1, plan.rows)
    dtype = _accumulator(q.dtype)

    def chunk(_, operands):
        owner, first, last, key, k_tile, v_tile, bias = operands
        walk = _Walk(owner, first, jnp.maximum(first, last), size, tokens)

        def step(position, fresh, carry):
            slabs = [walk.slabs(x, position) for x in (q, start, end, lse, out_bar, delta)]
            q_tile, start_tile, end_tile, *rest = slabs
            mask = _mask(start_tile, end_tile, key, bias) & fresh[:, None, :, None]
            weights, logits_bar = _weights_and_logits_bar(
                q_tile, k_tile, v_tile, bias, mask, *rest, scale
            )
            k_bar, v_bar, bias_bar = carry
            k_bar += _einsum("phtgs,pthgd->phsd", logits_bar.astype(q.dtype), q_tile)
            v_bar += _einsum("phtgs,pthgd->phsd", weights.astype(q.dtype), rest[1])
            return k_bar, v_bar, bias_bar + jnp.sum(logits_bar, axis=(2, 3))

        zeros = jnp.zeros(_head_major(k_tile).shape, dtype)
        k_bar, v_bar, bias_bar = walk.run(step, (zeros, zeros, zeros[..., 0]))
        k_bar, v_bar = _head_major(k_bar * scale), _head_major(v_bar)
        return None, (k_bar.astype(k.dtype), v_bar.astype(v.dtype), _head_major(bias_bar))

    operands = [_chunked(x, plan) for x in (first.ravel(), last.ravel(), key)]
    operands += [None if x is None else _split(x, plan) for x in (k, v, key_bias)]
    _, bars = jax.lax.scan(chunk, None, (_owners(plan), *operands))
    return [_join(x, plan) for x in bars]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, start, end, key_bias, scale):
    return _forward(q, k, v, start, end, key_bias, scale)


def _attend_fwd(q, k, v, start, end, key_bias, scale):
    results = _forward(q, k, v, start, end, key_bias, scale)
    out, lse = checkpoint_name(results, "range_attention")
    return (out, lse), (q, k, v, start, end, key_bias, out, lse)


def attend_bwd(scale, residuals, cotangents):
    """Gradients from what the forward pass left, q, out, lse and cotangents being grouped."""
    q, k, v, start, end, key_bias, out, lse = residuals
    out_bar, lse_bar = cotangents
    # Queries without keys: whatever they and their cotangents hold must not reach the sums.
    seen = lse > -jnp.inf
    q, out_bar = (jnp.where(seen[..., None], x, 0) for x in (q, out_bar))
    delta = jnp.sum(out_bar.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - lse_bar
    delta = jnp.where(seen, delta, 0)
    operands = (q, k, v, start, end, key_bias, lse, out_bar, delta, scale)
    q_bar = _query_gradient(*operands)
    k_bar, v_bar, bias_bar = _key_gradients(*operands)
    return q_bar, k_bar, v_bar, None, None, None if key_bias is None else bias_bar


_attend.defvjp(_attend_fwd, attend_bwd)


def range_attention(q, k, v, start, end, key_bias, scale, _all_finite=False):
    """See `pallas_kernels.range_attention.range_attention`; start and end are int32 [B, T]."""
    batch, tokens, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    if 0 in (*q.shape, num_keys):
        lse = jnp.full(q.shape[:3], -jnp.inf, _accumulator(q.dtype))
        return jnp.zeros(q.shape, q.dtype), lse
    q = q.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out, lse = _attend(q, k, v, start, end, key_bias, scale)
    return (
        out.reshape(batch, tokens, num_heads, head_dim),
        lse.reshape(batch, tokens, num_heads),
    )
