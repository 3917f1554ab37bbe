"""Landmark tokens: a pyramid of the most salient tokens of the past, O(log N) of them a query.

A node of level 0 holds the m most salient tokens of L tokens in a row; a node of level l + 1 the
m most salient of two neighbouring nodes of level l. Going back from a(t), a query sees r or
r + 1 nodes of level 0, then of level 1, and so on until the past is covered. Segments are counted
from the start of the document, so that packed documents see what separate ones would.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.segments import choose_rows, first_places, sum_runs
from sparsex_jax.config import AttentionConfig


class Nodes(NamedTuple):
    """Nodes of one level of the pyramid, most salient token first (ties: the earlier one).

    Attributes:
      salience: f32 [B, Hkv, nodes, m].
      token: int32 [B, Hkv, nodes, m], positions, or what else numbers the keys.
    """

    salience: jax.Array
    token: jax.Array


def _most_salient(salience: jax.Array, token: jax.Array, count: int) -> Nodes:
    best, place = jax.lax.top_k(salience, count)
    return Nodes(best, jnp.take_along_axis(token, place, axis=-1))


def leaf_nodes(salience: jax.Array, first_token: jax.Array | int, size: int, count: int) -> Nodes:
    """The most salient tokens of each `size` tokens in a row.

    Args:
      salience: f32 [B, T, Hkv]; a rest of fewer than `size` tokens is dropped.
      first_token: position of the first one.
      size: tokens of a node.
      count: m.
    """
    batch, tokens, heads = salience.shape
    nodes = tokens // size
    grouped = salience[:, : nodes * size].reshape(batch, nodes, size, heads).transpose(0, 3, 1, 2)
    token = first_token + jnp.arange(nodes * size, dtype=jnp.int32).reshape(nodes, size)
    return _most_salient(grouped, jnp.broadcast_to(token, grouped.shape), count)


def merge_nodes(left: Nodes, right: Nodes) -> Nodes:
    """Nodes that hold the most salient tokens of `left` and `right` (the later ones)."""
    salience, token = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), left, right)
    return _most_salient(salience, token, left.salience.shape[-1])


def merge_pairs(nodes: Nodes) -> Nodes:
    """The level above: each node of it covers two neighbours; an odd last one is dropped."""
    even = nodes.token.shape[2] // 2 * 2
    return merge_nodes(*(Nodes(*(x[:, :, i:even:2] for x in nodes)) for i in (0, 1)))


def num_levels(segments: int, config: AttentionConfig) -> int:
    """Levels that the queries of a past of `segments` complete segments need."""
    levels = 0
    while segments > 0:
        taken = min(segments, config.nodes_per_level + (segments - config.nodes_per_level) % 2)
        segments = (segments - taken) // 2
        levels += 1
    return levels


def build_pyramid(leaves: Nodes, config: AttentionConfig, sliding: bool) -> list[Nodes]:
    """All levels over a sequence that starts at position 0.

    Args:
      leaves: of each segment, or, if sliding, of each block.
      config: segment length, block size, nodes per level.
      sliding: nodes start at every block instead of at multiples of their own length; packed
        documents need that, for their segments count from the document's start.

    Returns:
      Level by level, aligned nodes [B, Hkv, T / (L 2^l), m] or sliding nodes [B, Hkv, <= T / S, m].
    """
    leaves_per_segment = config.segment_length // config.block_size if sliding else 1
    levels = num_levels(leaves.token.shape[2] // leaves_per_segment, config)
    if not sliding:
        pyramid = [leaves]
        while len(pyramid) < levels:
            pyramid.append(merge_pairs(pyramid[-1]))
        return pyramid[:levels]
    nodes, width, pyramid = leaves, 1, []
    while len(pyramid) < levels:
        if width >= leaves_per_segment:
            pyramid.append(nodes)
        later = Nodes(*(x[:, :, width:] for x in nodes))
        size = later.token.shape[2]
        nodes = merge_nodes(Nodes(*(x[:, :, :size] for x in nodes)), later)
        width *= 2
    return pyramid


def visible_nodes(segments: jax.Array, levels: int, nodes_per_level: int) -> list[tuple]:
    """Which nodes a query sees, given the complete segments of its remote past.

    Args:
      segments: c_0, int32, any shape.
      levels: of the pyramid.
      nodes_per_level: r.

    Returns:
      For each level (first, count): nodes [first, first + count) of the document.
    """
    spans = []
    for _ in range(levels):
        count = jnp.minimum(segments, nodes_per_level + (segments - nodes_per_level) % 2)
        spans.append((segments - count, count))
        segments = (segments - count) // 2
    return spans


def visible_landmarks(
    pyramid: list[Nodes],
    segments: jax.Array,
    first_block: jax.Array | None,
    config: AttentionConfig,
) -> tuple[jax.Array, jax.Array]:
    """The landmarks that queries see.

    Args:
      pyramid: of `build_pyramid`, sliding exactly if `first_block` is given.
      segments: c_0 of each query, int32 [B, Q].
      first_block: first block of each query's document, int32 [B, Q], or None.
      config: as for the pyramid.

    Returns:
      Their tokens, int32 [B, Hkv, Q, levels * (r + 1) * m], then -1; and of how many places of it a
      query sees what is there, int32 [B, Q].
    """
    slots = jnp.arange(config.nodes_per_level + 1, dtype=jnp.int32)
    found, sizes = [], []
    spans = visible_nodes(segments, len(pyramid), config.nodes_per_level)
    for level, (nodes, (first, count)) in enumerate(zip(pyramid, spans, strict=True)):
        index = first[..., None] + slots
        if first_block is not None:
            width = config.segment_length // config.block_size << level
            index = first_block[..., None] + index * width
        batch, queries, _ = index.shape
        flat = jnp.clip(index, 0, nodes.token.shape[2] - 1).reshape(batch, 1, -1, 1)
        token = jnp.take_along_axis(nodes.token, flat, axis=2)
        token = token.reshape(*token.shape[:2], queries, slots.size, -1)
        seen = (slots < count[..., None])[:, None, :, :, None]
        found.append(jnp.where(seen, token, -1).reshape(*token.shape[:3], -1))
        sizes.append(count * nodes.token.shape[3])
    return _without_gaps(jnp.concatenate(found, axis=-1), jnp.stack(sizes, axis=-1))


def _without_gaps(listed: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves together what stands at the beginning of each of a list's parts.

    Args:
      listed: int32 [B, Hkv, Q, parts * size].
      sizes: of what counts in each part, int32 [B, Q, parts].

    Returns:
      The list, with -1 at its end; and how long it is before that, int32 [B, Q].
    """
    place = jnp.arange(listed.shape[-1], dtype=jnp.int32)
    ends = jnp.cumsum(sizes, axis=-1)
    gaps = listed.shape[-1] // sizes.shape[-1] - sizes
    before = place[:, None] >= ends[:, :, None]  # parts that end before a place
    source = place + jnp.sum(jnp.where(before, gaps[:, :, None], 0), axis=-1, dtype=jnp.int32)
    listed = jnp.take_along_axis(listed, source[:, None], axis=-1, mode="clip")
    return jnp.where(place < ends[:, None, :, -1:], listed, -1), ends[..., -1]


