"""flax.nnx modules: the attention layer and a Transformer of them."""

from sparsex_jax.modules.attention import SparseXAttention
from sparsex_jax.modules.transformer import Transformer

__all__ = ["SparseXAttention", "Transformer"]
