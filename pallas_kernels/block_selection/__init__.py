"""The best blocks of each query token: among all, or in the best nodes of them."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_selection import reference, xla
from pallas_kernels.checks import check_floating, check_shape, per_token
from pallas_kernels.mesh_axes import vary_alike

_LARGEST_NODE = 64  # blocks
_NODE_MULTIPLE = 8


def _not_for_kernels(u, c, limit, start, count, nodes=None, node_size=0, beam=0) -> str | None:
    if u.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {u.dtype}"
    if u.shape[3] not in (64, 128):
        return f"takes features of width 64 and 128, not {u.shape[3]}"
    if count > 64:
        return f"selects up to 64 blocks, not {count}"
    if beam > 64:
        return f"expands up to 64 nodes, not {beam}"
    searched, name = (c, "blocks") if nodes is None else (nodes, "nodes")
    if searched.shape[1] > 2**24:
        return f"counts {name} in float32, up to 2^24, not {searched.shape[1]}"
    return None


def _not_for_hopper(u, c, limit, start, count, *in_nodes) -> str | None:
    problem = _not_for_kernels(u, c, limit, start, count, *in_nodes)
    if problem or not in_nodes:
        return problem
    _, node_size, beam = in_nodes
    unfit = dispatch.deferred(f"{__name__}.mosaic_gpu", "unfit_in_nodes")
    return unfit(u, count, node_size, beam)


dispatch.register(
    "block_selection",
    dispatch.for_hopper(__name__, "select_blocks", _not_for_hopper),
    dispatch.for_tpu(__name__, "select_blocks", _not_for_kernels),
    dispatch.Implementation("xla", xla.select_blocks),
    dispatch.Implementation("reference", reference.select_blocks),
)

# Each implementation has both primitives, so one choice serves both.
_IN_NODES: dict[str, Callable] = {
    "mosaic_gpu": dispatch.deferred(f"{__name__}.mosaic_gpu", "select_blocks_in_nodes"),
    "mosaic_tpu": dispatch.deferred(f"{__name__}.mosaic_tpu", "select_blocks_in_nodes"),
    "xla": xla.select_blocks_in_nodes,
    "reference": reference.select_blocks_in_nodes,
}


def _check(u, c, limit, count, start):
    """The operands that both primitives take: u, c, limit, start and count."""
    u, c = map(jnp.asarray, (u, c))
    check_shape("u", u, "B T Hkv d")
    batch, tokens, heads, dim = u.shape
    check_shape("c", c, "B Nb Hkv d", B=batch, Hkv=heads, d=dim)
    check_floating(u=u, c=c)
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count={count} must not be negative: use 0 for none")
    limit = per_token("limit", limit, batch, tokens)
    if start is None:
        start = jnp.zeros((batch, tokens), jnp.int32)
    else:
        start = per_token("start", start, batch, tokens)
    return u, c, limit, start, count


def select_blocks(
    u, c, limit, count: int, *, start=None, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The `count` best blocks b with start_t <= b < limit_t, by the score <u_t, c_b>.

    The best comes first; of equal scores, the lower index. Where fewer blocks are allowed, the
    rest has index -1 and score -inf. `score` is differentiable in u and c, `index` is not.
    Nothing is read from the blocks that a query may not select, so they may hold anything.

    Args:
      u: query features [B, T, Hkv, d].
      c: block features [B, Nb, Hkv, d], of the same dtype; Nb may be less than `count`, or 0.
      limit: integer [T] or [B, T].
      count: K, at least 0.
      start: as `limit`; None for 0.
      implementation: a name that `pallas_kernels.dispatch` knows; None for the best.

    Returns:
      index int32 [B, T, Hkv, K] and score [B, T, Hkv, K], f32 (f64 for f64 features).

    Raises:
      ValueError: if shapes do not fit together, count < 0, or `implementation` cannot run.
      TypeError: if a dtype is wrong.
    """
    *arrays, count = _check(u, c, limit, count, start)
    operands = *vary_alike(*arrays), count
    return dispatch.select("block_selection", implementation, *operands)(*operands)


def select_blocks_in_nodes(
    u,
    c,
    nodes,
    limit,
    count: int,
    *,
    node_size: int,
    beam: int,
    start=None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `select_blocks`, but only of blocks in the best nodes of each query: a beam search.

    Node n stands for the `node_size` blocks from n * node_size on. Of the nodes that lie whole in
    [start_t, limit_t), a query expands the `beam` best, by the score <u_t, nodes_n>; of equal
    scores, the lower index. It also expands those that start_t or limit_t cut, two at most. Of the
    blocks of expanded nodes the best are found exactly. So with a beam of all nodes the result is
    that of `select_blocks`; a smaller one may miss blocks, but scores fewer: a query's work grows
    with Nb / node_size + (beam + 2) * node_size instead of Nb.

    `nodes` decides only which blocks are scored, so its gradient is zero; `score` is
    differentiable in u and c. Nothing is read from nodes that do not lie whole in [start_t,
    limit_t), nor from blocks outside: they may hold anything.

    The search is that of an index with one inverted list a node (IVF: Jegou et al., "Product
    quantization for nearest neighbor search", 2011), of which a query probes the best; the lists
    here are neighbouring blocks.

    Args:
      u: query features [B, T, Hkv, d].
      c: block features [B, Nb, Hkv, d], of the same dtype; Nb may be less than `count`, or 0.
      nodes: node features [B, Nb // node_size, Hkv, d], of the same dtype.
      limit: integer [T] or [B, T].
      count: K, at least 0.
      node_size: blocks of a node: 8, 16, 24, ... or 64.
      beam: nodes that are expanded for their scores, at least 1; there may be fewer.
      start: as `limit`; None for 0.
      implementation: a name that `pallas_kernels.dispatch` knows; None for the best.

    Returns:
      index int32 [B, T, Hkv, K] and score [B, T, Hkv, K], f32 (f64 for f64 features).

    Raises:
      ValueError: as `select_blocks`; if node_size is no multiple of 8 up to 64, beam < 1, or
        `nodes` has another number of nodes than there are whole ones.
      TypeError: if a dtype is wrong.
    """
    u, c, limit, start, count = _check(u, c, limit, count, start)
    node_size, beam = map(operator.index, (node_size, beam))
    if node_size % _NODE_MULTIPLE or not 0 < node_size <= _LARGEST_NODE:
        raise ValueError(
            f"node_size={node_size} must be a multiple of {_NODE_MULTIPLE}, up to {_LARGEST_NODE}:"
            " use 8, 16, 32 or 64"
        )
    if beam < 1:
        raise ValueError(f"beam={beam} must be at least 1: use 1 for the best node only")
    nodes = jnp.asarray(nodes)
    check_shape("nodes", nodes, "B Nn Hkv d", B=u.shape[0], Hkv=u.shape[2], d=u.shape[3])
    check_floating(u=u, nodes=nodes)
    whole = c.shape[1] // node_size
    if nodes.shape[1] != whole:
        raise ValueError(
            f"nodes has {nodes.shape[1]} nodes, but the {c.shape[1]} blocks of c make {whole} whole"
            f" ones of node_size={node_size}: leave out the node that is not whole, or give more"
        )
    u, c, nodes, limit, start = vary_alike(u, c, nodes, limit, start)
    beam = min(beam, whole)
    chosen = dispatch.chosen(
        "block_selection", implementation, u, c, limit, start, count, nodes, node_size, beam
    )
    return _IN_NODES[chosen.name](u, c, nodes, limit, start, count, node_size, beam)


__all__ = ["select_blocks", "select_blocks_in_nodes"]
