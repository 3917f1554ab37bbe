"""KV cache, chunked prefill and generation."""

from sparsex_jax.cache.device import DeviceRemote
from sparsex_jax.cache.engine import Cache, Engine
from sparsex_jax.cache.layer import LayerCache
from sparsex_jax.cache.sampling import Sampling

__all__ = ["Cache", "DeviceRemote", "Engine", "LayerCache", "Sampling"]
