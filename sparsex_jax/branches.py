"""The branches of Sparse-X attention: the window, landmarks, and selected blocks.

Each has keys and queries that may begin at different positions: the op calls them chunk by chunk,
and so does the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_selection import select_blocks, select_blocks_in_nodes
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from pallas_kernels.shapes import pad
from sparsex_jax.config import AttentionConfig
from sparsex_jax.fusion import Branch
from sparsex_jax.landmarks import Nodes, gather_keys, visible_landmarks
from sparsex_jax.rotary import rotate_from
from sparsex_jax.scoring import BlockIndex
from sparsex_jax.spans import remote_end

_TOGETHER = 8  # keys, of which kernels take multiples: lists of landmarks are filled up to one


def local_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_position: jax.Array | int,
    local_start: jax.Array,
    *,
    config: AttentionConfig,
    all_finite: bool = False,
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
      all_finite: promises that all operands and the cotangents are, see `range_attention`.
      implementation: as in `sparse_attention`.
    """
    tokens = q.shape[1]
    reach = config.window + config.block_size
    length = min(tokens + reach, k.shape[1])
    first_key = jnp.clip(first_position - reach, 0, k.shape[1] - length)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first_key, length, axis=1) for x in (k, v))
    q, k = (
        rotate_from(x, first, config.rope_base)
        for x, first in ((q, first_position), (k, first_key))
    )
    end = first_position + 1 + jnp.arange(tokens, dtype=jnp.int32)
    return range_attention(
        q, k, v, local_start - first_key, end - first_key,
        all_finite=all_finite, implementation=implementation,
    )  # fmt: skip


def dynamic_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_features: jax.Array,
    blocks: BlockIndex,
    local_start: jax.Array,
    document_start: jax.Array | None,
    *,
    recency: jax.Array | None = None,
    config: AttentionConfig,
    implementation: str | None = None,
) -> Branch:
    """Attention of each query to the K remote blocks that score best.

    Args:
      q: [B, T, Hq, D].
      k: [B, N, Hkv, D]; key n stands at position n.
      v: [B, N, Hkv, D].
      query_features: u, scaled, [B, T, Hkv, d_s].
      blocks: of the N keys.
      local_start: a(t), int32 [T] or [B, T].
      document_start: of the first whole block of each token's document, int32 [B, T], or None.
      recency: f32 [B, T, Hkv], or None: see `select_remote`.
      config: block size, top_k, search, fusion (the score is a bias with "sum" only).
      implementation: as in `sparse_attention`.
    """
    index, bias = select_remote(
        query_features, blocks, local_start, document_start, config, implementation, recency
    )
    pattern = BlockCSR.from_selection(index, bias, -(-k.shape[1] // config.block_size))
    return block_sparse_attention(
        q, k, v, pattern, block_size=config.block_size, implementation=implementation
    )


def select_remote(
    query_features: jax.Array,
    blocks: BlockIndex,
    local_start: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
    implementation: str | None = None,
    recency: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The K remote blocks that score best for each query, of those searched, and their biases.

    With `config.near_reach` K // 2 are the best of so many tokens before a(t), or of half of the
    remote past, and the others of what lies before.

    Arguments as in `dynamic_branch`, but

      recency: f32 [B, T, Hkv], what a block's bias loses for each time that 1 + its distance / W
        doubles, in nats, the distance being that of its end from a(t); None for nothing.

    Returns:
      index, int32 [B, T, Hkv, K], -1 where there is none, and bias, f32 likewise: the score less
      what recency takes, or 0 with fusion="softmax".
    """
    size = config.block_size
    limit = local_start // size
    start = None if document_start is None else document_start // size

    def best(count, start, limit):
        if blocks.nodes is None:
            return select_blocks(
                query_features, blocks.features, limit, count,
                start=start, implementation=implementation,
            )  # fmt: skip
        return select_blocks_in_nodes(
            query_features, blocks.features, blocks.nodes, limit, count,
            node_size=config.search_node_size, beam=config.search_beam, start=start,
            implementation=implementation,
        )  # fmt: skip

    if not config.near_reach:
        index, score = best(config.top_k, start, limit)
    else:
        half = ((0 if start is None else start) + limit) // 2
        middle = jnp.maximum(limit - config.near_reach // size, half)
        near = config.top_k // 2
        parts = best(near, middle, limit), best(config.top_k - near, start, middle)
        index, score = (jnp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
    if config.fusion == "softmax":
        return index, jnp.zeros_like(score)
    if recency is not None:
        distance = size * (limit[..., None, None] - 1 - index)
        score -= recency[..., None] * jnp.log2(1 + distance / config.window)
    return index, score


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
    all_finite: bool = False,
    implementation: str | None = None,
    document_origin: jax.Array | int = 0,
) -> Branch:
    """Attention of each query, q [B, T, Hq, D], to the landmarks that the pyramid shows it.

    The other arguments are those of `landmark_ranges`, and two of `range_attention`.
    """
    if not pyramid:
        return _no_keys(q)
    ranges = landmark_ranges(
        k, v, salience, pyramid, first_position, q.shape[1], document_start, config,
        document_origin,
    )  # fmt: skip
    return range_attention(q, *ranges, all_finite=all_finite, implementation=implementation)


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
    listed, count = visible_landmarks(pyramid, past // config.segment_length, first_block, config)
    listed = pad(listed, -1, _TOGETHER, fill=-1)
    length = listed.shape[-1]
    keys, values, bias = gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))
    begin = jnp.broadcast_to(number * length, (len(k), tokens))
    end = begin + count[:, number]
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
