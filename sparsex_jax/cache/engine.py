"""Chunked prefill and generation over a cache of fixed capacity."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsex_jax.cache.host import HostRemote, HostStore
from sparsex_jax.cache.layer import CHUNK, close_block, empty_layers, open_block
from sparsex_jax.cache.memory import Shape, check_fits
from sparsex_jax.cache.model import (
    Layers,
    extend,
    join_layers,
    kinds_of,
    map_layers,
    read_all,
    split_layers,
    tokens_to_go_on,
)
from sparsex_jax.cache.near import left_in_block
from sparsex_jax.cache.sampling import GREEDY, Sampling
from sparsex_jax.cache.tiers import TIERS, Tier, why_not_in
from sparsex_jax.config import SEEDS, ConfigError
from sparsex_jax.modules.transformer import Transformer

# Suffixes, and the room for what is generated, are padded to a multiple: few programs are compiled.
SUFFIX_UNIT = 64
# Sequences of one length as int [B, T], or one array of tokens each.
Tokens = np.ndarray | Sequence[np.ndarray]


class Cache:
    """The past of a batch of sequences.

    An answer writes its own tokens behind the context, in place, so that nothing is copied: the
    cache stays valid and can be used again, but not by two threads at the same time.

    Attributes:
      lengths: tokens of each sequence so far, int64 [B].
      layers: one cache a layer, in device memory.
      stores: of sparse layers in the tier "host": what is in the host's.
    """

    def __init__(self, lengths: np.ndarray, layers: Layers, stores: Sequence[HostStore] = ()):
        self.lengths, self.layers, self.stores = lengths, layers, tuple(stores)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max(initial=0))

    @property
    def block_hits(self) -> tuple[int, int]:
        """In the tier "host": selected blocks that were on the device, and that were fetched."""
        remotes = [x.remote for x in self.layers if isinstance(x.remote, HostRemote)]
        return sum(int(x.hits) for x in remotes), sum(int(x.misses) for x in remotes)

    def block_until_ready(self) -> "Cache":
        """Waits for the device."""
        jax.block_until_ready(self.layers)
        return self


class Engine:
    """Prefills once, answers many times.

    Args:
      model: a Transformer.
      capacity: most tokens of a sequence, answers included.
      batch_size: sequences read at the same time.
      chunk: tokens of each read in one step of a prefill.
      tier: where keys and values of old blocks are: "device", "host" (one sequence) or
        "compressed" (not exact); see docs/cache.md.

    Raises:
      ValueError: a size is not positive, or the model has no cache in this tier.
      CacheMemoryError: it does not fit into the memory of the device, or the host.
    """

    def __init__(
        self,
        model: Transformer,
        capacity: int,
        batch_size: int = 1,
        chunk: int = 2048,
        tier: Tier = "device",
    ):
        for name, value in (("capacity", capacity), ("batch_size", batch_size), ("chunk", chunk)):
            _check_positive(name, value)
        chunk = min(chunk, capacity)
        _check_tier(model, tier, batch_size, chunk)
        self.capacity, self.batch_size, self.chunk, self.tier = capacity, batch_size, chunk, tier
        self.config, self.vocab_size = model.config, model.config.vocab_size
        self._graph, self._state = nnx.split(model)
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._state))
        reads = chunk + SUFFIX_UNIT
        check_fits(Shape(self.config, capacity, batch_size, reads, weights), tier)

        def read(state, layers, tokens, length, valid, goes_on):
            model = nnx.merge(self._graph, state)
            return extend(model, layers, tokens, length, valid, logits=False, goes_on=goes_on)[1]

        self._read = jax.jit(read, donate_argnums=1, static_argnums=5)
        self._to_go_on = tokens_to_go_on(model.config)

        def losses(state, layers, tokens, targets, length, valid):
            model = nnx.merge(self._graph, state)
            logits, layers = read_all(model, layers, tokens, length, valid)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen, layers

        self._losses = jax.jit(losses, donate_argnums=1)
        self._answer = jax.jit(
            functools.partial(_answer, self._graph),
            donate_argnames="appended", static_argnames=("kinds", "room", "sampling"),
        )  # fmt: skip
        self._empty = jax.jit(lambda: empty_layers(model.config, capacity, batch_size, reads, tier))

    def empty(self) -> Cache:
        """A cache of sequences without tokens."""
        layers, stores = list(self._empty()), []
        for i, layer in enumerate(layers):
            if isinstance(layer.remote, HostRemote):
                _, tokens, heads = layer.remote.salience.shape
                size, dtype = self.config.attention.block_size, layer.remote.mark_k.dtype
                stores.append(HostStore(tokens, heads, self.config.head_dim, dtype, size))
                number = jnp.int32(stores[-1].number)
                layers[i] = layer._replace(remote=layer.remote._replace(number=number))
        return Cache(np.zeros(self.batch_size, np.int64), tuple(layers), stores)

    def prefill(
        self,
        tokens: Tokens,
        progress: Callable[[int], None] | None = None,
        cache: Cache | None = None,
    ) -> Cache:
        """Reads a context.

        Args:
          tokens: int [B, P], or B arrays of any lengths.
          progress: called with the number of tokens of a sequence read so far.
          cache: what was read before, which is used up; None for nothing.

        Returns:
          A cache, which `answer` does not change.

        Raises:
          ValueError: tokens are no integers within the vocabulary, not of batch_size sequences, or
            more than the capacity.
        """
        rows = self._checked(tokens, 0 if cache is None else cache.lengths)
        cache = cache or self.empty()
        for begin in range(0, max(map(len, rows)), self.chunk):
            parts = [row[begin : begin + self.chunk] for row in rows]
            padded, valid = _padded(parts, self.chunk)
            following = min(min(map(len, rows)) - begin - self.chunk, self.chunk)
            cache.layers = self._read(
                self._state, cache.layers, padded, _as_int32(cache.lengths), _as_int32(valid),
                0 < self._to_go_on <= following,
            )  # fmt: skip
            cache.lengths = cache.lengths + valid
            if progress is not None:
                cache.block_until_ready()
                progress(begin + int(valid.max()))
        return cache

    def answer(
        self,
        cache: Cache,
        suffix: Tokens,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | int = 0,
    ) -> np.ndarray:
        """Reads a suffix and continues it.

        Args:
          cache: of `prefill`; it can be used again.
          suffix: int [B, Q], Q >= 1, or B arrays.
          max_new_tokens: most tokens generated.
          stop_tokens: a sequence ends with the first of these, which is kept.
          sampling: how tokens are chosen.
          seeds: one for each sequence, or one for all, from 0 to 2^32 - 1; a sequence's text
            depends on its own only.

        Returns:
          int32 [B, max_new_tokens], -1 after the end of a sequence.

        Raises:
          ValueError: a suffix is empty, not of batch_size sequences or no integers within the
            vocabulary, max_new_tokens is not positive, or the capacity is too small.
        """
        _check_positive("max_new_tokens", max_new_tokens)
        rows = self._checked(suffix, cache.lengths + max_new_tokens)
        for row in rows:
            if not 1 <= len(row) <= self.chunk:
                raise ValueError(
                    f"suffix has {len(row)} tokens but must have 1 to chunk={self.chunk}:"
                    " prefill what comes before"
                )
        padded, valid = _padded(rows, whole_units(max(map(len, rows))))
        kept, appended = split_layers(cache.layers)
        out, appended = self._answer(
            self._state, kept, _as_int32(cache.lengths), padded, _as_int32(valid),
            np.asarray(stop_tokens, np.int32), self._checked_seeds(seeds), np.int32(max_new_tokens),
            appended=appended, kinds=kinds_of(cache.layers), room=whole_units(max_new_tokens),
            sampling=sampling,
        )  # fmt: skip
        cache.layers = join_layers(kinds_of(cache.layers), kept, appended)
        return np.asarray(out)[:, :max_new_tokens]

    def generate(
        self,
        prompt: Tokens,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | int = 0,
    ) -> np.ndarray:
        """`prefill` of all but the end of each prompt, then `answer`; arguments as there."""
        _check_positive("max_new_tokens", max_new_tokens)
        rows = self._checked(prompt, max_new_tokens)
        splits = [max(len(row) - 1, 0) // self.chunk * self.chunk for row in rows]
        before = [row[:split] for row, split in zip(rows, splits, strict=True)]
        cache = self.prefill(before, progress)
        after = [row[split:] for row, split in zip(rows, splits, strict=True)]
        return self.answer(cache, after, max_new_tokens, stop_tokens, sampling, seeds)

    def losses(
        self, tokens: np.ndarray, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Negative log-likelihoods, in nats, of all tokens but the first, given those before.

        Args:
          tokens: int [B, T + 1].
          progress: called with the number of tokens of a sequence read so far.

        Returns:
          f32 [B, T].

        Raises:
          ValueError: as `prefill`, or the sequences differ in length.
        """
        rows = np.asarray(tokens)
        if rows.ndim != 2 or rows.shape[1] < 2:
            raise ValueError(f"tokens have shape {rows.shape}: use [batch_size, 2 or more]")
        rows = np.stack(self._checked(rows, 0))
        cache, found = self.empty(), []
        for begin in range(0, rows.shape[1] - 1, self.chunk):
            part = rows[:, begin : begin + self.chunk + 1]
            padded, valid = _padded(part[:, :-1], self.chunk)
            targets, _ = _padded(part[:, 1:], self.chunk)
            losses, cache.layers = self._losses(
                self._state, cache.layers, padded, targets, np.int32(begin), np.int32(valid[0])
            )
            found.append(np.asarray(losses)[:, : valid[0]])
            if progress is not None:
                progress(begin + int(valid[0]))
        return np.concatenate(found, axis=1)

    def _checked(self, tokens: Tokens, used: np.ndarray | int) -> list[np.ndarray]:
        """The tokens of each sequence, int32; `used` more are needed beside them."""
        rows = [np.asarray(row) for row in tokens]
        if len(rows) != self.batch_size or any(row.ndim != 1 for row in rows):
            raise ValueError(
                f"tokens have shape {[row.shape for row in rows]} but must be of"
                f" batch_size={self.batch_size} sequences: use [batch_size, tokens]"
            )
        for row, more in zip(rows, np.broadcast_to(used, self.batch_size), strict=True):
            if not np.issubdtype(row.dtype, np.integer):
                raise ValueError(f"tokens have dtype {row.dtype}: use an integer type")
            if row.size and not 0 <= row.min() <= row.max() < self.vocab_size:
                wrong = row[(row < 0) | (row >= self.vocab_size)]
                raise ValueError(
                    f"tokens hold {wrong[0]} but must lie within the vocabulary: use 0 to"
                    f" {self.vocab_size - 1}"
                )
            if len(row) + more > self.capacity:
                raise ValueError(
                    f"{len(row) + more} tokens are more than capacity={self.capacity}:"
                    " use a larger capacity"
                )
        return [row.astype(np.int32, copy=False) for row in rows]

    def _checked_seeds(self, seeds: Sequence[int] | int) -> np.ndarray:
        given = np.asarray(seeds)
        if (
            given.shape not in ((), (self.batch_size,))
            or (given < 0).any()
            or (given >= SEEDS).any()
        ):
            raise ConfigError(
                f"seeds={seeds} must be one for each of {self.batch_size} sequences, or one for"
                " all, in [0, 2^32): use 0, say"
            )
        return np.broadcast_to(given, self.batch_size).astype(np.uint32)


