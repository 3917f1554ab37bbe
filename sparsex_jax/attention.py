"""Sparse-X attention: exact local window, landmark pyramid and learned top-k blocks, fused.

`sparse_attention` is the whole op over a sequence. The branches stand alone, too, each with keys
and queries that may begin at different positions: the cache calls them chunk by chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import add_up, adds_up, block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.mesh_axes import vary_with
from pallas_kernels.range_attention import range_attention
from pallas_kernels.shapes import batchable, differentiated_as, pad
from sparsex_jax.config import AttentionConfig
from sparsex_jax.fusion import Branch, fuse
from sparsex_jax.landmarks import (
    Marks,
    Nodes,
    all_landmarks,
    gather_keys,
    gather_landmarks,
    visible_landmarks,
)
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import check_segment_ids, document_starts, pasts, remote_end
from sparsex_jax.token_chunks import map_chunks, update_by_chunks

# Long sequences are taken in chunks of so many tokens, or more: each costs a pass over all keys.
_CHUNK = 2**15
_MAX_CHUNKS = 8
_TOGETHER = 8  # keys, of which kernels take multiples: lists of landmarks are filled up to one


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: AttentionConfig,
    salience: jax.Array | None = None,
    query_features: jax.Array | None = None,
    block_features: jax.Array | None = None,
    landmark_gate: jax.Array | None = None,
    dynamic_gate: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of every token to its window, to landmarks and to its K best blocks.

    Strictly causal: the output at t does not change by one bit when later tokens change.

    Args:
      q: [B, T, Hq, D], normalised, without RoPE.
      k: [B, T, Hkv, D], likewise.
      v: [B, T, Hkv, D].
      config: window, block size, top_k, landmarks, fusion.
      salience: g, f32 [B, T, Hkv]; needed unless landmarks are off.
      query_features: u, [B, T, Hkv, d_s], times exp(tau) / sqrt(d_s); needed unless top_k is 0.
      block_features: c, [B, T // S, Hkv, d_s]; needed unless top_k is 0.
      landmark_gate: f32 [B, T, Hq], factor of the landmark branch; None is 1.
      dynamic_gate: f32 [B, T, Hq], factor of the dynamic branch; None is 1.
      segment_ids: int [B, T], one number a document, each starting at a multiple of S; None is one
        document a row.
      implementation: of the primitives, as in `pallas_kernels`; None picks by platform.

    Returns:
      [B, T, Hq, D] in the type of q.

    Raises:
      ValueError: shapes, types or arguments that do not fit the config, or each other.
    """
    operands = (
        q, k, v, salience, query_features, block_features, landmark_gate, dynamic_gate, segment_ids
    )  # fmt: skip
    check_arguments(*operands[:3], config, *operands[3:])
    attend = functools.partial(_attend, config=config, implementation=implementation)
    if not _adds_up(q, k, v, config, implementation):
        return attend(*operands)
    in_place = batchable(functools.partial(attend, in_place=True))
    return differentiated_as(attend, in_place)(*operands)


def _adds_up(q, k, v, config: AttentionConfig, implementation: str | None) -> bool:
    """Whether without gradients the dynamic branch can add up all branches in place."""
    tokens = q.shape[1]
    size = min(tokens, chunk_size(tokens, config.block_size))
    if tokens <= config.window or not config.top_k or config.fusion != "sum" or tokens % size:
        return False
    return adds_up(
        q, k, v, tokens=size, capacity=config.top_k, block_size=config.block_size,
        implementation=implementation,
    )  # fmt: skip


