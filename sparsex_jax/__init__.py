"""Sparse-X: trainable, strictly causal, hierarchical sparse attention for very long contexts."""

__version__ = "0.1.0"
