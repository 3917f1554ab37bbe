"""What a query of a baseline's layer attends to, and the random blocks of BigBird."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from sparsex_jax.config import LAYERS, AttentionConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Pattern(AttentionConfig):
    """The attention of one baseline layer, as its window and what is seen before the window.

    Both are one softmax, as in those models: `fusion` is "softmax".

    Attributes:
      kind: which one.
      rope: as in `BaselineConfig`.
      layer: number of the layer, from 0.
      global_tokens: as in `BaselineConfig`, and so the two below.
      random_blocks: r.
      random_seed: of the random blocks.
    """

    kind: Literal["dense", "longformer", "bigbird"] = "dense"
    rope: Literal["all", "window"] = "all"
    layer: int = 0
    global_tokens: int = 128
    random_blocks: int = 3
    random_seed: int = 0

    @property
    def turns_remote(self) -> bool:
        """Whether what is attended to beyond the window has RoPE."""
        return self.rope == "all"


def make_pattern(config: ModelConfig, number: int) -> Pattern:
    """The pattern of layer `number` of a model, a "d", "f" or "b"."""
    letter, baseline = config.layers[number], config.baseline
    shared = {
        field.name: getattr(config.attention, field.name)
        for field in dataclasses.fields(AttentionConfig)
    }
    shared |= {"window": config.baseline_window(letter), "top_k": 0, "landmarks": "off"}
    return Pattern(
        **shared | {"fusion": "softmax", "kind": LAYERS[letter], "layer": number},
        rope=baseline.rope, global_tokens=baseline.global_tokens,
        random_blocks=baseline.random_blocks, random_seed=baseline.random_seed,
    )  # fmt: skip


def random_blocks(
    positions: jax.Array, document_start: jax.Array | int, pattern: Pattern
) -> jax.Array:
    """The blocks that BigBird's queries attend to besides their window and the global tokens.

    All queries of a block have the same: r different ones, each set as likely as any other, of
    those that lie between the global tokens and the window of the block's first query. They depend
    on (seed, layer, block of queries) alone, so later tokens cannot change them. Drawing r of n
    without repetition is Floyd's (Bentley and Floyd, 1987, Programming Pearls).

    Args:
      positions: of the queries, int32 [T].
      document_start: of the first whole block of each query's document, broadcastable.
      pattern: sizes, seed and layer.

    Returns:
      int32 [..., T, r], numbers of blocks, -1 where there are fewer than r.
    """
    size = pattern.block_size
    first = document_start // size
    query_block = positions // size - first
    skipped = pattern.global_tokens // size
    count = jnp.maximum(query_block - pattern.window // size - skipped, 0)
    chosen: list[jax.Array] = []
    for number in range(pattern.random_blocks):
        last = count - pattern.random_blocks + number
        bits = hash_bits(pattern.random_seed, pattern.layer, query_block, number)
        drawn = (bits % (jnp.maximum(last, 0) + 1).astype(jnp.uint32)).astype(jnp.int32)
        for other in chosen:
            drawn = jnp.where(other == drawn, -2, drawn)
        chosen.append(jnp.where(last < 0, -1, jnp.where(drawn == -2, last, drawn)))
    index = jnp.stack(chosen, axis=-1)
    return jnp.where(index < 0, -1, index + jnp.expand_dims(first, -1) + skipped)


def hash_bits(*parts: jax.Array | int) -> jax.Array:
    """32 bits, uint32, that depend on all the integers, which may be arrays of one shape.

    The mixing is MurmurHash3's finalizer (Appleby, 2011), applied after each part.
    """
    bits = jnp.uint32(0)
    for part in parts:
        bits = (bits + jnp.asarray(part).astype(jnp.uint32)) * jnp.uint32(0x9E3779B1) + 1
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
        bits ^= bits >> 16
    return bits
