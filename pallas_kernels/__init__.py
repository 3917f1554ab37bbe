"""Kernels of Sparse-X: three primitives, each with a reference, a portable and fast paths.

A primitive is imported from its folder, e.g.
`from pallas_kernels.range_attention import range_attention`.
"""
