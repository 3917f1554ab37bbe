"""Configurations of attention and model: frozen, and validated once, at construction."""

import dataclasses
from typing import Literal

from sparsex_jax.config.rules import check_seed, check_types, multiples, require, require_positive

# What attends in a layer, by its letter in `ModelConfig.layers`.
LAYERS = {"l": "local", "s": "sparsex", "d": "dense", "f": "longformer", "b": "bigbird"}
BASELINES = ("d", "f", "b")


def baselines_in(layers: str) -> str:
    """The names of the baselines among a model's layers, "dense and bigbird" say; "" for none."""
    return " and ".join(LAYERS[kind] for kind in BASELINES if kind in layers)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What a query attends to; the symbols are those of docs/math.md.

    Attributes:
      window: W, tokens of exact local attention; a multiple of `block_size`.
      block_size: S, tokens of the unit that is scored and selected.
      top_k: K, blocks selected per query token and KV head; 0 switches the dynamic branch off.
      segment_length: L, tokens of a landmark segment; `block_size` times a power of two.
      landmarks_per_segment: m, tokens of a segment that later queries see.
      nodes_per_level: r, nodes of each pyramid level that a query sees (r or r + 1).
      landmarks: "pyramid" (O(log N) a query), "all" (cost 0.01 N^2, for ablation) or "off".
      fusion: "sum" of gated branches, or one exact "softmax" over local and selected keys
        (which needs landmarks="off": they would count twice).
      score_dim: d_s, width of the selector's features.
      search_node_size: blocks of a node, where blocks are searched in two levels, which costs less
        in very long contexts and may miss some (`select_blocks_in_nodes`): 8 to 64, a multiple of
        8. 0 searches all blocks.
      search_beam: nodes whose blocks a query's search looks at, besides those that its past cuts.
      near_reach: tokens before a(t), a multiple of `block_size`, of whose blocks K // 2 are
        selected, and the others of those before, so that what is near is not crowded out in a
        long context; where that is more than half of the remote past, half. 0 selects all K of
        everything.
      recency: whether the bias of a selected block falls with its distance, by as much as a query
        and KV head choose (with fusion="sum").
      rope_base: base of the rotary frequencies of the local branch.
    """

    window: int = 512
    block_size: int = 64
    top_k: int = 16
    segment_length: int = 512
    landmarks_per_segment: int = 5
    nodes_per_level: int = 4
    landmarks: Literal["pyramid", "all", "off"] = "pyramid"
    fusion: Literal["sum", "softmax"] = "sum"
    score_dim: int = 64
    search_node_size: int = 0
    search_beam: int = 32
    near_reach: int = 0
    recency: bool = False
    rope_base: float = 10_000.0

    def __post_init__(self):
        check_types(self)
        require_positive(
            self, "window", "block_size", "segment_length", "landmarks_per_segment",
            "nodes_per_level", "score_dim", "search_beam", "rope_base",
        )  # fmt: skip
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative: use 0 for none")
        require(
            self.window % self.block_size == 0,
            f"window={self.window} must be a multiple of block_size={self.block_size}:"
            f" {multiples(self.window, self.block_size)}",
        )
        blocks = self.segment_length // self.block_size
        require(
            self.segment_length % self.block_size == 0 and blocks & (blocks - 1) == 0,
            f"segment_length={self.segment_length} must be block_size={self.block_size} times a"
            f" power of two: use {self.block_size << max(blocks.bit_length() - 1, 0)}",
        )
        require(
            self.landmarks_per_segment <= self.block_size,
            f"landmarks_per_segment={self.landmarks_per_segment} must be at most"
            f" block_size={self.block_size}: use fewer landmarks",
        )
        require(
            self.fusion == "sum" or self.landmarks == "off",
            f"fusion='softmax' with landmarks={self.landmarks!r} would count landmark tokens twice:"
            " use landmarks='off', or fusion='sum'",
        )
        node = self.search_node_size
        require(
            0 <= node <= 64 and node % 8 == 0,
            f"search_node_size={node} must be a multiple of 8 up to 64, or 0 to search all blocks:"
            " use 8",
        )
        require(
            not node or self.search_beam * node >= self.top_k,
            f"search_beam={self.search_beam} nodes of search_node_size={node} blocks hold fewer"
            f" than top_k={self.top_k}: use search_beam={-(-self.top_k // max(node, 1))} or more",
        )
        require(
            self.near_reach >= 0,
            f"near_reach={self.near_reach} must not be negative: use 0 for everything",
        )
        require(
            self.near_reach % self.block_size == 0,
            f"near_reach={self.near_reach} must be a multiple of block_size={self.block_size}, or 0"
            f" to select blocks of everything: {multiples(self.near_reach, self.block_size)}",
        )
        require(
            not self.near_reach or self.top_k != 1,
            "top_k=1 with near_reach has no half: use top_k=2 or more, or near_reach=0",
        )
        require(
            not self.recency or self.fusion == "sum",
            "recency with fusion='softmax', where blocks have no bias: use fusion='sum'",
        )

    @property
    def turns_remote(self) -> bool:
        """Whether what is attended to beyond the window has RoPE."""
        return self.fusion == "softmax"


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """What a query of a Longformer or BigBird layer attends to (docs/baselines.md).

    Attributes:
      rope: of which keys the positions count, in dense layers, too: "all", or those of the
        "window" alone, as in Sparse-X, in the same softmax as the others.
      window: tokens of exact local attention, a multiple of the attention's `block_size`. None:
        as many as give a query the keys of a sparse layer, window + top_k * block_size in all.
      global_tokens: first tokens of a document, which its later tokens see; likewise a multiple.
      random_blocks: of a BigBird layer, for each block of queries.
      random_seed: decides them; from 0 to 2^32 - 1.
    """

    rope: Literal["all", "window"] = "all"
    window: int | None = None
    global_tokens: int = 128
    random_blocks: int = 3
    random_seed: int = 0

    def __post_init__(self):
        check_types(self)
        require_positive(self, "global_tokens", "random_blocks")
        check_seed(self.random_seed)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer.

    Attributes:
      vocab_size: entries of the (tied) embedding.
      model_dim: width of the residual stream.
      num_heads: query heads; a multiple of `num_kv_heads`.
      num_kv_heads: heads of keys and values; each serves a group of query heads.
      head_dim: width of a head; even, for RoPE.
      mlp_dim: hidden width of SwiGLU.
      conv_width: taps of the causal convolution before q, k and v; 0 switches it off.
      ngrams: sizes, in tokens, of what went before a token, by whose hashes layers that are not
        local tell places apart that go on alike for a while (`sparsex_jax.modules.ngrams`): (4, 8,
        16, 32), say. () for none.
      qk_scale: whether each query head learns a factor of q.k, at first 1. Without it logits stay
        below sqrt(head_dim), which is little where many keys are nearly right.
      layers: one letter a layer: "l" local attention only, "s" all three branches; for comparison
        "d" dense, "f" Longformer's and "b" BigBird's attention, in the place of an "s".
      baseline: patterns of the last two.
      remat: what the backward pass recomputes: nothing ("none"), each layer ("layer"), or first
        each repetition of the layers and then each layer ("repetition"): of "llllls" * 4 the inputs
        of 4 repetitions are kept, and of 6 layers at a time, instead of 24.
      loss_chunk: tokens for which logits are held at a time by the loss.
      selection_loss: weight, beside the loss, of the divergence that teaches block scores
        (`sparsex_jax.selection_loss`); 0 leaves them to the gradients of what is selected.
      dtype: type of the arithmetic; parameters are always float32.
    """

    vocab_size: int = 4096
    model_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 768
    conv_width: int = 4
    ngrams: tuple[int, ...] = ()
    qk_scale: bool = False
    layers: str = "llls"
    attention: AttentionConfig = AttentionConfig()
    baseline: BaselineConfig = BaselineConfig()
    remat: Literal["none", "layer", "repetition"] = "none"
    loss_chunk: int = 8192
    selection_loss: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        check_types(self)
        require_positive(
            self, "vocab_size", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
            "loss_chunk",
        )  # fmt: skip
        require(
            self.selection_loss >= 0,
            f"selection_loss={self.selection_loss} must not be negative: use 0 for none",
        )
        require(self.conv_width >= 0, f"conv_width={self.conv_width} is negative: use 0 for none")
        require(
            all(size > 0 for size in self.ngrams),
            f"ngrams={self.ngrams} must be positive sizes: use (4, 8, 16, 32), say, or ()",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}:"
            f" {multiples(self.num_heads, self.num_kv_heads)}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even: use {self.head_dim + 1}",
        )
        require(
            bool(self.layers) and set(self.layers) <= set(LAYERS),
            f"layers={self.layers!r} must consist of 'l' (local), 's' (sparse), 'd' (dense),"
            " 'f' (Longformer) and 'b' (BigBird): use 'llls', say",
        )
        for kind in set(self.layers) & {"f", "b"}:
            self._check_baseline(kind)

    def _check_baseline(self, kind: str) -> None:
        size, window = self.attention.block_size, self.baseline_window(kind)
        for name, value in (("global_tokens", self.baseline.global_tokens), ("window", window)):
            require(
                value >= size and value % size == 0,
                f"baseline.{name}={value} of {LAYERS[kind]} layers must be a positive multiple of"
                f" block_size={size}: set it to one, {size} say",
            )

    @property
    def conv_reach(self) -> int:
        """Tokens before each that a convolution reaches."""
        return max(self.conv_width - 1, 0)

    def ngrams_of(self, kind: str) -> tuple[int, ...]:
        """Those of a layer, by its letter."""
        return () if kind == "l" else self.ngrams

    def baseline_window(self, kind: str) -> int:
        """Tokens of the window of a baseline's layer, "d", "f" or "b"."""
        attention, baseline = self.attention, self.baseline
        if kind == "d":
            return attention.window
        if baseline.window is not None:
            return baseline.window
        keys = attention.window + attention.top_k * attention.block_size
        random = baseline.random_blocks * attention.block_size if kind == "b" else 0
        return keys - baseline.global_tokens - random

    @property
    def system(self) -> str:
        """The name of what attends, in results: "sparsex", "dense", ...; "local" if all is.

        With how blocks are searched, where that is in two levels.
        """
        names = [LAYERS[kind] for kind in dict.fromkeys(self.layers) if kind != "l"]
        name, attention = "+".join(names) or "local", self.attention
        if "s" not in self.layers or not attention.search_node_size:
            return name
        return f"{name}, nodes of {attention.search_node_size}, beam {attention.search_beam}"
