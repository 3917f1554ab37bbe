"""What layers of the baselines keep of the past before their window, in the device's memory.

With the methods of `DeviceRemote`. Keys have RoPE if the pattern says so, and Longformer keeps
its global tokens only.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from sparsex_jax.baselines.attention import remote_branch
from sparsex_jax.baselines.pattern import Pattern
from sparsex_jax.cache.device import room, write
from sparsex_jax.config import ModelConfig
from sparsex_jax.fusion import Branch
from sparsex_jax.modules.attention import KeySide, QuerySide


class _Keys(NamedTuple):
    k: jax.Array
    v: jax.Array


class _Past(_Keys):
    """Keys and values of tokens before the window, [B, N, Hkv, D]."""

    __slots__ = ()

    def settle(self, length: jax.Array, tokens: int, config: Pattern) -> Self:
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
    ) -> tuple[None, Branch, Self]:
        """Attention to what the pattern shows before the window; as in `DeviceRemote`."""
        positions = first_position + jnp.arange(queries.q.shape[1], dtype=jnp.int32)
        branch = remote_branch(
            queries.q, self.k, self.v, positions, local_start, pattern=config,
            implementation=implementation,
        )  # fmt: skip
        return None, branch, self


class AllTokens(_Past):
    """The past of a dense or a BigBird layer, append-only; N is the capacity, rounded up."""

    __slots__ = ()

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
        blocks: None,
        length: jax.Array,
        valid: jax.Array,
        config: Pattern,
        settle: bool,
    ) -> "AllTokens":
        """Remembers new tokens; arguments as in `DeviceRemote`."""
        return AllTokens(write(self.k, keys.k, length), write(self.v, keys.v, length))


class FirstTokens(_Past):
    """The past of a Longformer layer: its N global tokens."""

    __slots__ = ()

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
        blocks: None,
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


Past = AllTokens | FirstTokens


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
