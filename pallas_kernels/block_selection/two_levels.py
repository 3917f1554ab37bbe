"""Selection in two levels, as all implementations but the plain one share it.

Which nodes a query expands, in which order, and what is differentiated: each implementation brings
its own search for nodes, and its own for the blocks in them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.block_selection.gradients import select_bwd


class Levels(NamedTuple):
    """How both levels are searched, by one implementation.

    Attributes:
      nodes: the best nodes, from (u, nodes, limit, start, beam) to (index, score); as
        `select_blocks` of an implementation.
      blocks: the best blocks of expanded nodes, likewise, from (u, c, expanded, limit, start,
        count, node_size); `expanded` is what `expand` returns.
    """

    nodes: Callable
    blocks: Callable


def expand(chosen, limit, start, node_size: int):
    """The nodes that a query expands, in ascending order, then -1: int32 [B, T, Hkv, beam + 2].

    Args:
      chosen: int32 [B, T, Hkv, beam], nodes that lie whole in [start, limit), in any order; or -1.
      limit: int32 [B, T]; the node that it cuts is expanded, too.
      start: likewise.
      node_size: blocks of a node.
    """
    some = start < limit
    first, last = start // node_size, limit // node_size
    first = jnp.where(some & (start % node_size > 0), first, -1)
    last = jnp.where(some & (limit % node_size > 0), last, -1)
    cut = jnp.stack([first, last], axis=-1)[:, :, None]
    node = jnp.concatenate([chosen, jnp.broadcast_to(cut, (*chosen.shape[:3], 2))], axis=-1)
    # Ranks by comparing all pairs: a sort of many short rows is slow on accelerators. A node that
    # both bounds cut is the only one; it has one rank, and one place.
    found, other, place = node >= 0, node[..., None, :], jnp.arange(node.shape[3])
    rank = jnp.sum(found[..., None, :] & (other < node[..., None]), axis=-1)
    here = found[..., None, :] & (rank[..., None, :] == place[:, None])
    return jnp.max(jnp.where(here, other, -1), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _select(u, c, nodes, limit, start, count, node_size, beam, levels):
    chosen, _ = levels.nodes(u, nodes, limit // node_size, -(-start // node_size), beam)
    expanded = expand(chosen, limit, start, node_size)
    return levels.blocks(u, c, expanded, limit, start, count, node_size)


def _select_fwd(u, c, nodes, limit, start, *static):
    results = _select(u, c, nodes, limit, start, *static)
    index, score = checkpoint_name(results, "block_selection")
    return (index, score), (u, c, index)


def _select_bwd(count, _node_size, _beam, _levels, residuals, cotangents):
    u_bar, c_bar, *_ = select_bwd(count, residuals, cotangents)
    return u_bar, c_bar, None, None, None


_select.defvjp(_select_fwd, _select_bwd)


def select(levels: Levels, u, c, nodes, limit, start, count: int, node_size: int, beam: int):
    """See `pallas_kernels.block_selection.select_blocks_in_nodes`.

    `limit` and `start` are int32 [B, T].
    """
    if 0 in (*u.shape, c.shape[1], count):
        shape = (*u.shape[:3], count)
        dtype = jnp.promote_types(jnp.float32, u.dtype)
        return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, dtype)
    limit, start = jnp.minimum(limit, c.shape[1]), jnp.maximum(start, 0)
    return _select(u, c, nodes, limit, start, count, node_size, beam, levels)
