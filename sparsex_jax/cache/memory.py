"""What a cache takes of the device's and the host's memory, told before the work starts."""

import dataclasses
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsex_jax.cache.device import room
from sparsex_jax.cache.host import PAGE
from sparsex_jax.cache.layer import empty_layers
from sparsex_jax.cache.tiers import EXACT, TIERS, Tier, why_not_in
from sparsex_jax.config import ConfigError, ModelConfig

_LIVE = 6  # arrays of a chunk's tokens, as wide as the widest layer, that are there at once


class CacheMemoryError(ConfigError):
    """A cache does not fit; the message names the tier that would."""


class Bytes(NamedTuple):
    """Memory in bytes.

    Attributes:
      device: of the device: cache, parameters and, roughly, temporaries of a chunk.
      host: of the host: keys and values of the tier "host".
    """

    device: int
    host: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """What decides the size of a cache.

    Attributes:
      config: of the model.
      capacity: tokens of a sequence.
      batch_size: sequences.
      chunk: tokens read at a time.
      parameter_bytes: of the model.
    """

    config: ModelConfig
    capacity: int
    batch_size: int
    chunk: int
    parameter_bytes: int = 0

    def cache_bytes(self, tier: Tier) -> int:
        """Of the cache's arrays on the device, exactly."""
        layers = jax.eval_shape(
            lambda: empty_layers(self.config, self.capacity, self.batch_size, self.chunk, tier)
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))

    def needed(self, tier: Tier) -> Bytes:
        """What a tier takes."""
        config, item = self.config, jnp.dtype(self.config.dtype).itemsize
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        widest = max(config.model_dim + heads, 2 * config.mlp_dim)
        temporary = _LIVE * self.batch_size * self.chunk * widest * item
        token = 2 * config.num_kv_heads * config.head_dim * item
        host = 0
        if tier == "host":
            tokens = room(self.capacity, self.chunk, config.attention)
            host = config.layers.count("s") * tokens * token
            temporary += 2 * PAGE * token
        return Bytes(self.parameter_bytes + self.cache_bytes(tier) + temporary, host)


def available() -> Bytes:
    """What the first device and the host have in all; a CPU's is the host's."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stats = jax.devices()[0].memory_stats() or {}
    return Bytes(stats.get("bytes_limit", host), host)


def check_fits(shape: Shape, tier: Tier, there: Bytes | None = None) -> None:
    """Raises CacheMemoryError unless a cache fits into the memory that is there.

    Args:
      shape: of the cache.
      tier: that was asked for.
      there: memory; None for that of this machine.
    """
    there = available() if there is None else there
    if (reason := _why_not(shape, tier, there)) is None:
        return
    allowed = [each for each in TIERS if each != tier and _why_not(shape, each, there) is None]
    if allowed:
        loss = "" if allowed[0] in EXACT else ", which forgets (docs/cache.md)"
        way_out = f"tier={allowed[0]!r} would fit{loss}"
    else:
        way_out = "no tier would fit: use a smaller length, batch size or chunk"
    raise CacheMemoryError(f"a cache of {shape.capacity} tokens does not fit: {reason}; {way_out}")


def _why_not(shape: Shape, tier: Tier, there: Bytes) -> str | None:
    if (reason := why_not_in(tier, shape.config)) is not None:
        return reason
    if tier == "host" and shape.batch_size > 1:
        return "tier='host' takes one sequence at a time"
    needed = shape.needed(tier)
    shared = needed.device + needed.host if there.device == there.host else needed.device
    for name, wanted, limit in (
        ("device", shared, there.device), ("host", needed.host, there.host)
    ):  # fmt: skip
        if wanted > limit:
            return (
                f"tier={tier!r} takes about {_gib(wanted)} of the {name}'s memory, which has"
                f" {_gib(limit)}"
            )
    return None


def _gib(count: int) -> str:
    digits = max(0, 1 - math.floor(math.log10(max(count, 1) / 2**30)))
    return f"{count / 2**30:.{min(digits, 4)}f} GiB"
