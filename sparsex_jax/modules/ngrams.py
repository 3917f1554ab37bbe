"""What went before a token as something to match: signs that are hashes of its n-grams.

A text is copied token by token; where several places have gone on alike for a while, the right one
is where more of what went before is the same. Hashes of n-grams as features are those of N-Grammer
(Roy et al., 2022, arXiv:2207.06366) and BLT (Pagnoni et al., 2024, arXiv:2412.09871), which look up
learned embeddings by them; these are longer, and only have to be told apart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NO_TOKEN = -1  # before a text begins
_BASE = 0x9E3779B1  # of the polynomial that a hash is, modulo 2^32; odd
_WORD = 32  # signs of a hash word


class Hashes(NamedTuple):
    """Of n-grams, one of each size, uint32 [B, T, sizes].

    Attributes:
      before: those that end before each token: what a key knows of its value's token.
      ending: those that end with it: what a query knows of the token that follows.
    """

    before: jax.Array
    ending: jax.Array


def hash_ngrams(
    tokens: jax.Array,
    sizes: tuple[int, ...],
    history: jax.Array | None = None,
    age: jax.Array | None = None,
) -> Hashes:
    """Hashes of the n-grams before each token.

    Args:
      tokens: int32 [B, T].
      sizes: tokens of the n-grams; they are shorter where a text begins.
      history: the max(sizes) tokens before, int32, or `NO_TOKEN`; None is the latter.
      age: int [B, T], tokens before each in its document, beyond which nothing counts; None for
        one document.
    """
    first = 0
    if history is not None:
        first = history.shape[1]
        tokens = jnp.concatenate((history, tokens), axis=1)
        if age is not None:
            age = jnp.concatenate((age[:, :1] - jnp.arange(first, 0, -1), age), axis=1)

    def lagged(x: jax.Array, lag: int) -> jax.Array:
        shifted = jnp.pad(x, ((0, 0), (lag, 0)))[:, : tokens.shape[1]]
        return shifted if age is None else jnp.where(age >= lag, shifted, 0)

    # Sums over 1, 2, 4, ... tokens, of which those over any number are made.
    sums = {1: (tokens - NO_TOKEN).astype(jnp.uint32)}
    while 2 * max(sums) <= max(sizes):
        count = max(sums)
        sums[2 * count] = sums[count] + lagged(sums[count], count) * _power(count)
    before, ending = [], []
    for size in sizes:
        total, count = jnp.zeros_like(sums[1]), 0
        for part in sums:
            if size & part:
                total += lagged(sums[part], count) * _power(count)
                count += part
        before.append(lagged(total, 1)[:, first:])
        ending.append(total[:, first:])
    return Hashes(jnp.stack(before, axis=2), jnp.stack(ending, axis=2))


@jax.checkpoint  # the signs are no smaller than x, and there are as many of them as sizes
def add_signs(x: jax.Array, hashes: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds weighted signs to vectors.

    Of n-grams that are the same the signs are, too; those of two others are nearly orthogonal.

    Args:
      x: [B, T, H, D].
      hashes: uint32 [B, T, sizes].
      weights: f32 [sizes, H].

    Returns:
      [B, T, H, D].
    """
    dim = x.shape[3]
    words = jnp.arange(-(-dim // _WORD), dtype=jnp.uint32) * jnp.uint32(_BASE)
    places = jnp.arange(_WORD, dtype=jnp.uint32)
    total = x.astype(jnp.float32)
    for number, weight in enumerate(weights):
        drawn = _mixed(hashes[:, :, number, None] + words)[..., None] >> places
        bits = (drawn & 1).reshape(*x.shape[:2], 1, len(words) * _WORD)[..., :dim]
        total += jnp.where(bits == 1, weight[:, None], -weight[:, None])
    return total.astype(x.dtype)


def _power(exponent: int) -> jax.Array:
    return jnp.uint32(pow(_BASE, exponent, 2**32))


def _mixed(x: jax.Array) -> jax.Array:
    """Changes about half of the bits where one changes (the end of MurmurHash3; Appleby, 2011)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