def _padded(rows: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up with zeros, int32 [B, size], and their lengths, int64 [B]."""
    padded = np.zeros((len(rows), size), np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded, np.array([len(row) for row in rows], np.int64)


def whole_units(tokens: int) -> int:
    """The next multiple of `SUFFIX_UNIT`."""
    return tokens + -tokens % SUFFIX_UNIT


def _as_int32(x: np.ndarray) -> np.ndarray:
    """Numbers of sequences as int32: a scalar if all agree, which takes no vmap of the model."""
    x = x.astype(np.int32)
    return x[0] if (x == x[0]).all() else x


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be positive: use at least 1")


def _check_tier(model: Transformer, tier: Tier, batch_size: int, chunk: int) -> None:
    attention = model.config.attention
    if attention.landmarks == "all":
        raise ValueError("landmarks='all' is for ablation and has no cache: use 'pyramid' or 'off'")
    if tier not in TIERS:
        raise ConfigError(f"tier={tier!r} must be one of {', '.join(TIERS)}: use device, say")
    if (reason := why_not_in(tier, model.config)) is not None:
        raise ConfigError(f"{reason}: use tier='device'")
    if tier == "host" and not _has_cpu():
        raise ConfigError(
            "tier='host' calls back to JAX's CPU platform, which is switched off: use"
            " JAX_PLATFORMS=cuda,cpu, or leave it unset"
        )
    if tier == "host" and batch_size > 1:
        raise ConfigError(
            f"batch_size={batch_size} with tier='host', which takes one sequence: use 1, or"
            " tier='device'"
        )
    if tier == "host" and chunk > CHUNK - SUFFIX_UNIT:
        raise ConfigError(
            f"chunk={chunk} with tier='host' must be at most {CHUNK - SUFFIX_UNIT}: use"
            f" {CHUNK // 2}"
        )
    if tier == "compressed" and attention.fusion != "sum":
        raise ConfigError(
            "tier='compressed' averages keys without RoPE, and fusion='softmax' has it: use"
            " tier='host'"
        )


def _has_cpu() -> bool:
    try:
        return bool(jax.devices("cpu"))
    except RuntimeError:
        return False


def _answer(
    graph, state, kept, length, tokens, valid, stop_tokens, seeds, limit,
    *, appended, kinds: tuple[Any, ...], room: int, sampling: Sampling,
):  # fmt: skip
    """The generated tokens, and the parts of the caches whose memory was written to.

    There is room for as many tokens as `limit`, int32, or more: a program for all limits within it.
    """
    model = nnx.merge(graph, state)
    logits, layers = extend(model, join_layers(kinds, kept, appended), tokens, length, valid)
    batch = len(seeds)

    def position(step):
        """Of the token that step `step` reads: the one chosen before it."""
        return length + valid + step - 1

    def choose(step, logits, out, ended):
        token = sampling.choose(logits, seeds, step)
        out = out.at[:, step].set(jnp.where(ended, -1, token))
        return token, out, ended | (token[:, None] == stop_tokens).any(axis=1)

    def running(carry, end=limit):
        step, _, _, ended, _ = carry
        return (step < end) & ~ended.all()

    def generate(carry):
        step, token, out, ended, layers = carry
        logits, layers = extend(model, layers, token[:, None], position(step), jnp.int32(1))
        return step + 1, *choose(step, logits, out, ended), layers

    def generate_block(carry):
        *rest, layers = carry
        left = jnp.min(left_in_block(position(carry[0]), model.config.attention))
        end = jnp.minimum(carry[0] + left, limit)
        layers = map_layers(open_block, model, layers, position(carry[0]))
        *rest, layers = jax.lax.while_loop(lambda x: running(x, end), generate, (*rest, layers))
        return *rest, map_layers(close_block, model, layers, position(rest[0]))

    out = jnp.full((batch, room), -1, jnp.int32)
    chosen = choose(jnp.int32(0), logits, out, jnp.zeros(batch, bool))
    carry = jax.lax.while_loop(running, generate_block, (jnp.int32(1), *chosen, layers))
    return carry[2], split_layers(carry[4])[1]
