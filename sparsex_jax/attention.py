"""Sparse-X attention: exact local window, landmark pyramid and learned top-k blocks, fused.

`sparse_attention` is the whole op over a sequence. The branches stand alone, too, each with keys
and queries that may begin at different positions: the cache calls them chunk by chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import Nodes, build_pyramid, gather_keys, leaf_nodes, visible_landmarks
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import check_segment_ids, pasts, remote_end
from sparsex_jax.token_chunks import map_chunks

Branch = tuple[jax.Array, jax.Array]  # out [B, T, Hq, D], lse f32 [B, T, Hq]

# Long sequences are taken in chunks of so many tokens, or more: each costs a pass over all keys.
_CHUNK = 2**15
_MAX_CHUNKS = 8


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
    _check_arguments(
        q, k, v, config, salience, query_features, block_features, landmark_gate, dynamic_gate,
        segment_ids,
    )  # fmt: skip
    batch, tokens = q.shape[:2]
    positions = jnp.arange(tokens, dtype=jnp.int32)
    local_start, document_start, limit = (
        None if x is None else jnp.broadcast_to(x, (batch, tokens))
        for x in pasts(positions, segment_ids, config)
    )
    turned_k = apply_rotary(k, positions, config.rope_base) if config.fusion == "softmax" else None
    marks = span = pyramid = None
    has_landmarks = tokens >= config.window + config.segment_length
    if has_landmarks and config.landmarks == "pyramid":
        marks, pyramid = landmark_keys(k, v, salience, config, document_start is not None)
    elif has_landmarks and config.landmarks == "all":
        marks, span = all_landmarks(k, v, salience, limit, document_start, config)

    def attend(first, queries: _Queries, keys: _Keys):
        """Attention of a chunk of tokens; the queries begin at position `first`."""
        local = local_branch(
            queries.q, keys.k, keys.v, first, queries.local_start,
            config=config, implementation=implementation,
        )  # fmt: skip
        landmarks = dynamic = None
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
        if tokens > config.window and config.top_k:
            far = queries.q, keys.k
            if keys.turned_k is not None:
                far = _turn(queries.q, first, config), keys.turned_k
            dynamic = dynamic_branch(
                *far, keys.v, queries.features, keys.block_features, queries.limit,
                queries.document_start, config=config, implementation=implementation,
            )  # fmt: skip
        return fuse(local, landmarks, dynamic, queries.landmark_gate, queries.dynamic_gate, config)

    return map_chunks(
        attend,
        _Queries(
            q, query_features, landmark_gate, dynamic_gate, local_start, document_start, limit, span
        ),
        _Keys(k, turned_k, v, block_features, marks),
        size=_chunk_size(tokens, config.block_size),
        saved=("block_sparse_attention", "block_selection"),
    )


def _chunk_size(tokens: int, block_size: int) -> int:
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
    marks: tuple[jax.Array, jax.Array, jax.Array] | None  # landmarks' keys, values, biases


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
    size = config.block_size
    index, score = select_blocks(
        query_features, block_features, local_start // size, config.top_k,
        start=None if document_start is None else document_start // size,
        implementation=implementation,
    )  # fmt: skip
    if config.fusion == "softmax":
        score = jnp.zeros_like(score)
    blocks = BlockCSR.from_selection(index, score, -(-k.shape[1] // size))
    return block_sparse_attention(q, k, v, blocks, block_size=size, implementation=implementation)


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
) -> Branch:
    """Attention of each query to the landmarks of its remote past that the pyramid shows it.

    The set of landmarks changes only every L tokens (every S where documents are packed), so one
    list of keys serves a group of queries, and the lists of all groups, laid end to end, make the
    branch a range attention.

    Args:
      q: [B, T, Hq, D].
      k: [B, M, Hkv, D], of which the pyramid's nodes name some.
      v: [B, M, Hkv, D].
      salience: f32 [B, M, Hkv].
      pyramid: over the sequence; sliding if `document_start` is given.
      first_position: of the queries, int32.
      document_start: of the first whole block of the document of each token of the sequence, int32
        [B, N], or None.
      config: the pyramid's shape.
      implementation: as in `sparse_attention`.
    """
    if not pyramid:
        return _no_keys(q)
    batch, tokens = q.shape[:2]
    group = config.segment_length if document_start is None else config.block_size
    shift = (1 - config.window) % group  # a(t) changes between groups of t + shift, not within
    first_group = (first_position + shift) // group
    groups = 1 if tokens == 1 else (tokens - 2) // group + 2
    leader = (first_group + jnp.arange(groups, dtype=jnp.int32)) * group - shift
    positions = first_position + jnp.arange(tokens, dtype=jnp.int32)
    if document_start is None:
        leader_start, first_block = jnp.zeros((batch, groups), jnp.int32), None
    else:
        leader_start = document_start[:, jnp.clip(leader, 0, document_start.shape[1] - 1)]
        first_block = leader_start // config.block_size
    past = remote_end(leader[None], leader_start, config) - leader_start
    listed = visible_landmarks(pyramid, past // config.segment_length, first_block, config)
    length = listed.shape[-1]
    keys, values, bias = gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))
    begin = ((positions + shift) // group - first_group) * length
    end = begin + length
    if document_start is not None:  # a group's later tokens may begin a document: no remote past
        document_start = document_start.at[:, positions].get(mode="clip")
        begin = jnp.where(
            remote_end(positions, document_start, config) > document_start, begin, end
        )
    return range_attention(
        q, keys, values, begin, end, key_bias=bias, implementation=implementation
    )


def landmark_keys(
    k: jax.Array, v: jax.Array, salience: jax.Array, config: AttentionConfig, sliding: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], list[Nodes]]:
    """The landmarks of a whole sequence, each once, and the pyramid over them.

    Args:
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      config: the pyramid's shape.
      sliding: as in `build_pyramid`.

    Returns:
      Keys, values and salience for `landmark_branch`, and its pyramid.
    """
    size = config.block_size if sliding else config.segment_length
    leaves = leaf_nodes(jax.lax.stop_gradient(salience), 0, size, config.landmarks_per_segment)
    marks = gather_keys(k, v, salience, leaves.token.reshape(*leaves.token.shape[:2], -1))
    number = jnp.arange(marks[0].shape[1], dtype=jnp.int32).reshape(leaves.token.shape[2:])
    leaves = leaves._replace(token=jnp.broadcast_to(number, leaves.token.shape))
    return marks, build_pyramid(leaves, config, sliding)


def all_landmarks(
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The landmarks of every complete segment, and which of them each query sees.

    Attending to them costs m / L of dense attention: quadratic, and kept for ablation.

    Args:
      k: [B, T, Hkv, D].
      v: [B, T, Hkv, D].
      salience: f32 [B, T, Hkv].
      local_start: a(t), int32 [B, T].
      document_start: of the first whole block of each token's document, int32 [B, T], or None.
      config: segment length, landmarks per segment, block size.

    Returns:
      Keys, values and biases, and the range of them that each query sees, int32 [B, T] each.
    """
    tokens, count, size = k.shape[1], config.landmarks_per_segment, config.segment_length
    still = jax.lax.stop_gradient(salience)
    if document_start is None:
        listed = leaf_nodes(still, 0, size, count).token
        span = jnp.zeros_like(local_start), local_start // size * count
    else:
        width = size // config.block_size
        shifted = [
            leaf_nodes(still[:, i * config.block_size :], i * config.block_size, size, count).token
            for i in range(width)
        ]
        fewest = tokens // config.block_size  # nodes that start at each block; the last are empty
        shifted = [
            jnp.pad(x, ((0, 0), (0, 0), (0, -(-fewest // width) - x.shape[2]), (0, 0)),
                    constant_values=-1)
            for x in shifted
        ]  # fmt: skip
        listed = jnp.stack(shifted, axis=3)
        listed = listed.reshape(*listed.shape[:2], -1, count)[:, :, :fewest]
        starts = document_start[:, : fewest * config.block_size : config.block_size]
        block = jnp.arange(fewest, dtype=jnp.int32)
        aligned = (block - starts // config.block_size) % width == 0
        listed = jnp.where(aligned[:, None, :, None], listed, -1)
        begin = document_start // config.block_size * count
        segments = (local_start - document_start) // size
        span = begin, begin + segments * width * count
    return gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1)), span


def fuse(
    local: Branch,
    landmarks: Branch | None,
    dynamic: Branch | None,
    landmark_gate: jax.Array | None,
    dynamic_gate: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """The branches as one output: a gated sum, or one softmax merged from their lse."""
    if config.fusion == "softmax":
        return local[0] if dynamic is None else merge_softmax(local, dynamic)[0]
    wide = jnp.promote_types(local[0].dtype, jnp.float32)
    total = local[0].astype(wide)
    for branch, gate in ((landmarks, landmark_gate), (dynamic, dynamic_gate)):
        if branch is not None:
            out = branch[0].astype(wide)
            total += out if gate is None else out * gate.astype(wide)[..., None]
    return total.astype(local[0].dtype)


class SoftmaxSum(NamedTuple):
    """A softmax over keys that come branch by branch, before its division.

    For merging many branches, of blocks or devices, one after the other: an `lse` that is carried
    from merge to merge is rounded in each, and the errors add up (docs/math.md has how much). Here
    only each branch's own is rounded.

    Attributes:
      top: the largest lse so far, f32 [B, T, Hq]; -inf without keys. It has no gradient.
      total: the sum of exp(lse - top), f32 [B, T, Hq].
      out: the sum of exp(lse - top) * out, f32 [B, T, Hq, D].
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def of(cls, branch: Branch) -> "SoftmaxSum":
        """The sum of one branch (out [B, T, Hq, D], lse [B, T, Hq])."""
        out, lse = branch
        top = jax.lax.stop_gradient(lse)
        total = jnp.exp(lse - _finite(top))
        return cls(top, total, out.astype(lse.dtype) * total[..., None])

    def add(self, branch: Branch) -> "SoftmaxSum":
        """The sum with a further branch, which must not share keys with the others."""
        other = SoftmaxSum.of(branch)
        top = jnp.maximum(self.top, other.top)
        old, new = (jnp.exp(x.top - _finite(top)) for x in (self, other))
        out = self.out * old[..., None] + other.out * new[..., None]
        return SoftmaxSum(top, self.total * old + other.total * new, out)

    def branch(self, dtype: jnp.dtype) -> Branch:
        """Output of a dtype and lse of the softmax over all keys; 0 and -inf without any."""
        seen = self.total > 0
        total = jnp.where(seen, self.total, 1)
        out = jnp.where(seen[..., None], self.out / total[..., None], 0).astype(dtype)
        return out, jnp.where(seen, self.top + jnp.log(total), -jnp.inf)


def merge_softmax(first: Branch, second: Branch) -> Branch:
    """One softmax over the keys of two branches, which must not share any.

    To merge more than a few, add them to a `SoftmaxSum`. docs/math.md has the numerics.
    """
    return SoftmaxSum.of(first).add(second).branch(first[0].dtype)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x > -jnp.inf, x, 0)


def _no_keys(q: jax.Array) -> Branch:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, wide)


def _check_arguments(
    q, k, v, config, salience, query_features, block_features, landmark_gate, dynamic_gate,
    segment_ids,
):  # fmt: skip
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
