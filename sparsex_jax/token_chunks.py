"""A long sequence taken a chunk of tokens at a time, so that temporaries are those of a chunk."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mesh_axes import vary_over, varying, zeros_like


def even_size(tokens: int, chunks: int, unit: int) -> int:
    """Tokens of a chunk, a multiple of `unit`, where so many chunks are to hold `tokens`."""
    return -(-tokens // (chunks * unit)) * unit


def map_chunks(
    f: Callable, per_token: Any, shared: Any, *, size: int, saved: tuple[str, ...]
) -> jax.Array:
    """Maps f over chunks of tokens, one after the other.

    The backward pass computes each chunk anew, except for what is named in `saved`. Gradients of
    `shared` are summed over the chunks in f32.

    Args:
      f: of the position of a chunk's first token, the chunk of `per_token`, and `shared`; returns
        [B, size, ...]. Where `size` does not divide T, the last chunk repeats the last token.
      per_token: a pytree of arrays [B, T, ...].
      shared: a pytree of floating arrays that every chunk may use.
      size: tokens of a chunk; T or more calls f once, with everything.
      saved: names given by `jax.ad_checkpoint.checkpoint_name` in f.

    Returns:
      [B, T, ...].
    """
    tokens = jax.tree.leaves(per_token)[0].shape[1]
    if tokens <= size:
        return f(0, per_token, shared)
    chunks = -(-tokens // size)
    totals = jax.tree.map(_total, shared)
    policy = jax.checkpoint_policies.save_only_these_names(*saved)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def of_chunk(first, chunk, totals):
        return f(first, chunk, jax.tree.map(_summed_in, shared, totals))

    def add_chunk(out, x):
        return _write(out, of_chunk(*x, totals), x[0]), None

    operands = _split(per_token, chunks, size)
    like = jax.eval_shape(of_chunk, *jax.tree.map(lambda x: x[0], operands), totals)
    empty = lax.empty((like.shape[0], chunks * size, *like.shape[2:]), like.dtype)
    out, _ = lax.scan(add_chunk, vary_over(varying(like), empty), operands)
    return out[:, :tokens]


def update_by_chunks(f: Callable, per_token: Any, out: jax.Array, *, size: int) -> jax.Array:
    """Has f write chunks of tokens in place, one after the other. Not differentiable.

    Args:
      f: of the position of a chunk's first token, the chunk of `per_token`, and `out`, of which it
        returns what it has made of it.
      per_token: a pytree of arrays [B, T, ...].
      out: [B, T, ...].
      size: tokens of a chunk; T or more calls f once, with everything. Where it does not divide T,
        the last chunk ends with the sequence, and begins with tokens of the one before.

    Returns:
      `out` after the last chunk.
    """
    tokens = out.shape[1]
    if tokens <= size:
        return f(0, per_token, out)

    def update(i, out):
        def cut(x):
            # XLA has the last chunk end with x; of a multiple of i it can do without copies.
            begin, shape = (0, i * size, *[0] * (x.ndim - 2)), (len(x), size, *x.shape[2:])
            return lax.dynamic_slice(x, begin, shape, allow_negative_indices=False)

        return f(jnp.minimum(i * size, tokens - size), jax.tree.map(cut, per_token), out)

    return lax.fori_loop(0, -(-tokens // size), update, out)


def _split(per_token, chunks: int, size: int):
    """The first token of each chunk, and arrays [B, T, ...] as [chunks, B, size, ...]."""

    def split(x):
        missing = chunks * size - x.shape[1]
        if missing:
            widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
            x = jnp.pad(x, widths, mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    return jnp.arange(chunks, dtype=jnp.int32) * size, jax.tree.map(split, per_token)


# A scan would begin with zeros for the results that it stacks; these are written once. Each place
# is written once, so the gradient of what is written to needs no zeros, either.


@jax.custom_vjp
def _write(whole, chunk, first):
    """whole [B, T, ...], which nobody has written to at tokens `first` and on, with the chunk."""
    return lax.dynamic_update_slice_in_dim(whole, chunk, first, axis=1)


def _write_fwd(whole, chunk, first):
    return _write(whole, chunk, first), (first, jnp.empty((chunk.shape[1], 0)))


def _write_bwd(residuals, bar):
    first, size = residuals
    return bar, lax.dynamic_slice_in_dim(bar, first, len(size), axis=1), None


_write.defvjp(_write_fwd, _write_bwd)


# A scan sums the gradients of an array that all its steps use in that array's type. So its steps
# get the array without gradient, and beside it zeros in f32 that nobody reads, whose gradient is
# the array's.


@jax.custom_vjp
def _total(x):
    """Zeros in f32 (f64 for f64), whose gradient becomes that of x."""
    return zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))


def _total_fwd(x):
    return _total(x), jnp.empty(0, x.dtype)


def _total_bwd(like, bar):
    return (bar.astype(like.dtype),)


_total.defvjp(_total_fwd, _total_bwd)


@jax.custom_vjp
def _summed_in(x, total):
    """x, whose gradient becomes that of `total`."""
    return x


def _summed_in_fwd(x, total):
    return x, jnp.empty(0, total.dtype)


def _summed_in_bwd(like, bar):
    return None, bar.astype(like.dtype)


_summed_in.defvjp(_summed_in_fwd, _summed_in_bwd)
