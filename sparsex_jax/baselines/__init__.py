"""Attention to compare with: dense, Longformer's and BigBird's, over the same primitives.

The layers are in `sparsex_jax.modules.baselines`, what they keep of the past in
`sparsex_jax.cache.baselines`.
"""

from sparsex_jax.baselines.attention import baseline_attention
from sparsex_jax.baselines.pattern import Pattern, make_pattern, random_blocks

__all__ = ["Pattern", "baseline_attention", "make_pattern", "random_blocks"]
