"""KV cache in three tiers, chunked prefill and generation."""

from sparsex_jax.cache.compressed import CompressedRemote
from sparsex_jax.cache.device import DeviceRemote
from sparsex_jax.cache.engine import Cache, Engine
from sparsex_jax.cache.host import HostRemote
from sparsex_jax.cache.layer import LayerCache
from sparsex_jax.cache.memory import CacheMemoryError
from sparsex_jax.cache.sampling import Sampling
from sparsex_jax.cache.tiers import TIERS, Tier

__all__ = [
    "TIERS",
    "Cache",
    "CacheMemoryError",
    "CompressedRemote",
    "DeviceRemote",
    "Engine",
    "HostRemote",
    "LayerCache",
    "Sampling",
    "Tier",
]
