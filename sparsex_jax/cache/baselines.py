"""What layers of the baselines keep of the past before their window, in the device's memory.

With the methods of `DeviceRemote`. Keys have RoPE if the pattern says so, and Longformer keeps
its global tokens only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsex_jax.baselines.attention import remote_branch
from sparsex_jax.baselines.pattern import Pattern
from sparsex_jax.cache.device import room, write
from sparsex_jax.config import ModelConfig
from sparsex_jax.fusion import Branch
from sparsex_jax.modules.attention import KeySide, QuerySide


class AllTokens(NamedTuple):
    """The past of a dense or a BigBird layer, append-only; N is the capacity, rounded up.

    Attributes:
      k: [B, N, Hkv, D].
      v: [B, N, Hkv, D].
    """

    k: jax.Array
    v: jax.Array

    def split(self) -> tuple[tuple, "AllTokens"]:
        """What an answer must not change, and what it only writes behind the context."""
        return (), self

    @staticmethod
    def join(kept: tuple, appended: "AllTokens") -> "AllTokens":
        """The inverse of `split`."""
        return appended

    def append(
        self,
        keys: KeySide,
        features: None,
        length: jax.Array,
        valid: jax.Array,
        config: Pattern,
        settle: bool,
    ) -> "AllTokens":
        """Remembers new tokens; arguments as in `DeviceRemote`."""
        return AllTokens(write(self.k, keys.k, length), write(self.v, keys.v, length))

    def settle(self, length: jax.Array, tokens: int, config: Pattern) -> "AllTokens":
        """As in `DeviceRemote`: nothing waits."""
        return self

    def landmarks(self, first_position: jax.Array, tokens: int, config: Pattern) -> None:
        """There are none."""

    def attend(
        self,
        queries: QuerySide,
        first_position: jax.Array,
        local_start: jax.Array,
        config: Pattern,
        implementation: str | None = None,
    ) -> tuple[None, Branch, "AllTokens"]:
        """Attention to what the pattern shows before the window; as in `DeviceRemote`."""
        return (
            None,
            _attend(self, queries, first_position, local_start, config, implementation),
            self,
        )


class FirstTokens(NamedTuple):
    """The past of a Longformer layer: its g global tokens.

    Attributes:
      k: [B, g, Hkv, D].
      v: [B, g, Hkv, D].
    """

    k: jax.Array
    v: jax.Array

    def split(self) -> tuple["FirstTokens", tuple]:
        """What an answer must not change, and what it only writes behind the context."""
        return self, ()

    @staticmethod
    def join(kept: "FirstTokens", appended: tuple) -> "FirstTokens":
        """The inverse of `split`."""
        return kept

    def append(
        self,
        keys: KeySide,
        features: None,
        length: jax.Array,
        valid: jax.Array,
        config: Pattern,
        settle: bool,
    ) -> "FirstTokens":
        """Remembers those of new tokens that are global; arguments as in `DeviceRemote`."""
        place = jnp.arange(self.k.shape[1], dtype=jnp.int32) - length
        new = ((place >= 0) & (place < keys.k.shape[1]))[:, None, None]

        def updated(old, rows):
            return jnp.where(new, jnp.take(rows, place, axis=1, mode="clip").astype(old.dtype), old)

        return FirstTokens(updated(self.k, keys.k), updated(self.v, keys.v))

    def settle(self, length: jax.Array, tokens: int, config: Pattern) -> "FirstTokens":
        """As in `DeviceRemote`: nothing waits."""
        return self

    def landmarks(self, first_position: jax.Array, tokens: int, config: Pattern) -> None:
        """There are none."""

    def attend(
        self,
        queries: QuerySide,
        first_position: jax.Array,
        local_start: jax.Array,
        config: Pattern,
        implementation: str | None = None,
    ) -> tuple[None, Branch, "FirstTokens"]:
        """Attention to the global tokens before the window; as in `DeviceRemote`."""
        return (
            None,
            _attend(self, queries, first_position, local_start, config, implementation),
            self,
        )


Past = AllTokens | FirstTokens


def _attend(past: Past, queries, first_position, local_start, pattern, implementation) -> Branch:
    positions = first_position + jnp.arange(queries.q.shape[1], dtype=jnp.int32)
    return remote_branch(
        queries.q, past.k, past.v, positions, local_start, pattern=pattern,
        implementation=implementation,
    )  # fmt: skip


def empty_past(
    pattern: Pattern, config: ModelConfig, batch_size: int, capacity: int, chunk: int
) -> Past:
    """The past of a baseline's layer, without tokens."""
    tokens = room(capacity, chunk, pattern)
    if pattern.kind == "longformer":
        tokens = pattern.global_tokens
    shape = batch_size, tokens, config.num_kv_heads, config.head_dim
    k, v = (jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in range(2))
    return FirstTokens(k, v) if pattern.kind == "longformer" else AllTokens(k, v)
