"""Selection of the best blocks, written plainly: the whole [T, Nb] score array, stable sort."""

import jax
import jax.numpy as jnp


def select_blocks(u, c, limit, start, count):
    """See `pallas_kernels.block_selection.select_blocks`; `limit` and `start` are int32 [B, T]."""
    dtype = jnp.promote_types(jnp.float32, u.dtype)
    num_blocks = c.shape[1]
    block = jnp.arange(num_blocks)
    allowed = (start[..., None] <= block) & (block < limit[..., None])
    # Blocks that nobody may select may hold NaN, which a product with 0 would keep.
    c = jnp.where(jnp.any(allowed, axis=1)[:, :, None, None], c, 0)
    scores = jnp.einsum("bthd,bnhd->bthn", u.astype(dtype), c.astype(dtype), precision="highest")
    scores = jnp.where(allowed[:, :, None, :], scores, -jnp.inf)
    shortfall = max(0, count - num_blocks)
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, shortfall)], constant_values=-jnp.inf)
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)[..., :count]
    score = jnp.take_along_axis(scores, order, axis=-1)
    return jnp.where(score > -jnp.inf, order, -1).astype(jnp.int32), score