def _attend(
    q, k, v, salience, query_features, block_features, landmark_gate, dynamic_gate, segment_ids,
    *, config: AttentionConfig, implementation: str | None, in_place: bool = False,
):  # fmt: skip
    """`sparse_attention` of arguments that fit; `in_place` is not differentiable."""
    batch, tokens = q.shape[:2]
    positions = jnp.arange(tokens, dtype=jnp.int32)
    document_start = None if segment_ids is None else document_starts(segment_ids)
    local_start, document_start, limit = (
        None if x is None else jnp.broadcast_to(x, (batch, tokens))
        for x in pasts(positions, document_start, config)
    )
    turned_k = apply_rotary(k, positions, config.rope_base) if config.fusion == "softmax" else None
    marks = span = pyramid = None
    has_landmarks = tokens >= config.window + config.segment_length
    if has_landmarks and config.landmarks == "pyramid":
        marks, pyramid = gather_landmarks(k, v, salience, config, document_start is not None)
    elif has_landmarks and config.landmarks == "all":
        marks, span = all_landmarks(k, v, salience, limit, document_start, config)

    def near(first, queries: _Queries, keys: _Keys):
        """The branches of a chunk of tokens from position `first` on that choose no blocks."""
        local = local_branch(
            queries.q, keys.k, keys.v, first, queries.local_start,
            config=config, implementation=implementation,
        )  # fmt: skip
        landmarks = None
        if pyramid is not None:
            landmarks = landmark_branch(
                queries.q, *keys.marks, pyramid, first, document_start,
                config=config, implementation=implementation,
            )  # fmt: skip
        elif span is not None:
            marked_k, marked_v, bias = keys.marks
            landmarks = range_attention(
                queries.q, marked_k, marked_v, *queries.span, bias, implementation=implementation
            )
        return local, landmarks

    def attend(first, queries: _Queries, keys: _Keys):
        """Attention of a chunk of tokens; the queries begin at position `first`."""
        local, landmarks = near(first, queries, keys)
        dynamic = None
        if tokens > config.window and config.top_k:
            far = queries.q, keys.k
            if keys.turned_k is not None:
                far = _turn(queries.q, first, config), keys.turned_k
            dynamic = dynamic_branch(
                *far, keys.v, queries.features, keys.block_features, queries.limit,
                queries.document_start, config=config, implementation=implementation,
            )  # fmt: skip
        return fuse(local, landmarks, dynamic, queries.landmark_gate, queries.dynamic_gate, config)

    def write(first, queries: _Queries, out):
        """Writes the attention of a chunk of tokens, from position `first` on, to `out`."""
        blocks = _select_blocks(
            queries.features, block_features, queries.limit, queries.document_start, k.shape[1],
            config, implementation,
        )  # fmt: skip
        local, landmarks = near(first, queries, keys)
        added = [(local[0], None)]
        if landmarks is not None:
            added.append((landmarks[0], landmark_gate))
        return add_up(
            out, q, k, v, blocks, first,
            gate=dynamic_gate, added=added, block_size=config.block_size,
        )  # fmt: skip

    keys = _Keys(k, turned_k, v, block_features, marks)
    queries = _Queries(
        q, query_features, landmark_gate, dynamic_gate, local_start, document_start, limit, span
    )
    size = chunk_size(tokens, config.block_size)
    if in_place:
        queries = queries._replace(landmark_gate=None, dynamic_gate=None)  # not by chunks
        out = update_by_chunks(write, queries, jax.lax.empty(q.shape, q.dtype), size=size)
        return vary_with(q, out)
    saved = "block_sparse_attention", "block_selection"
    return map_chunks(attend, queries, keys, size=size, saved=saved)


def chunk_size(tokens: int, block_size: int) -> int:
    """Tokens of a chunk, a multiple of the block size."""
    chunks = min(_MAX_CHUNKS, -(-tokens // _CHUNK)) or 1
    return -(-tokens // (chunks * block_size)) * block_size


class _Queries(NamedTuple):
    """What belongs to the tokens of a chunk, [B, chunk, ...]; None where there is none."""

    q: jax.Array
    features: jax.Array | None
    landmark_gate: jax.Array | None
    dynamic_gate: jax.Array | None
    local_start: jax.Array
    document_start: jax.Array | None
    limit: jax.Array
    span: tuple[jax.Array, jax.Array] | None  # of all landmarks


class _Keys(NamedTuple):
    """What all tokens share; None where there is none."""

    k: jax.Array
    turned_k: jax.Array | None  # with RoPE, for fusion="softmax"
    v: jax.Array
    block_features: jax.Array | None
    marks: Marks | None


def _turn(x: jax.Array, first: jax.Array | int, config: AttentionConfig) -> jax.Array:
    """RoPE of tokens [B, T, H, D] that begin at position `first`."""
    return apply_rotary(x, first + jnp.arange(x.shape[1], dtype=jnp.int32), config.rope_base)


def local_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_position: jax.Array | int,
    local_start: jax.Array,
    *,
    config: AttentionConfig,
    implementation: str | None = None,
) -> Branch:
    """Attention of each query to its window, with RoPE.

    Args:
      q: [B, T, Hq, D], without RoPE.
      k: [B, N, Hkv, D], likewise; key n stands at position n.
      v: [B, N, Hkv, D].
      first_position: of the queries, int32.
      local_start: a(t), int32 [B, T].
      config: window, block size, RoPE.
      implementation: as in `sparse_attention`.
    """
    tokens = q.shape[1]
    reach = config.window + config.block_size
    length = min(tokens + reach, k.shape[1])
    first_key = jnp.clip(first_position - reach, 0, k.shape[1] - length)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first_key, length, axis=1) for x in (k, v))
    q, k = _turn(q, first_position, config), _turn(k, first_key, config)
    end = first_position + 1 + jnp.arange(tokens, dtype=jnp.int32)
    return range_attention(
        q, k, v, local_start - first_key, end - first_key, implementation=implementation
    )


