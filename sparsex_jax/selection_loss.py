"""A loss that teaches block scores where attention would look.

A block that is not selected gives its score no gradient: what has once fallen behind stays there.
So a sample of queries is matched with the keys of its whole remote past, and the scores learn which
blocks hold the keys that match best, selected or not: from the Kullback-Leibler divergence of the
distribution that they give from the one that q.k gives, as in the warm-up of DeepSeek-V3.2's
lightning indexer (2025). A block counts by its best key. q and k themselves do not learn from it.
Where blocks are searched in two levels the scores of nodes learn likewise, from what their blocks
have together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsex_jax.config import AttentionConfig
from sparsex_jax.scoring import BlockIndex
from sparsex_jax.spans import remote_end

SAMPLE = 512  # queries of a sequence
_LOGITS = 1 << 27  # held at a time: of as many queries as fit, with all heads and keys,
_LEAST_QUERIES = 32  # or of so many
_SHARPNESS = 2.0  # of the distribution to learn
_TARGET = "selection_target"
# Kept for the backward pass: a number for each query and block, in which 2 G D S operations went.
_KEEP = jax.checkpoint_policies.save_only_these_names(_TARGET)


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
    blocks: BlockIndex,
    queries: jax.Array,
    document_start: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """The mean divergence over a sequence's queries and KV heads, in nats; with nodes both's sum.

    Queries that see fewer than two blocks do not count, nor nodes where fewer than two lie whole in
    what a query sees.

    Args:
      q: [B, M, Hq, D], without RoPE, of the last M tokens.
      k: [B, T, Hkv, D], likewise, of all.
      query_features: u, [B, M, Hkv, d_s].
      blocks: of the sequence.
      queries: int32 [B, Q], numbers from 0 to M - 1.
      document_start: of each token's document, int32 [B, T], or None.
      config: of the attention.

    Returns:
      f32 [B], of Q x T products each.
    """
    batch, count = queries.shape
    size = min(count, max(_LEAST_QUERIES, _LOGITS // (batch * q.shape[2] * k.shape[1])))
    chunks = -(-count // size)
    queries = jnp.pad(queries, ((0, 0), (0, chunks * size - count)), constant_values=-1)

    q, k = jax.lax.stop_gradient((q, k))
    starts = None if document_start is None else 0
    in_axes = 0, 0, 0, 0, 0, starts

    @functools.partial(jax.checkpoint, policy=_KEEP)
    def of_chunk(chunk):
        divergence = jax.vmap(functools.partial(_divergence, config=config), in_axes)
        each, counts = divergence(q, k, query_features, blocks, chunk, document_start)
        return jnp.sum(jnp.where(counts, each, 0), axis=1), jnp.sum(counts, axis=1)

    sums = jax.lax.map(of_chunk, queries.reshape(batch, chunks, size).swapaxes(0, 1))
    total, number = (jnp.sum(x, axis=0) for x in sums)
    return total / jnp.maximum(number, 1)


def _divergence(q, k, u, index: BlockIndex, queries, document_start, config: AttentionConfig):
    """Of some queries of one sequence, f32 [Q], and whether they count, bool [Q]."""
    size = config.block_size
    blocks, heads, _ = index.features.shape
    place = jnp.maximum(queries, 0)
    position = place + len(k) - len(q)
    start = jnp.zeros_like(place) if document_start is None else document_start[position]
    end = remote_end(position, start, config) // size
    first = -(-start // size)
    remote = _between(blocks, first, end)
    rows = q[place].reshape(len(place), heads, -1, q.shape[2])
    logits = _product("mhgd,nhd->mhgn", rows, k[: blocks * size]) * q.shape[2] ** -0.5
    best = logits.reshape(*logits.shape[:3], blocks, size).max(axis=4)
    target = jnp.mean(jnp.exp(_log_softmax(_SHARPNESS * best, remote[:, None, None])), axis=2)
    target = checkpoint_name(target, _TARGET)
    each = _from_target(target, _product("mhd,bhd->mhb", u[place], index.features), remote)
    if index.nodes is not None:
        nodes, node = len(index.nodes), config.search_node_size
        whole = _between(nodes, -(-first // node), end // node)
        target = target[..., : nodes * node].reshape(*target.shape[:2], nodes, node).sum(axis=3)
        each += _from_target(target, _product("mhd,nhd->mhn", u[place], index.nodes), whole)
    return each, (queries >= 0) & (jnp.sum(remote, axis=1) > 1)


def _between(count: int, first: jax.Array, end: jax.Array) -> jax.Array:
    """Which of `count` blocks or nodes lie from `first` [Q] to `end` [Q]: bool [Q, count]."""
    number = jnp.arange(count)
    return (number >= first[:, None]) & (number < end[:, None])


def _from_target(target: jax.Array, scores: jax.Array, seen: jax.Array) -> jax.Array:
    """The divergence of softmax(scores) from a target, both [Q, Hkv, N], over what is seen [Q, N].

    The mean over heads; where a target has only a part of its mass in what is seen, as much of the
    divergence, and 0 where fewer than two are seen.
    """
    target = jnp.where(seen[:, None], target, 0)
    mass = jnp.sum(target, axis=2, keepdims=True)
    log_target = jnp.log(jnp.where(target > 0, target / jnp.where(mass > 0, mass, 1), 1))
    each = jnp.where(target > 0, target * (log_target - _log_softmax(scores, seen[:, None])), 0)
    return jnp.where(jnp.sum(seen, axis=1) > 1, jnp.mean(jnp.sum(each, axis=2), axis=1), 0)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _log_softmax(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Over those of the last axis that are seen; very low elsewhere."""
    return jax.nn.log_softmax(jnp.where(seen, x, -1e30), axis=-1)
