"""Attention over a sequence that is split: each device has T / P tokens in a row.

All of it runs within `jax.shard_map`, over the axis "seq". What a device needs of others:

- of its left neighbour the last tokens (`from_left`): for the convolution and the window;
- of all the landmarks, one token in a hundred, and the blocks' features, one row a block; it builds
  the pyramid over the whole sequence, and selects for its own tokens among all blocks;
- the keys and values of selected blocks, or what attention to them gives (`ring`, `dispatch`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mesh_axes import vary_over, varying
from pallas_kernels.range_attention import range_attention
from sparsex_jax import spans
from sparsex_jax.attention import check_arguments, chunk_size
from sparsex_jax.branches import landmark_branch, local_branch, select_remote
from sparsex_jax.config import AttentionConfig
from sparsex_jax.fusion import Branch, fuse
from sparsex_jax.landmarks import Marks, all_landmarks, gather_landmarks
from sparsex_jax.parallel.costs import cheaper_strategy
from sparsex_jax.parallel.dispatch import dispatch_attention
from sparsex_jax.parallel.mesh import axis_size, part_rules
from sparsex_jax.parallel.ring import ring_attention
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.scoring import BlockIndex, Blocks
from sparsex_jax.token_chunks import map_chunks

STRATEGIES = {"ring": ring_attention, "dispatch": dispatch_attention}


def from_left(x: jax.Array, count: int) -> jax.Array:
    """The last `count` tokens of the left neighbour's [B, T, ...]; zeros for the first device.

    Raises:
      ValueError: it has fewer.
    """
    if count > x.shape[1]:
        raise ValueError(
            f"each of {axis_size('seq')} devices has {x.shape[1]} tokens, of which its neighbour"
            f" needs {count}: split the sequence less"
        )
    steps = [(i, i + 1) for i in range(axis_size("seq") - 1)]
    return lax.ppermute(x[:, x.shape[1] - count :], "seq", steps)


def of_last(x: jax.Array) -> jax.Array:
    """The last device's array, on all of them."""
    parts = axis_size("seq")
    if parts == 1:
        return x
    return lax.psum(jnp.where(lax.axis_index("seq") == parts - 1, x, 0), "seq")


def first_position(tokens: int) -> jax.Array | int:
    """Position of the first of a device's tokens."""
    return lax.axis_index("seq") * tokens if axis_size("seq") > 1 else 0


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """`spans.document_starts`, of a device's tokens [B, T]: positions in the whole sequence."""
    local = spans.document_starts(segment_ids)
    parts, tokens = axis_size("seq"), segment_ids.shape[1]
    if parts == 1:
        return local
    ends = jnp.stack((segment_ids[:, 0], segment_ids[:, -1], local[:, -1]))
    heads, tails, starts = jnp.moveaxis(lax.all_gather(ends, "seq"), 1, 0)  # [P, B] each
    # Where the document begins that is open at the end of each part.
    part = jnp.arange(parts, dtype=jnp.int32)
    continued = jnp.pad(heads[1:] == tails[:-1], ((1, 0), (0, 0)))
    begins = jnp.where((starts == 0) & continued, 0, starts + part[:, None] * tokens)
    begins = lax.cummax(begins, axis=0)
    own = lax.axis_index("seq")
    before = jnp.where(continued[own], begins[own - 1], own * tokens)[:, None]
    return jnp.where(local == 0, before, local + own * tokens)


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: AttentionConfig,
    salience: jax.Array | None = None,
    query_features: jax.Array | None = None,
    block_features: jax.Array | None = None,
    block_mass: jax.Array | None = None,
    landmark_gate: jax.Array | None = None,
    dynamic_gate: jax.Array | None = None,
    recency: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    strategy: str = "auto",
) -> jax.Array:
    """`sparsex_jax.attention.sparse_attention`, of which each device has a part of the tokens.

    Equal to it but for rounding, and as strictly causal.

    Args:
      q: [B, T, Hq, D], the device's, like all arrays.
      k: [B, T, Hkv, D].
      v: [B, T, Hkv, D].
      config: as there, and so the rest but the last.
      salience: f32 [B, T, Hkv].
      query_features: [B, T, Hkv, d_s].
      block_features: [B, T // S, Hkv, d_s].
      block_mass: f32 [B, T // S, Hkv].
      landmark_gate: f32 [B, T, Hq].
      dynamic_gate: f32 [B, T, Hq].
      recency: f32 [B, T, Hkv].
      segment_ids: int [B, T].
      implementation: of the primitives.
      strategy: "ring", "dispatch" or "auto" (`cheaper_strategy`).

    Returns:
      [B, T, Hq, D] in the type of q.

    Raises:
      ValueError: as `sparse_attention`; T is too short, or no whole number of blocks and segments;
        landmarks="all" with segment_ids.
    """
    check_arguments(
        q, k, v, config, salience, query_features, block_features, block_mass, landmark_gate,
        dynamic_gate, recency, segment_ids,
    )  # fmt: skip
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q {q.shape} must have all tokens of k {k.shape} where they are split")
    _check_part(q.shape[1], config, segment_ids)
    sequence = _Sequence.of(q, segment_ids, config)
    reach = config.window + config.block_size
    near_k, near_v = (jnp.concatenate((from_left(x, reach), x), axis=1) for x in (k, v))
    marks = pyramid = span = document_start = None
    if sequence.length >= config.window + config.segment_length:
        if config.landmarks == "pyramid":
            sliding = sequence.document_start is not None
            marks, pyramid = gather_landmarks(k, v, salience, config, sliding, _gather_tokens)
        elif config.landmarks == "all":
            marks, span = all_landmarks(
                k, v, salience, sequence.limit, None, config, _gather_tokens
            )
    if sequence.document_start is not None:
        before = from_left(sequence.document_start, config.block_size)
        document_start = jnp.concatenate((before, sequence.document_start), axis=1)
    dynamic = None
    if sequence.length > config.window and config.top_k:
        dynamic = _dynamic_branch(
            q, k, v, query_features, Blocks(block_features, block_mass), recency, sequence,
            config=config, implementation=implementation, strategy=strategy,
        )  # fmt: skip

    # Without documents there is no padding that might hold anything.
    how: dict[str, Any] = {"all_finite": segment_ids is None, "implementation": implementation}

    def attend(first, queries: _Queries, keys: _Keys):
        """Attention of a chunk of the device's tokens, whose first is its token `first`."""
        local = local_branch(
            queries.q, keys.k, keys.v, reach + first, queries.local_start, config=config, **how
        )
        landmarks = None
        if pyramid is not None:
            landmarks = landmark_branch(
                queries.q, *keys.marks, pyramid, sequence.first + first, document_start,
                config=config, document_origin=sequence.first - config.block_size, **how,
            )  # fmt: skip
        elif span is not None:
            marked_k, marked_v, bias = keys.marks
            landmarks = range_attention(queries.q, marked_k, marked_v, *queries.span, bias, **how)
        gates = queries.landmark_gate, queries.dynamic_gate
        return fuse(local, landmarks, queries.dynamic, *gates, config)

    # Keys of the window are counted from the first of the neighbour's: only distances matter.
    local_start = sequence.local_start - (sequence.first - reach)
    return map_chunks(
        attend,
        _Queries(q, dynamic, landmark_gate, dynamic_gate, local_start, span),
        _Keys(near_k, near_v, marks),
        size=chunk_size(q.shape[1], config.block_size),
        saved=(),
    )