@jax.custom_vjp
def gather_keys(
    k: jax.Array, v: jax.Array, salience: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and biases of listed tokens; an empty place (-1) gets the bias -inf.

    A token may be listed many times: its gradients are added in f32, always in one order. An empty
    place passes none on.

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
    keys, values = (jnp.take_along_axis(x, place[..., None], axis=1, mode="clip") for x in (k, v))
    bias = jnp.where(
        token >= 0, jnp.take_along_axis(salience, place, axis=1, mode="clip"), -jnp.inf
    )
    return keys, values, bias


def _gather_keys_fwd(k, v, salience, token):
    return gather_keys(k, v, salience, token), (k[..., :0], salience[..., :0], token)


def _gather_keys_bwd(residuals, cotangents):
    k, salience, token = residuals  # of the first two, shape and type
    batch, num_keys, heads = k.shape[:3]
    size = batch * heads * num_keys
    first = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1) * num_keys
    key = jnp.where(token < 0, size, token + first).ravel()
    order = jnp.argsort(key, stable=True)
    key = key[order]

    def in_order(x):
        x = x.swapaxes(1, 2).astype(salience.dtype)
        return x.reshape(key.size, *x.shape[3:])[order]

    sums = sum_runs(key, jax.tree.map(in_order, cotangents))
    begin = first_places(key, size)
    found = begin[1:] > begin[:-1]

    def by_key(x):
        x = choose_rows(found, x[begin[1:] - 1], 0)
        return x.reshape(batch, heads, num_keys, *x.shape[1:]).swapaxes(1, 2)

    k_bar, v_bar, salience_bar = jax.tree.map(by_key, sums)
    return k_bar.astype(k.dtype), v_bar.astype(k.dtype), salience_bar, None


gather_keys.defvjp(_gather_keys_fwd, _gather_keys_bwd)


Marks = tuple[jax.Array, jax.Array, jax.Array]  # keys, values and biases of landmarks


def gather_landmarks(
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    config: AttentionConfig,
    sliding: bool,
    share: Callable[[Marks], Marks] = lambda marks: marks,
) -> tuple[Marks, list[Nodes]]:
    """The landmarks of a whole sequence, each once, and the pyramid over them.

    Args:
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
      salience: f32 [B, N, Hkv].
      config: the pyramid's shape.
      sliding: as in `build_pyramid`.
      share: makes the landmarks of all parts, in their order, from those of a part of a sequence.

    Returns:
      Keys, values and salience for `landmark_branch`, and its pyramid.
    """
    size = config.block_size if sliding else config.segment_length
    leaves = leaf_nodes(jax.lax.stop_gradient(salience), 0, size, config.landmarks_per_segment)
    marks = share(gather_keys(k, v, salience, leaves.token.reshape(*leaves.token.shape[:2], -1)))
    batch, landmarks, heads = marks[2].shape
    shape = batch, heads, -1, config.landmarks_per_segment
    best = jax.lax.stop_gradient(marks[2]).swapaxes(1, 2).reshape(shape)
    number = jnp.broadcast_to(jnp.arange(landmarks, dtype=jnp.int32), (batch, heads, landmarks))
    return marks, build_pyramid(Nodes(best, number.reshape(shape)), config, sliding)


def all_landmarks(
    k: jax.Array,
    v: jax.Array,
    salience: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
    share: Callable[[Marks], Marks] = lambda marks: marks,
) -> tuple[Marks, tuple[jax.Array, jax.Array]]:
    """The landmarks of every complete segment, and which of them each query sees.

    Attending to them costs m / L of dense attention: quadratic, and kept for ablation.

    Args:
      k: [B, T, Hkv, D].
      v: [B, T, Hkv, D].
      salience: f32 [B, T, Hkv].
      local_start: a(t), int32 [B, T].
      document_start: of the first whole block of each token's document, int32 [B, T], or None.
      config: segment length, landmarks per segment, block size.
      share: as in `gather_landmarks`, without documents only.

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
    return share(gather_keys(k, v, salience, listed.reshape(*listed.shape[:2], -1))), span
