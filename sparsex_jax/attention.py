"""Sparse-X attention: exact local window, landmark pyramid and learned top-k blocks, fused.

`sparse_attention` is the whole op over a sequence. The branches stand alone, too, each with keys
and queries that may begin at different positions: the cache calls them chunk by chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from sparsex_jax.config import AttentionConfig
from sparsex_jax.landmarks import Nodes, build_pyramid, leaf_nodes, visible_landmarks
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.spans import check_segment_ids, pasts, remote_end

Branch = tuple[jax.Array, jax.Array]  # out [B, T, Hq, D], lse f32 [B, T, Hq]


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
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)
    local_start, first, limit = pasts(positions, segment_ids, config)
    q_turned, k_turned = (apply_rotary(x, positions, config.rope_base) for x in (q, k))
    local = range_attention(
        q_turned, k_turned, v, local_start, positions + 1, implementation=implementation
    )
    if q.shape[1] <= config.window:
        return local[0]

    dynamic = None
    if config.top_k:
        q_and_k = (q_turned, k_turned) if config.fusion == "softmax" else (q, k)
        dynamic = dynamic_branch(
            *q_and_k, v, query_features, block_features, limit, first,
            config=config, implementation=implementation,
        )  # fmt: skip
    landmarks = _landmarks(q, k, v, salience, limit, first, config, implementation)
    return fuse(local, landmarks, dynamic, landmark_gate, dynamic_gate, config)


def _landmarks(q, k, v, salience, limit, first, config, implementation) -> Branch | None:
    """The landmark branch of a whole sequence, in the config's scope."""
    if config.landmarks == "off":
        return None
    if config.landmarks == "all":
        return all_landmarks_branch(
            q, k, v, salience, limit, first, config=config, implementation=implementation
        )
    pyramid = build_pyramid(jax.lax.stop_gradient(salience), config, sliding=first is not None)
    return landmark_branch(
        q, k, v, salience, pyramid, 0, first, config=config, implementation=implementation
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
      k: [B, N, Hkv, D]; key n stands at position n.
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      pyramid: over the keys; sliding if `document_start` is given.
      first_position: of the queries, int32.
      document_start: of the first whole block of each token's document, int32 [B, T] (then
        queries begin at 0 and T = N), or None.
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
        leader_start = document_start[:, jnp.clip(leader, 0, tokens - 1)]
        first_block = leader_start // config.block_size
    past = remote_end(leader[None], leader_start, config) - leader_start
    listed = visible_landmarks(pyramid, past // config.segment_length, first_block, config)
    length = listed.shape[-1]
    keys, values, bias = gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))
    begin = ((positions + shift) // group - first_group) * length
    end = begin + length
    if document_start is not None:  # a group's later tokens may begin a document: no remote past
        begin = jnp.where(
            remote_end(positions, document_start, config) > document_start, begin, end
        )
    return range_attention(
        q, keys, values, begin, end, key_bias=bias, implementation=implementation
    )


def all_landmarks_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None,
    *,
    config: AttentionConfig,
    implementation: str | None = None,
) -> Branch:
    """Attention of each query to the landmarks of every complete segment of its remote past.

    Costs m / L of dense attention: quadratic, and kept for ablation. Arguments as in
    `landmark_branch`, for queries and keys that both begin at position 0.
    """
    tokens, count, size = q.shape[1], config.landmarks_per_segment, config.segment_length
    still = jax.lax.stop_gradient(salience)
    if document_start is None:
        listed = leaf_nodes(still, 0, size, count).token
        begin, end = jnp.zeros_like(local_start), local_start // size * count
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
        end = begin + segments * width * count
    if listed.shape[2] == 0:
        return _no_keys(q)
    keys, values, bias = gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))
    return range_attention(
        q, keys, values, begin, end, key_bias=bias, implementation=implementation
    )


def gather_keys(
    k: jax.Array, v: jax.Array, salience: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and biases of listed tokens; an empty place (-1) gets the bias -inf.

    Args:
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      token: int32 [B, Hkv, M].

    Returns:
      ([B, M, Hkv, D], [B, M, Hkv, D], f32 [B, M, Hkv]).
    """
    token = token.swapaxes(1, 2)
    place = jnp.maximum(token, 0)
    keys, values = (jnp.take_along_axis(x, place[..., None], axis=1) for x in (k, v))
    bias = jnp.where(token >= 0, jnp.take_along_axis(salience, place, axis=1), -jnp.inf)
    return keys, values, bias


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


def merge_softmax(first: Branch, second: Branch) -> Branch:
    """One softmax over the keys of two branches, which must not share any.

    With m = max(lse_1, lse_2) the weights are exp(lse_i - m); docs/math.md has the numerics.
    """
    (out_1, lse_1), (out_2, lse_2) = first, second
    empty = jnp.isneginf(lse_1) & jnp.isneginf(lse_2)
    # Where both are -inf, differences have no value and no gradient: compute with 0 there.
    lse_1, lse_2 = (jnp.where(empty, 0, lse) for lse in (lse_1, lse_2))
    lse = jnp.logaddexp(lse_1, lse_2)
    weights = [jnp.where(empty, 0, jnp.exp(x - lse))[..., None] for x in (lse_1, lse_2)]
    out = weights[0] * out_1.astype(lse.dtype) + weights[1] * out_2.astype(lse.dtype)
    return out.astype(out_1.dtype), jnp.where(empty, -jnp.inf, lse)


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