class _Queries(NamedTuple):
    """What belongs to the tokens of a chunk, [B, chunk, ...]; None where there is none."""

    q: jax.Array
    dynamic: Branch | None
    landmark_gate: jax.Array | None
    dynamic_gate: jax.Array | None
    local_start: jax.Array
    span: tuple[jax.Array, jax.Array] | None  # of all landmarks


class _Keys(NamedTuple):
    """What all tokens of the device share; None where there is none."""

    k: jax.Array
    v: jax.Array
    marks: Marks | None


class _Sequence(NamedTuple):
    """Where a device's tokens are in the sequence, and their pasts, int32 [B, T].

    Attributes:
      length: tokens of the sequence.
      first: position of the device's first one.
      local_start: the first local token.
      document_start: the first token of the remote past; None for 0.
      limit: the first token behind it.
    """

    length: int
    first: jax.Array | int
    local_start: jax.Array
    document_start: jax.Array | None
    limit: jax.Array

    @classmethod
    def of(cls, q, segment_ids, config: AttentionConfig) -> "_Sequence":
        """Of the tokens of q [B, T, ...]."""
        batch, tokens = q.shape[:2]
        first = first_position(tokens)
        positions = first + jnp.arange(tokens, dtype=jnp.int32)
        starts = None if segment_ids is None else document_starts(segment_ids)
        pasts = (
            None if x is None else vary_over(varying(q), jnp.broadcast_to(x, (batch, tokens)))
            for x in spans.pasts(positions, starts, config)
        )
        return cls(tokens * axis_size("seq"), first, *pasts)


def _gather_tokens(tree):
    """Arrays [B, T, ...] of all devices, one after the other, [B, P * T, ...]."""
    return jax.tree.map(lambda x: lax.all_gather(x, "seq", axis=1, tiled=True), tree)


def _dynamic_branch(
    q, k, v, query_features, blocks: Blocks, recency, sequence: _Sequence, *,
    config: AttentionConfig, implementation: str | None, strategy: str,
) -> Branch:  # fmt: skip
    """Attention of each query to the K blocks that score best, wherever in the sequence."""
    index, bias = select_remote(
        query_features, BlockIndex.of(_gather_tokens(blocks), config), sequence.limit,
        sequence.document_start, config, implementation, recency,
    )  # fmt: skip
    if config.fusion == "softmax":
        positions = sequence.first + jnp.arange(q.shape[1], dtype=jnp.int32)
        q, k = (apply_rotary(x, positions, config.rope_base) for x in (q, k))
    if strategy == "auto":
        strategy = cheaper_strategy(axis_size("seq"), q, k, config)
    return STRATEGIES[strategy](
        q, k, v, index, bias, block_size=config.block_size, implementation=implementation
    )


def _check_part(tokens: int, config: AttentionConfig, segment_ids) -> None:
    unit, name, least = part_rules(config)
    if tokens % unit or tokens < least:
        raise ValueError(
            f"each of {axis_size('seq')} devices has {tokens} tokens: make it a multiple of"
            f" {name}={unit} and at least window + block_size = {least}, or split the sequence less"
        )
    if config.landmarks == "all" and segment_ids is not None:
        raise ValueError(
            "landmarks='all' with segment_ids works on whole sequences only: use"
            " landmarks='pyramid', or do not split the sequence (mesh.seq=1)"
        )
