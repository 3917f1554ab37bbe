"""Negative log-likelihood of tokens, with few passes over their logits."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def cross_entropy(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihoods under the softmax of products with the rows of a table.

    The backward pass computes the logits once more, and what moves them in one pass over them, in
    the type of `hidden`: neither their maxima and sums again nor a scatter for the targets.

    Args:
      hidden: [T, C].
      table: [V, C].
      targets: int32 [T], rows of the table.

    Returns:
      f32 [T], in nats.
    """
    return _forward(hidden, table, targets)[0]


def _forward(hidden, table, targets):
    logits = _logits(hidden, table)
    lse = jax.nn.logsumexp(logits, axis=1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return lse - chosen, (hidden, table, targets, lse)


def _backward(residuals, gradient):
    hidden, table, targets, lse = residuals
    logits = _logits(hidden, table)
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    moved = jnp.exp(logits - lse[:, None]) - (number == targets[:, None])
    moved = (moved * gradient[:, None]).astype(hidden.dtype)
    to_hidden = jnp.einsum("tv,vc->tc", moved, table, preferred_element_type=jnp.float32)
    to_table = jnp.einsum("tv,tc->vc", moved, hidden, preferred_element_type=jnp.float32)
    return to_hidden.astype(hidden.dtype), to_table.astype(table.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("tc,vc->tv", hidden, table, preferred_element_type=jnp.float32)
