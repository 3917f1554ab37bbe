"""Attention to selected blocks of a split sequence: queries travel to the blocks' devices.

Blocks are dealt out to the devices in turn, so that the past of every query lies on all of them,
wherever it stands in the sequence. A packet holds a token's queries of one KV head and up to
`width` of its blocks that lie on one device. Packets travel in rounds, each of a fixed capacity
for each pair of devices (all_to_all), and partial results travel back, until none is left
anywhere: nothing is dropped, however many choose the same block, and memory stays bounded.

This is expert parallelism (GShard, Lepikhin et al., 2020, arXiv:2006.16668) with blocks of keys as
experts, without its dropping of what exceeds a capacity.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_alike, vary_with, varying
from pallas_kernels.segments import first_places
from sparsex_jax.fusion import Branch, SoftmaxSum
from sparsex_jax.parallel.mesh import axis_size
from sparsex_jax.parallel.ring import partial_gradients

_DEVIATIONS = 5  # of random choices, that rounds have room for: one more round costs more
_MAX_FLOATS = 2**27  # of the queries of a round
_MAX_CHUNKS = 64  # of tokens to which results are added


class Rounds(NamedTuple):
    """What is static about packets and rounds.

    Attributes:
      parts: devices.
      width: most blocks of a packet.
      capacity: packets of a batch element and KV head between two devices in a round.
      expected: rounds where choices are even.
    """

    parts: int
    width: int
    capacity: int
    expected: int


def plan_rounds(parts: int, batch: int, tokens: int, heads: int, dim: int, count: int) -> Rounds:
    """The rounds for `count` blocks of each of `tokens` tokens with `heads` query heads."""
    width = min(count, -(-2 * count // parts))
    # The number of a row's blocks on one device, where each may lie on any, is binomial.
    chance = [
        math.comb(count, n) * (parts - 1) ** (count - n) / parts**count for n in range(count + 1)
    ]
    packets = sum(p * -(-n // width) for n, p in enumerate(chance))
    most = tokens * -(-count // width)
    mean = tokens * packets
    even = min(most, math.ceil(mean + _DEVIATIONS * math.sqrt(mean)))
    expected = -(-even // max(1, _MAX_FLOATS // (parts * batch * heads * dim)))
    return Rounds(parts, width, -(-even // expected), expected)


def dispatch_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    score: jax.Array,
    *,
    block_size: int,
    implementation: str | None = None,
    rounds: Rounds | None = None,
) -> Branch:
    """`parallel.ring.ring_attention` with queries that travel.

    Args:
      q: as there, and so all but the last.
      k: likewise.
      v: likewise.
      index: likewise.
      score: likewise.
      block_size: likewise.
      implementation: likewise.
      rounds: None for those of `plan_rounds`.
    """
    batch, tokens, heads, dim = q.shape
    parts, blocks = axis_size("seq"), k.shape[1] // block_size
    if rounds is None:
        rounds = plan_rounds(parts, batch, tokens, heads, dim, index.shape[3])
    source, place = index // blocks, index % blocks
    owner = jnp.where(index < 0, parts, (place + source) % parts)
    column = source * -(-blocks // parts) + place // parts
    k, v = (_deal_out(x, block_size) for x in (k, v))
    operands = vary_alike(q, k, v, owner, column, score)
    return _attend(*operands, block_size, implementation, rounds)


def _deal_out(x: jax.Array, block_size: int) -> jax.Array:
    """[B, T, H, D] of a device's own blocks -> [B, N, H, D] of those that it owns.

    Block b of device s goes to device (b + s) % P, as the one numbered b // P of those from s.
    """
    batch, tokens, heads, dim = x.shape
    parts, blocks = axis_size("seq"), tokens // block_size
    each = -(-blocks // parts)
    x = jnp.pad(x, ((0, 0), (0, (each * parts - blocks) * block_size), (0, 0), (0, 0)))
    x = x.reshape(batch, each, parts, block_size * heads * dim)
    x = jnp.roll(jnp.moveaxis(x, 2, 0), lax.axis_index("seq"), axis=0)
    x = lax.all_to_all(x, "seq", 0, 0, tiled=True)
    return jnp.moveaxis(x, 0, 1).reshape(batch, parts * each * block_size, heads, dim)


class _Packets(NamedTuple):
    """The packets of a device's tokens; a row's entries are sorted by owner.

    Attributes:
      entry: int32 [B, Hkv, T, K]: the entry at each place of the sorted row.
      owner: int32 [B, Hkv, T, K]: its owner, P for an empty one.
      first: int32 [B, Hkv, T, K]: the place where its packet begins.
      rank: int32 [B, Hkv, T, K]: the number of the packet that begins there, among those with the
        same owner.
      order: int32 [B, Hkv, T * K]: where packets begin, by owner.
      starts: int32 [B, Hkv, P + 1]: where the packets of each owner begin in that.
    """

    entry: jax.Array
    owner: jax.Array
    first: jax.Array
    rank: jax.Array
    order: jax.Array
    starts: jax.Array


def _pack(owner, rounds: Rounds) -> _Packets:
    """The packets for entries with owners [B, T, Hkv, K].

    Those with the same owner are numbered by token: an earlier token's travel as if there were no
    later ones.
    """
    owner = jnp.moveaxis(owner, 1, 2)
    batch, heads, tokens, count = owner.shape
    entry = jnp.argsort(owner, axis=-1, stable=True).astype(jnp.int32)
    owner = jnp.take_along_axis(owner, entry, axis=-1)
    place = jnp.arange(count, dtype=jnp.int32)
    begins = jnp.pad(owner[..., 1:] != owner[..., :-1], ((0, 0),) * 3 + ((1, 0),))
    run = lax.cummax(jnp.where(begins, place, 0), axis=3)
    first = place - (place - run) % rounds.width
    real = (first == place) & (owner < rounds.parts)

    rows, size = batch * heads, tokens * count
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    key = jnp.where(real, owner, rounds.parts).reshape(rows, size) + row * (rounds.parts + 1)
    order = jnp.argsort(key.ravel(), stable=True).astype(jnp.int32)
    starts = first_places(key.ravel()[order], rows * (rounds.parts + 1))
    rank = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
        - starts[key.ravel()]
    )
    starts = starts[:-1].reshape(rows, rounds.parts + 1) - row * size
    order = order.reshape(rows, size) - row * size
    return _Packets(
        entry, owner, first, rank.reshape(owner.shape),
        order.reshape(batch, heads, size), starts.reshape(batch, heads, -1),
    )  # fmt: skip


def _number_of_rounds(packets: _Packets, rounds: Rounds) -> jax.Array:
    """How many it takes until no device has packets left, the same on all of them."""
    most = jnp.max(jnp.diff(packets.starts))
    return lax.pmax(-(-most // rounds.capacity), tuple(varying(most) | {"seq"}))


class _Sent(NamedTuple):
    """Which packets leave in a round, [P, B, C, Hkv]: row, place in it, and if there is one."""

    token: jax.Array
    place: jax.Array
    real: jax.Array


def _sent(packets: _Packets, number, rounds: Rounds) -> _Sent:
    starts = packets.starts[..., None]
    place = starts[:, :, :-1] + number * rounds.capacity
    place += jnp.arange(rounds.capacity, dtype=jnp.int32)
    real = place < starts[:, :, 1:]
    count = packets.entry.shape[3]
    flat = place.reshape(*place.shape[:2], -1)
    packet = jnp.take_along_axis(packets.order, flat, axis=2, mode="clip").reshape(place.shape)
    return _Sent(*(x.transpose(2, 0, 3, 1) for x in (packet // count, packet % count, real)))


def _send(x):
    """[P, ...] to each device its part; what comes is [P, ...], by the device that it is from."""
    return lax.all_to_all(x, "seq", 0, 0, tiled=True)


def _received(x):
    """[P, B, C, Hkv, ...] -> [B, P * C, Hkv, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _returned(x, rounds: Rounds):
    """[B, P * C, Hkv, ...] back to the devices that they are of, and there in the same shape."""
    x = x.reshape(x.shape[0], rounds.parts, rounds.capacity, *x.shape[2:])
    return _received(_send(jnp.moveaxis(x, 1, 0)))


def _of_tokens(x, sent: _Sent):
    """[B, T, Hq or Hkv, ...] -> rows of the packets at their owners, [B, P * C, Hq or Hkv, ...]."""
    heads = sent.token.shape[3]
    grouped = x.reshape(*x.shape[:2], heads, -1)
    b, h = (y[..., None, :] for y in jnp.ogrid[: len(x), :heads])
    rows = grouped.at[b, jnp.where(sent.real, sent.token, x.shape[1]), h].get(
        mode="fill", fill_value=0
    )
    rows = _received(_send(rows))
    return rows.reshape(*rows.shape[:2], *x.shape[2:])


def _of_entries(x, sent: _Sent, packets: _Packets, rounds: Rounds, fill):
    """[B, T, Hkv, K] -> of the packets' entries, at their owners, [B, P * C, Hkv, width]."""
    count = x.shape[3]
    b, h = (y[..., None, :, None] for y in jnp.ogrid[: len(x), : x.shape[2]])
    place = sent.place[..., None] + jnp.arange(rounds.width, dtype=jnp.int32)
    token = sent.token[..., None]
    clipped = jnp.minimum(place, count - 1)
    target = jnp.arange(rounds.parts, dtype=jnp.int32).reshape(-1, *[1] * 4)
    real = sent.real[..., None] & (place < count) & (packets.owner[b, h, token, clipped] == target)
    found = x[b, token, h, packets.entry[b, h, token, clipped]]
    return _received(_send(jnp.where(real, found, fill)))


def _arrived(packets: _Packets, number, rounds: Rounds) -> jax.Array:
    """Where among the rows [P * C] that come back a packet's is, out of bounds if in no other.

    int32 [B, Hkv, T, K], by the place at which the packet begins.
    """
    slot = packets.rank - number * rounds.capacity
    place = jnp.arange(packets.entry.shape[3], dtype=jnp.int32)
    real = (packets.first == place) & (packets.owner < rounds.parts)
    real &= (slot >= 0) & (slot < rounds.capacity)
    nowhere = rounds.parts * rounds.capacity
    return jnp.where(real, packets.owner * rounds.capacity + slot, nowhere)


def _rows(x, where, fill):
    """[B, P * C, H, ...] -> what tokens got, [B, T, H, ...]; `where` is [B, Hkv, T]."""
    heads = where.shape[1]
    b, h = (y[:, None] for y in jnp.ogrid[: len(x), :heads])
    grouped = x.reshape(*x.shape[:2], heads, -1)
    found = grouped.at[b, where.swapaxes(1, 2), h].get(mode="fill", fill_value=fill)
    return found.reshape(*found.shape[:2], *x.shape[2:])


def _add_returned(add, total, where, sent: _Sent, block_size: int):
    """What tokens have got so far, with what comes back in a round.

    A round's packets are of tokens near each other where choices are even, so only a few chunks of
    tokens are touched.

    Args:
      add: of where a place's packets have come to, [B, Hkv, chunk], and a chunk of `total`.
      total: a tree of [B, T, ...].
      where: of `_arrived`.
      sent: of the round.
      block_size: S, which divides T.
    """
    tokens = where.shape[2]
    size = tokens // math.gcd(tokens // block_size, _MAX_CHUNKS)

    def of_chunk(i, total):
        at = lax.dynamic_slice_in_dim(where, i * size, size, axis=2)

        def of_place(place, part):
            return add(lax.dynamic_index_in_dim(at, place, 3, keepdims=False), part)

        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size, axis=1), total)
        part = lax.fori_loop(0, where.shape[3], of_place, part)
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i * size, axis=1), total, part
        )

    first = jnp.min(jnp.where(sent.real, sent.token, tokens))
    last = jnp.max(jnp.where(sent.real, sent.token, -1))
    return lax.fori_loop(first // size, last // size + 1, of_chunk, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, owner, column, score, block_size, implementation, rounds):
    packets = _pack(owner, rounds)
    last = _number_of_rounds(packets, rounds)

    def one_round(carry):
        number, total = carry
        sent = _sent(packets, number, rounds)
        columns = _of_entries(column, sent, packets, rounds, -1)
        values = _of_entries(score, sent, packets, rounds, -jnp.inf)
        out, lse = block_sparse_attention(
            _of_tokens(q, sent), k, v,
            BlockCSR.from_selection(columns, values, k.shape[1] // block_size),
            block_size=block_size, implementation=implementation,
        )  # fmt: skip
        out, lse = _returned(out, rounds), _returned(lse, rounds)
        where = _arrived(packets, number, rounds)

        def add(at, total):
            return total.add((_rows(out, at, 0), _rows(lse, at, -jnp.inf)))

        return number + 1, _add_returned(add, total, where, sent, block_size)

    empty = vary_with(q, SoftmaxSum.empty(q))
    _, total = lax.while_loop(lambda x: x[0] < last, one_round, (jnp.int32(0), empty))
    return total.branch(q.dtype)


def _attend_fwd(q, k, v, owner, column, score, block_size, implementation, rounds):
    out, lse = _attend(q, k, v, owner, column, score, block_size, implementation, rounds)
    return (out, lse), (q, k, v, owner, column, score, out, lse)


def _attend_bwd(block_size, implementation, rounds, residuals, cotangents):
    q, k, v, owner, column, score, out, lse = residuals
    out_bar, lse_bar = cotangents
    delta = jnp.sum(out_bar.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - lse_bar
    numbers = jnp.stack([jnp.where(lse > -jnp.inf, lse, 0), delta], axis=-1)
    packets = _pack(owner, rounds)
    last = _number_of_rounds(packets, rounds)

    def one_round(carry):
        number, q_bar, k_bar, v_bar, score_bar = carry
        sent = _sent(packets, number, rounds)
        of_q, of_k, of_v, of_score = partial_gradients(
            _of_tokens(q, sent), k, v,
            _of_entries(column, sent, packets, rounds, -1),
            _of_entries(score, sent, packets, rounds, -jnp.inf),
            _of_tokens(out_bar, sent), *jnp.unstack(_of_tokens(numbers, sent), axis=-1),
            block_size, implementation,
        )  # fmt: skip
        of_q, of_score = _returned(of_q, rounds), _returned(of_score, rounds)
        where = _arrived(packets, number, rounds)

        def add(at, q_bar):
            return q_bar + _rows(of_q, at, 0).astype(q_bar.dtype)

        q_bar = _add_returned(add, q_bar, where, sent, block_size)
        b, h = (x[..., None, None] for x in jnp.ogrid[: where.shape[0], : where.shape[1]])
        place = jnp.arange(where.shape[3], dtype=jnp.int32)
        at = jnp.take_along_axis(where, packets.first, axis=3)
        score_bar += of_score.at[b, at, h, place - packets.first].get(mode="fill", fill_value=0)
        k_bar, v_bar = k_bar + of_k.astype(k_bar.dtype), v_bar + of_v.astype(v_bar.dtype)
        return number + 1, q_bar, k_bar, v_bar, score_bar

    def zeros(x):
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    bars = zeros(q), zeros(k), zeros(v), zeros(packets.entry.astype(score.dtype))
    carry = jnp.int32(0), *vary_with(q, bars)
    _, q_bar, k_bar, v_bar, score_bar = lax.while_loop(lambda x: x[0] < last, one_round, carry)
    back = jnp.argsort(packets.entry, axis=-1)  # from sorted places to entries
    score_bar = jnp.moveaxis(jnp.take_along_axis(score_bar, back, axis=-1), 2, 1)
    bars = (x.astype(y.dtype) for x, y in ((q_bar, q), (k_bar, k), (v_bar, v)))
    return *bars, None, None, score_bar.astype(score.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)