def dynamic_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_features: jax.Array,
    block_features: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None,
    *,
    config: AttentionConfig,
    implementation: str | None = None,
) -> Branch:
    """Attention of each query to the K remote blocks that score best.

    Args:
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D]; key n stands at position n.
      v: [B, N, Hkv, D].
      query_features: u, scaled, [B, T, Hkv, d_s].
      block_features: c, [B, N // S, Hkv, d_s].
      local_start: a(t), int32 [T] or [B, T].
      document_start: of the first whole block of each token's document, int32 [B, T], or None.
      config: block size, top_k, fusion (the score is a bias with "sum" only).
      implementation: as in `sparse_attention`.
    """
    blocks = _select_blocks(
        query_features, block_features, local_start, document_start, k.shape[1], config,
        implementation,
    )  # fmt: skip
    return block_sparse_attention(
        q, k, v, blocks, block_size=config.block_size, implementation=implementation
    )


def _select_blocks(
    query_features, block_features, local_start, document_start, num_keys: int,
    config: AttentionConfig, implementation: str | None,
) -> BlockCSR:  # fmt: skip
    """The K remote blocks that score best for each query, as a pattern."""
    index, bias = select_remote(
        query_features, block_features, local_start, document_start, config, implementation
    )
    return BlockCSR.from_selection(index, bias, -(-num_keys // config.block_size))


def select_remote(
    query_features: jax.Array,
    block_features: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The K remote blocks that score best for each query, and the biases that they get.

    Arguments as in `dynamic_branch`.

    Returns:
      index, int32 [B, T, Hkv, K], -1 where there is none, and bias, f32 likewise: the score, or 0
      with fusion="softmax".
    """
    size = config.block_size
    index, score = select_blocks(
        query_features, block_features, local_start // size, config.top_k,
        start=None if document_start is None else document_start // size,
        implementation=implementation,
    )  # fmt: skip
    return index, jnp.zeros_like(score) if config.fusion == "softmax" else score


class Ranges(NamedTuple):
    """Keys and values, and the range of them that each query sees: as `range_attention` takes them.

    Attributes:
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      start: int32 [T] or [B, T].
      end: int32 [T] or [B, T].
      bias: f32 [B, N, Hkv].
    """

    k: jax.Array
    v: jax.Array
    start: jax.Array
    end: jax.Array
    bias: jax.Array


def landmark_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    pyramid: list[Nodes],
    first_position: jax.Array | int,
    document_start: jax.Array | None,
    *,
    config: AttentionConfig,
    implementation: str | None = None,
    document_origin: jax.Array | int = 0,
) -> Branch:
    """Attention of each query, q [B, T, Hq, D], to the landmarks that the pyramid shows it.

    The other arguments are those of `landmark_ranges`, and the implementation of the primitive.
    """
    if not pyramid:
        return _no_keys(q)
    ranges = landmark_ranges(
        k, v, salience, pyramid, first_position, q.shape[1], document_start, config,
        document_origin,
    )  # fmt: skip
    return range_attention(q, *ranges, implementation=implementation)


def landmark_ranges(
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    pyramid: list[Nodes],
    first_position: jax.Array | int,
    tokens: int,
    document_start: jax.Array | None,
    config: AttentionConfig,
    document_origin: jax.Array | int = 0,
) -> Ranges:
    """The landmarks of the remote past of each of T queries.

    The set of landmarks changes only every L tokens (every S where documents are packed), so one
    list of keys serves a group of queries, and the lists of all groups, laid end to end, make the
    branch a range attention.

    Args:
      k: [B, M, Hkv, D], of which the pyramid's nodes name some.
      v: [B, M, Hkv, D].
      salience: f32 [B, M, Hkv].
      pyramid: over the sequence, at least a level; sliding if `document_start` is given.
      first_position: of the queries, int32.
      tokens: T.
      document_start: of the first whole block of the document of each token of the sequence, int32
        [B, N], or None; those of the queries and of the S tokens before them are used.
      config: the pyramid's shape.
      document_origin: position of the first token that `document_start` is of.
    """
    group = config.segment_length if document_start is None else config.block_size
    leader, number = landmark_groups(first_position, tokens, group, config)
    groups = len(leader)
    positions = first_position + jnp.arange(tokens, dtype=jnp.int32)
    if document_start is None:
        leader_start, first_block = jnp.zeros((len(k), groups), jnp.int32), None
    else:
        leader_start = document_start[
            :, jnp.clip(leader - document_origin, 0, document_start.shape[1] - 1)
        ]
        first_block = leader_start // config.block_size
    past = remote_end(leader[None], leader_start, config) - leader_start
    listed = visible_landmarks(pyramid, past // config.segment_length, first_block, config)
    listed = pad(listed, -1, _TOGETHER, fill=-1)
    length = listed.shape[-1]
    keys, values, bias = gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))
    begin = number * length
    end = begin + length
    if document_start is not None:  # a group's later tokens may begin a document: no remote past
        document_start = document_start.at[:, positions - document_origin].get(mode="clip")
        begin = jnp.where(
            remote_end(positions, document_start, config) > document_start, begin, end
        )
    return Ranges(keys, values, begin, end, bias)


def landmark_groups(
    first_position: jax.Array | int, tokens: int, size: int, config: AttentionConfig
) -> tuple[jax.Array, jax.Array]:
    """Queries that see the same landmarks.

    Args:
      first_position: of the queries, int32.
      tokens: how many there are.
      size: tokens of a group: L, or S where documents are packed.
      config: window and block size.

    Returns:
      A position with the group's remote past, int32 [groups]; the group of each query, int32 [T].
    """
    shift = (1 - config.window) % size  # a(t) changes between groups of t + shift, not within
    first_group = (first_position + shift) // size
    groups = 1 if tokens == 1 else (tokens - 2) // size + 2
    leader = (first_group + jnp.arange(groups, dtype=jnp.int32)) * size - shift
    positions = first_position + jnp.arange(tokens, dtype=jnp.int32)
    return leader, (positions + shift) // size - first_group


def _no_keys(q: jax.Array) -> Branch:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, wide)


def check_arguments(
    q, k, v, config, salience, query_features, block_features, landmark_gate, dynamic_gate,
    segment_ids,
):  # fmt: skip
    """Raises ValueError where arguments of `sparse_attention` do not fit."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {q.shape} and k {k.shape} must be [batch, token, head, dim]")
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape != (batch, tokens, kv_heads, dim) or v.shape != k.shape:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must agree with q {q.shape} but for the number of heads"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads: use a multiple of the {kv_heads} of k and v")
    if dim % 2:
        raise ValueError(f"head dim {dim} is odd: RoPE turns pairs, use an even one")
    blocks, width = tokens // config.block_size, config.score_dim
    has_landmarks, has_dynamic = config.landmarks != "off", config.top_k > 0
    gated = config.fusion == "sum"
    for name, value, shape, used, needed in (
        ("salience", salience, (batch, tokens, kv_heads), has_landmarks, True),
        ("query_features", query_features, (batch, tokens, kv_heads, width), has_dynamic, True),
        ("block_features", block_features, (batch, blocks, kv_heads, width), has_dynamic, True),
        ("landmark_gate", landmark_gate, (batch, tokens, heads), has_landmarks and gated, False),
        ("dynamic_gate", dynamic_gate, (batch, tokens, heads), has_dynamic and gated, False),
    ):
        if value is None:
            if used and needed:
                raise ValueError(f"{name} is missing: this config needs it, {shape}")
        elif not used:
            raise ValueError(
                f"{name} is given, but landmarks={config.landmarks!r}, top_k={config.top_k},"
                f" fusion={config.fusion!r} do not use it: leave it out"
            )
        elif value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape} but must be {shape}")
    if segment_ids is not None:
        check_segment_ids(segment_ids, (batch, tokens), config.block_size)
