"""Attention of the baselines, strictly causal, over the primitives of Sparse-X.

Sources: Longformer (Beltagy et al., 2020, arXiv:2004.05150), BigBird (Zaheer et al., 2020,
arXiv:2007.14062), each in its causal form: global tokens are seen by later ones, and see their own
past only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from sparsex_jax.baselines.pattern import Pattern, random_blocks
from sparsex_jax.branches import local_branch
from sparsex_jax.fusion import Branch, fuse, merge_softmax
from sparsex_jax.rotary import rotate_from
from sparsex_jax.spans import check_segment_ids, document_starts, pasts


def baseline_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    pattern: Pattern,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of the last M tokens of a sequence, by one softmax over the keys of a pattern.

    Args:
      q: [B, M, Hq, D], M <= T, normalised, without RoPE.
      k: [B, T, Hkv, D], likewise.
      v: [B, T, Hkv, D].
      pattern: of the layer.
      segment_ids: int [B, T], as in `sparse_attention`; global tokens and random blocks are a
        document's own.
      implementation: of the primitives.

    Returns:
      [B, M, Hq, D] in the type of q.

    Raises:
      ValueError: segment_ids have another shape, or a document starts within a block.
    """
    batch, tokens = k.shape[:2]
    document_start = None
    before = tokens - q.shape[1]  # tokens before the first query
    positions = before + jnp.arange(q.shape[1], dtype=jnp.int32)
    if segment_ids is not None:
        check_segment_ids(segment_ids, (batch, tokens), pattern.block_size)
        document_start = document_starts(segment_ids)[:, before:]
    local_start, first_block, _ = pasts(positions, document_start, pattern)
    # Without documents there is no padding that might hold anything.
    how: dict[str, Any] = {"all_finite": segment_ids is None, "implementation": implementation}
    far_q, far_k = q, k
    if pattern.turns_remote:
        far_q = rotate_from(q, before, pattern.rope_base)
        far_k = rotate_from(k, 0, pattern.rope_base)
    if pattern.kind == "dense" and pattern.turns_remote:
        start = jnp.zeros_like(positions) if document_start is None else document_start
        return range_attention(far_q, far_k, v, start, positions + 1, **how)[0]
    local = local_branch(q, k, v, before, local_start, config=pattern, **how)
    remote = None
    if tokens > pattern.window:
        remote = remote_branch(
            far_q, far_k, v, positions, local_start, document_start, first_block,
            pattern=pattern, implementation=implementation,
        )  # fmt: skip
    return fuse(local, None, remote, None, None, pattern)


def remote_branch(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    local_start: jax.Array,
    document_start: jax.Array | None = None,
    first_block: jax.Array | None = None,
    *,
    pattern: Pattern,
    implementation: str | None = None,
) -> Branch:
    """Attention of each query to what its pattern shows it before its window.

    Args:
      q: [B, T, Hq, D], with RoPE exactly if the pattern says so.
      k: [B, N, Hkv, D], likewise; key n stands at position n. Longformer's may be the global
        tokens alone.
      v: [B, N, Hkv, D].
      positions: of the queries, int32 [T].
      local_start: a(t), int32 [T] or [B, T].
      document_start: of each query's document, int32 [B, T]; None for 0.
      first_block: of its first whole block, likewise.
      pattern: of the layer.
      implementation: of the primitives.
    """
    begin = jnp.zeros_like(local_start) if document_start is None else document_start
    if pattern.kind == "dense":
        return range_attention(q, k, v, begin, local_start, implementation=implementation)
    seen = k, v
    if document_start is None:
        seen = k[:, : pattern.global_tokens], v[:, : pattern.global_tokens]
    end = jnp.minimum(begin + pattern.global_tokens, local_start)
    first = range_attention(q, *seen, begin, end, implementation=implementation)
    if pattern.kind == "longformer":
        return first
    batch, tokens = q.shape[:2]
    index = random_blocks(positions, 0 if first_block is None else first_block, pattern)
    # Without this, XLA sorts them while it compiles, for minutes.
    index = jax.lax.optimization_barrier(index)
    index = jnp.broadcast_to(index, (batch, tokens, index.shape[-1]))[:, :, None]
    index = jnp.broadcast_to(index, (batch, tokens, k.shape[2], index.shape[-1]))
    size = pattern.block_size
    blocks = BlockCSR.from_selection(index, None, -(-k.shape[1] // size))
    random = block_sparse_attention(
        q, k, v, blocks, block_size=size, implementation=implementation
    )  # fmt: skip
    return merge_softmax(first, random)
