"""Sparse-X attention: exact local window, landmark pyramid and learned top-k blocks, fused.

The whole op over a sequence; its branches are in `sparsex_jax.branches`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import BlockCSR, add_up, adds_up, value_scales
from pallas_kernels.dispatch import target_device
from pallas_kernels.mesh_axes import vary_with
from pallas_kernels.range_attention import range_attention
from pallas_kernels.shapes import batchable, differentiated_as
from sparsex_jax.branches import dynamic_branch, landmark_branch, local_branch, select_remote
from sparsex_jax.config import AttentionConfig
from sparsex_jax.fusion import fuse
from sparsex_jax.landmarks import Marks, all_landmarks, gather_landmarks
from sparsex_jax.rotary import apply_rotary, rotate_from
from sparsex_jax.scoring import BlockIndex, Blocks
from sparsex_jax.spans import check_segment_ids, document_starts, pasts
from sparsex_jax.token_chunks import even_size, map_chunks, update_by_chunks

# Long sequences are taken in chunks of so many tokens, or more: each costs a pass over all keys,
# and with gradients another one over their sums.
_CHUNK = 2**15
# Or all at once, up to so many on GPUs, with gradients: then nothing is computed anew.
_WHOLE = 2**17
_MAX_CHUNKS = {"differentiable": 8, "in_place": 13}


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
) -> jax.Array:
    """Attention of every token to its window, to landmarks and to its K best blocks.

    Strictly causal: the output at t does not change by one bit when later tokens change. Queries
    may be those of the last M tokens alone.

    Args:
      q: [B, M, Hq, D], M <= T, normalised, without RoPE.
      k: [B, T, Hkv, D], likewise.
      v: [B, T, Hkv, D].
      config: window, block size, top_k, how blocks are searched, landmarks, fusion.
      salience: g, f32 [B, T, Hkv]; needed unless landmarks are off.
      query_features: u, [B, M, Hkv, d_s], times exp(tau) / sqrt(d_s); needed unless top_k is 0.
      block_features: c, [B, T // S, Hkv, d_s]; needed unless top_k is 0.
      block_mass: of the pooling of each block (`scoring.Blocks`), f32 [B, T // S, Hkv]; needed
        where nodes are searched.
      landmark_gate: f32 [B, M, Hq], factor of the landmark branch; None is 1.
      dynamic_gate: f32 [B, M, Hq], factor of the dynamic branch; None is 1.
      recency: f32 [B, M, Hkv], nats that a selected block's score loses with each doubling of its
        distance (`branches.select_remote`); needed where the config has it.
      segment_ids: int [B, T], one number a document, each starting at a multiple of S; None is one
        document a row, of finite numbers alone.
      implementation: of the primitives, as in `pallas_kernels`; None picks by platform.

    Returns:
      [B, M, Hq, D] in the type of q.

    Raises:
      ValueError: shapes, types or arguments that do not fit the config, or each other.
    """
    operands = (
        q, k, v, salience, query_features, block_features, block_mass, landmark_gate, dynamic_gate,
        recency, segment_ids,
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
    size = min(tokens, chunk_size(tokens, config.block_size, in_place=True))
    if tokens <= config.window or not config.top_k or config.fusion != "sum":
        return False
    if tokens < k.shape[1]:  # queries of a part of the tokens
        return False
    return adds_up(
        q, k, v, tokens=size, capacity=config.top_k, block_size=config.block_size,
        implementation=implementation,
    )  # fmt: skip


def _attend(
    q, k, v, salience, query_features, block_features, block_mass, landmark_gate, dynamic_gate,
    recency, segment_ids, *, config: AttentionConfig, implementation: str | None,
    in_place: bool = False,
):  # fmt: skip
    """`sparse_attention` of arguments that fit; `in_place` is not differentiable."""
    batch, tokens = k.shape[:2]
    before = tokens - q.shape[1]  # tokens before the first query
    positions = jnp.arange(tokens, dtype=jnp.int32)
    document_start = None if segment_ids is None else document_starts(segment_ids)
    local_start, document_start, limit = (
        None if x is None else jnp.broadcast_to(x, (batch, tokens))
        for x in pasts(positions, document_start, config)
    )
    turned_k = apply_rotary(k, positions, config.rope_base) if config.fusion == "softmax" else None
    blocks = None
    if config.top_k:
        blocks = BlockIndex.of(Blocks(block_features, block_mass), config)
    marks = span = pyramid = None
    has_landmarks = tokens >= config.window + config.segment_length
    if has_landmarks and config.landmarks == "pyramid":
        marks, pyramid = gather_landmarks(k, v, salience, config, document_start is not None)
    elif has_landmarks and config.landmarks == "all":
        marks, span = all_landmarks(k, v, salience, limit, document_start, config)

    # Without documents there is no padding that might hold anything.
    how: dict[str, Any] = {"all_finite": segment_ids is None, "implementation": implementation}

    def near(first, queries: _Queries, keys: _Keys):
        """The branches that choose no blocks, of a chunk of queries from the `first` on."""
        first += before
        local = local_branch(
            queries.q, keys.k, keys.v, first, queries.local_start, config=config, **how
        )
        landmarks = None
        if pyramid is not None:
            landmarks = landmark_branch(
                queries.q, *keys.marks, pyramid, first, document_start, config=config, **how
            )
        elif span is not None:
            marked_k, marked_v, bias = keys.marks
            landmarks = range_attention(queries.q, marked_k, marked_v, *queries.span, bias, **how)
        return local, landmarks

    def attend(first, queries: _Queries, keys: _Keys):
        """Attention of a chunk of queries, from the `first` on."""
        local, landmarks = near(first, queries, keys)
        dynamic = None
        if tokens > config.window and config.top_k:
            far = queries.q, keys.k
            if keys.turned_k is not None:
                far = rotate_from(queries.q, before + first, config.rope_base), keys.turned_k
            dynamic = dynamic_branch(
                *far, keys.v, queries.features, keys.blocks, queries.limit,
                queries.document_start, recency=queries.recency, config=config,
                implementation=implementation,
            )  # fmt: skip
        return fuse(local, landmarks, dynamic, queries.landmark_gate, queries.dynamic_gate, config)

    def write(first, queries: _Queries, out):
        """Writes the attention of a chunk of tokens, from position `first` on, to `out`."""
        local, landmarks = near(first, queries, keys)
        pattern = BlockCSR.from_selection(*queries.selected, -(-tokens // config.block_size))
        added = [(local[0], None)]
        if landmarks is not None:
            added.append((landmarks[0], queries.landmark_gate))
        return add_up(
            out, q, k, v, pattern, first, heads=heads, gate=queries.dynamic_gate, added=added,
            value_scales=scales, block_size=config.block_size,
        )  # fmt: skip

    keys = _Keys(k, turned_k, v, blocks, marks)
    of_tokens = local_start, document_start, limit, span
    queries = _Queries(
        q, query_features, landmark_gate, dynamic_gate, recency,
        *jax.tree.map(lambda x: x[:, before:], of_tokens),
    )  # fmt: skip
    size = chunk_size(q.shape[1], config.block_size, in_place=in_place)
    if in_place:
        selected = select_remote(
            query_features, blocks, queries.limit, queries.document_start, config, implementation,
            recency,
        )  # fmt: skip
        # What has led to the selection is not needed any more.
        queries = queries._replace(
            features=None, recency=None, limit=None, document_start=None, selected=selected
        )
        # With few entries for a block all heads together, or there would be even more launches.
        heads = k.shape[2] if tokens < _MAX_CHUNKS["in_place"] * _CHUNK else 1
        scales = value_scales(v, block_size=config.block_size)
        out = update_by_chunks(write, queries, jax.lax.empty(q.shape, q.dtype), size=size)
        return vary_with(q, out)
    saved = "block_sparse_attention", "block_selection"
    return map_chunks(attend, queries, keys, size=size, saved=saved)


def chunk_size(tokens: int, block_size: int, *, in_place: bool = False) -> int:
    """Tokens of a chunk, a multiple of the block size."""
    most = _MAX_CHUNKS["in_place" if in_place else "differentiable"]
    chunks = min(most, -(-tokens // _CHUNK)) or 1
    if not in_place and tokens <= _WHOLE and target_device().platform == "gpu":
        chunks = 1
    return even_size(tokens, chunks, block_size)


class _Queries(NamedTuple):
    """What belongs to the tokens of a chunk, [B, chunk, ...]; None where there is none."""

    q: jax.Array
    features: jax.Array | None
    landmark_gate: jax.Array | None
    dynamic_gate: jax.Array | None
    recency: jax.Array | None
    local_start: jax.Array
    document_start: jax.Array | None
    limit: jax.Array | None
    span: tuple[jax.Array, jax.Array] | None  # of all landmarks
    selected: tuple[jax.Array, jax.Array] | None = None  # blocks and biases, as of `select_remote`


class _Keys(NamedTuple):
    """What all tokens share; None where there is none."""

    k: jax.Array
    turned_k: jax.Array | None  # with RoPE, for fusion="softmax"
    v: jax.Array
    blocks: BlockIndex | None
    marks: Marks | None


def check_arguments(
    q, k, v, config, salience, query_features, block_features, block_mass, landmark_gate,
    dynamic_gate, recency, segment_ids,
):  # fmt: skip
    """Raises ValueError where arguments of `sparse_attention` do not fit."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {q.shape} and k {k.shape} must be [batch, token, head, dim]")
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    if k.shape != (batch, k.shape[1], kv_heads, dim) or v.shape != k.shape:
        raise ValueError(
            f"k {k.shape} and v {v.shape} must agree with q {q.shape} but for the number of heads"
        )
    if tokens > k.shape[1]:
        raise ValueError(
            f"q has {tokens} tokens, k {k.shape[1]}: queries are of the last tokens, or all of them"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads: use a multiple of the {kv_heads} of k and v")
    if dim % 2:
        raise ValueError(f"head dim {dim} is odd: RoPE turns pairs, use an even one")
    keys, blocks, width = k.shape[1], k.shape[1] // config.block_size, config.score_dim
    has_landmarks, has_dynamic = config.landmarks != "off", config.top_k > 0
    gated, in_nodes = config.fusion == "sum", has_dynamic and config.search_node_size > 0
    for name, value, shape, used, needed in (
        ("salience", salience, (batch, keys, kv_heads), has_landmarks, True),
        ("query_features", query_features, (batch, tokens, kv_heads, width), has_dynamic, True),
        ("block_features", block_features, (batch, blocks, kv_heads, width), has_dynamic, True),
        ("block_mass", block_mass, (batch, blocks, kv_heads), in_nodes, True),
        ("landmark_gate", landmark_gate, (batch, tokens, heads), has_landmarks and gated, False),
        ("dynamic_gate", dynamic_gate, (batch, tokens, heads), has_dynamic and gated, False),
        ("recency", recency, (batch, tokens, kv_heads), has_dynamic and config.recency, True),
    ):
        if value is None:
            if used and needed:
                raise ValueError(f"{name} is missing: this config needs it, {shape}")
        elif not used:
            raise ValueError(
                f"{name} is given, but landmarks={config.landmarks!r}, top_k={config.top_k},"
                f" fusion={config.fusion!r}, search_node_size={config.search_node_size},"
                f" recency={config.recency} do not use it: leave it out"
            )
        elif value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape} but must be {shape}")
    if segment_ids is not None:
        check_segment_ids(segment_ids, (batch, keys), config.block_size)
