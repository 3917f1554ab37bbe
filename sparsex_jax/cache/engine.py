"""Chunked prefill and greedy decoding over a cache of fixed capacity."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsex_jax.cache.layer import LayerCache, empty_layer, extend_layer
from sparsex_jax.modules.transformer import Transformer

SUFFIX_UNIT = 64  # suffixes are padded to a multiple, so that few shapes are compiled


class Cache(NamedTuple):
    """The past of a batch of sequences of equal length.

    Attributes:
      length: tokens so far, int32 scalar.
      layers: one cache a layer.
    """

    length: jax.Array
    layers: tuple[LayerCache, ...]


def empty_cache(model: Transformer, capacity: int, batch_size: int, chunk: int) -> Cache:
    """A cache for up to `capacity` tokens a sequence, filled in chunks of up to `chunk`."""
    layers = tuple(
        empty_layer(
            model.config, sparse=block.attention.sparse, batch_size=batch_size,
            capacity=capacity, chunk=chunk,
        )
        for block in model.blocks
    )  # fmt: skip
    return Cache(jnp.int32(0), layers)


def extend(
    model: Transformer, cache: Cache, tokens: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads new tokens.

    In the last layer only the last valid token attends, for nobody reads the others' output.

    Args:
      model: whose cache it is.
      cache: of the tokens before.
      tokens: int32 [B, C].
      valid: how many of the C count, int32 scalar, at least 1.

    Returns:
      (logits after the last valid token, f32 [B, vocab]; the new cache).
    """
    x, layers = model.embed(tokens), []
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        last = len(layers) == len(cache.layers) - 1
        x, layer = extend_layer(block, layer, x, cache.length, valid, last_only=last)
        layers.append(layer)
    logits = model.logits(model.final_norm(x[:, 0]))
    return logits, Cache(cache.length + valid, tuple(layers))


class Engine:
    """Prefills once, answers many times.

    Args:
      model: a Transformer.
      capacity: most tokens of a sequence, answers included.
      batch_size: sequences read at the same time, of equal length.
      chunk: tokens read in one step of a prefill.

    Raises:
      ValueError: a size is not positive, or the model has landmarks="all", which has no cache.
    """

    def __init__(self, model: Transformer, capacity: int, batch_size: int = 1, chunk: int = 2048):
        for name, value in (("capacity", capacity), ("batch_size", batch_size), ("chunk", chunk)):
            _check_positive(name, value)
        if model.config.attention.landmarks == "all":
            raise ValueError(
                "landmarks='all' is for ablation and has no cache: use 'pyramid' or 'off'"
            )
        self.capacity, self.batch_size, self.chunk = capacity, batch_size, min(chunk, capacity)
        self.vocab_size = model.config.vocab_size
        self._graph, self._state = nnx.split(model)

        def read(state, cache, tokens, valid):
            return extend(nnx.merge(self._graph, state), cache, tokens, valid)[1]

        self._read = jax.jit(read, donate_argnums=1)
        self._answer = jax.jit(functools.partial(_answer, self._graph), static_argnums=4)
        self._empty = jax.jit(
            lambda: empty_cache(model, capacity, batch_size, self.chunk + SUFFIX_UNIT)
        )

    def prefill(self, tokens: np.ndarray, progress: Callable[[int], None] | None = None) -> Cache:
        """Reads a context.

        Args:
          tokens: int [B, P].
          progress: called with the number of tokens read so far.

        Returns:
          A cache, which `answer` does not change.

        Raises:
          ValueError: tokens are no integers within the vocabulary, not [batch_size, P], or more
            than the capacity.
        """
        tokens = self._checked(tokens, 0)
        cache = self._empty()
        for begin in range(0, tokens.shape[1], self.chunk):
            part = tokens[:, begin : begin + self.chunk]
            valid = part.shape[1]
            part = np.pad(part, ((0, 0), (0, self.chunk - valid)))
            cache = self._read(self._state, cache, part, jnp.int32(valid))
            if progress is not None:
                jax.block_until_ready(cache.length)
                progress(begin + valid)
        return cache

    def answer(
        self,
        cache: Cache,
        suffix: np.ndarray,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
    ) -> np.ndarray:
        """Reads a suffix and continues it greedily.

        Args:
          cache: of `prefill`; it can be used again.
          suffix: int [B, Q], Q >= 1.
          max_new_tokens: most tokens generated.
          stop_tokens: a sequence ends with the first of these, which is kept.

        Returns:
          int32 [B, max_new_tokens], -1 after the end of a sequence.

        Raises:
          ValueError: the suffix is empty, not [batch_size, Q] or no integers within the vocabulary,
            max_new_tokens is not positive, or the capacity is too small.
        """
        _check_positive("max_new_tokens", max_new_tokens)
        suffix = self._checked(suffix, int(cache.length) + max_new_tokens)
        valid = suffix.shape[1]
        if not 1 <= valid <= self.chunk:
            raise ValueError(
                f"suffix has {valid} tokens but must have 1 to chunk={self.chunk}:"
                " prefill what comes before"
            )
        padded = np.pad(suffix, ((0, 0), (0, -valid % SUFFIX_UNIT)))
        stops = np.asarray(stop_tokens, np.int32)
        out = self._answer(self._state, cache, (padded, jnp.int32(valid)), stops, max_new_tokens)
        return np.asarray(out)

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """`prefill` of all but the end of the prompt, then `answer`; arguments as there."""
        _check_positive("max_new_tokens", max_new_tokens)
        prompt = self._checked(prompt, max_new_tokens)
        split = max(prompt.shape[1] - 1, 0) // self.chunk * self.chunk
        cache = self.prefill(prompt[:, :split], progress)
        return self.answer(cache, prompt[:, split:], max_new_tokens, stop_tokens)

    def _checked(self, tokens: np.ndarray, used: int) -> np.ndarray:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size:
            raise ValueError(
                f"tokens have shape {tokens.shape} but must be"
                f" [batch_size={self.batch_size}, tokens]"
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens have dtype {tokens.dtype}: use an integer type")
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"tokens hold {wrong[0]} but must lie within the vocabulary: use 0 to"
                f" {self.vocab_size - 1}"
            )
        if tokens.shape[1] + used > self.capacity:
            raise ValueError(
                f"{tokens.shape[1] + used} tokens are more than capacity={self.capacity}:"
                " use a larger capacity"
            )
        return tokens.astype(np.int32)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be positive: use at least 1")


def _answer(graph, state, cache, suffix, stop_tokens, max_new_tokens: int) -> jax.Array:
    model = nnx.merge(graph, state)
    logits, cache = extend(model, cache, *suffix)
    batch = logits.shape[0]

    def choose(step, logits, out, ended):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        out = out.at[:, step].set(jnp.where(ended, -1, token))
        return token, out, ended | (token[:, None] == stop_tokens).any(axis=1)

    def running(carry):
        step, _, _, ended, _ = carry
        return (step < max_new_tokens) & ~ended.all()

    def generate(carry):
        step, token, out, ended, cache = carry
        logits, cache = extend(model, cache, token[:, None], jnp.int32(1))
        return step + 1, *choose(step, logits, out, ended), cache

    out = jnp.full((batch, max_new_tokens), -1, jnp.int32)
    chosen = choose(0, logits, out, jnp.zeros(batch, bool))
    _, _, out, _, _ = jax.lax.while_loop(running, generate, (jnp.int32(1), *chosen, cache))
    return out
