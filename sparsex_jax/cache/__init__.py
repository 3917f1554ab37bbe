"""KV cache, chunked prefill and greedy decoding."""

from sparsex_jax.cache.engine import Cache, Engine
from sparsex_jax.cache.layer import LayerCache, RemoteCache

__all__ = ["Cache", "Engine", "LayerCache", "RemoteCache"]
