"""A loss that teaches block scores where attention would look.

A block that is not selected gives its score no gradient: what has once fallen behind stays there.
So a sample of queries is matched with the keys of its whole remote past, and the scores learn which
blocks hold the keys that match best, selected or not: from the Kullback-Leibler divergence of the
distribution that they give from the one that q.k gives, as in the warm-up of DeepSeek-V3.2's
lightning indexer (2025). A block counts by its best key. q and k themselves do not learn from it.
"""

import functools

import jax
import jax.numpy as jnp

from sparsex_jax.config import AttentionConfig
from sparsex_jax.spans import remote_end

SAMPLE = 512  # queries of a sequence
_CHUNK = 32  # of them at a time: their logits are held for all keys
_SHARPNESS = 2.0  # of the distribution to learn


def sample_queries(weights: jax.Array) -> jax.Array:
    """Queries to learn from: evenly among those that weigh most in the loss.

    Args:
      weights: f32 [B, T], of the tokens' losses.

    Returns:
      int32 [B, min(T, `SAMPLE`)].
    """
    count = min(weights.shape[1], SAMPLE)
    order = jnp.argsort(-weights, axis=1, stable=True).astype(jnp.int32)
    heaviest = jnp.sum(weights == weights.max(axis=1, keepdims=True), axis=1, keepdims=True)
    step = jnp.maximum(heaviest, count) / count
    place = (jnp.arange(count) * step).astype(jnp.int32)
    return jnp.take_along_axis(order, place, axis=1)


def selection_loss(
    q: jax.Array,
    k: jax.Array,
    query_features: jax.Array,
    block_features: jax.Array,
    queries: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """The mean divergence over a sequence's queries and KV heads, in nats.

    Queries that see fewer than two blocks do not count.

    Args:
      q: [B, M, Hq, D], without RoPE, of the last M tokens.
      k: [B, T, Hkv, D], likewise, of all.
      query_features: u, [B, M, Hkv, d_s].
      block_features: c, [B, blocks, Hkv, d_s].
      queries: int32 [B, Q], numbers from 0 to M - 1.
      document_start: of each token's document, int32 [B, T], or None.
      config: of the attention.

    Returns:
      f32 [B], of Q x T products each.
    """
    batch, count = queries.shape
    chunks = -(-count // _CHUNK)
    queries = jnp.pad(queries, ((0, 0), (0, chunks * _CHUNK - count)), constant_values=-1)

    q, k = jax.lax.stop_gradient((q, k))
    starts = None if document_start is None else 0
    in_axes = 0, 0, 0, 0, 0, starts

    @jax.checkpoint
    def of_chunk(chunk):
        divergence = jax.vmap(functools.partial(_divergence, config=config), in_axes)
        each, counts = divergence(q, k, query_features, block_features, chunk, document_start)
        return jnp.sum(jnp.where(counts, each, 0), axis=1), jnp.sum(counts, axis=1)

    sums = jax.lax.map(of_chunk, queries.reshape(batch, chunks, _CHUNK).swapaxes(0, 1))
    total, number = (jnp.sum(x, axis=0) for x in sums)
    return total / jnp.maximum(number, 1)


def _divergence(q, k, u, c, queries, document_start, config: AttentionConfig):
    """Of some queries of one sequence, f32 [Q], and whether they count, bool [Q]."""
    size = config.block_size
    blocks, heads, _ = c.shape
    place = jnp.maximum(queries, 0)
    position = place + len(k) - len(q)
    start = jnp.zeros_like(place) if document_start is None else document_start[position]
    end = remote_end(position, start, config) // size
    block = jnp.arange(blocks)
    remote = (block >= -(-start // size)[:, None]) & (block < end[:, None])
    rows = q[place].reshape(len(place), heads, -1, q.shape[2])
    logits = _product("mhgd,nhd->mhgn", rows, k[: blocks * size]) * q.shape[2] ** -0.5
    best = logits.reshape(*logits.shape[:3], blocks, size).max(axis=4)
    target = jnp.mean(jnp.exp(_log_softmax(_SHARPNESS * best, remote[:, None, None])), axis=2)
    log_share = _log_softmax(_product("mhd,bhd->mhb", u[place], c), remote[:, None])
    log_target = jnp.log(jnp.where(target > 0, target, 1))
    each = jnp.where(target > 0, target * (log_target - log_share), 0)
    counts = (queries >= 0) & (jnp.sum(remote, axis=1) > 1)
    return jnp.mean(jnp.sum(each, axis=2), axis=1), counts


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _log_softmax(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Over those of the last axis that are seen; very low elsewhere."""
    return jax.nn.log_softmax(jnp.where(seen, x, -1e30), axis=-1)
