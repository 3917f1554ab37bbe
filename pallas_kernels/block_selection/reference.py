"""Selection of the best blocks, written plainly: the whole [T, Nb] score array, stable sort."""

import jax
import jax.numpy as jnp


def select_blocks(u, c, limit, start, count):
    """See `pallas_kernels.block_selection.select_blocks`; `limit` and `start` are int32 [B, T]."""
    block = jnp.arange(c.shape[1])
    allowed = (start[..., None] <= block) & (block < limit[..., None])
    return _best(u, c, allowed[:, :, None], count)


def select_blocks_in_nodes(u, c, nodes, limit, start, count, node_size, beam):
    """See `pallas_kernels.block_selection.select_blocks_in_nodes`.

    `limit` and `start` are int32 [B, T].
    """
    block = jnp.arange(c.shape[1])
    limit, start = jnp.minimum(limit, len(block)), jnp.maximum(start, 0)
    best, _ = select_blocks(u, nodes, limit // node_size, -(-start // node_size), beam)
    node = block // node_size
    expanded = jnp.any(best[..., None] == node, axis=3)
    for bound in (start, limit):
        cut = (bound % node_size > 0)[..., None] & (bound[..., None] // node_size == node)
        expanded |= cut[:, :, None]
    allowed = (start[..., None] <= block) & (block < limit[..., None])
    return _best(u, c, expanded & allowed[:, :, None], count)


def _best(u, c, allowed, count):
    """The best of the blocks that are allowed: bool [B, T, Hkv or 1, Nb]."""
    dtype = jnp.promote_types(jnp.float32, u.dtype)
    num_blocks = c.shape[1]
    # Blocks that nobody may select may hold NaN, which a product with 0 would keep.
    c = jnp.where(jnp.any(allowed, axis=1).swapaxes(1, 2)[..., None], c, 0)
    scores = jnp.einsum("bthd,bnhd->bthn", u.astype(dtype), c.astype(dtype), precision="highest")
    scores = jnp.where(allowed, scores, -jnp.inf)
    shortfall = max(0, count - num_blocks)
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, shortfall)], constant_values=-jnp.inf)
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)[..., :count]
    score = jnp.take_along_axis(scores, order, axis=-1)
    return jnp.where(score > -jnp.inf, order, -1).astype(jnp.int32), score
