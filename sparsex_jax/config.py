"""Configurations of attention, model and training: frozen, and validated once, at construction."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

SEEDS = 1 << 32  # JAX's random keys hold 32 bits of a seed
# What attends in a layer, by its letter in `ModelConfig.layers`.
LAYERS = {"l": "local", "s": "sparsex", "d": "dense", "f": "longformer", "b": "bigbird"}
BASELINES = ("d", "f", "b")


def baselines_in(layers: str) -> str:
    """The names of the baselines among a model's layers, "dense and bigbird" say; "" for none."""
    return " and ".join(LAYERS[kind] for kind in BASELINES if kind in layers)


class ConfigError(ValueError):
    """A field has a value that its rule forbids; the message names both and the way out."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_positive(config, *names: str) -> None:
    types_of = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        way_out = "use a number above 0" if types_of[name] is float else "use at least 1"
        _require(value > 0, f"{name}={value} must be positive: {way_out}")


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed that JAX or NumPy cannot take, or not distinguish."""
    _require(0 <= seed < SEEDS, f"seed={seed} must lie in [0, 2^32): use 0, say")


def _has_type(value: Any, wanted: Any) -> bool:
    """Whether a value is of the type of an annotation; an int is a float, too, a bool neither."""
    parts = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if typing.get_origin(wanted) is Literal:
        return isinstance(value, str) and value in parts
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, tuple) and parts[-1] is ...:
            parts = parts[:1] * len(value)
        return (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(map(_has_type, value, parts))
        )
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def _check_types(config) -> None:
    """Raises ConfigError unless each field has the type of its annotation; floats are finite."""
    for field in dataclasses.fields(config):
        name, value, wanted = field.name, getattr(config, field.name), field.type
        if typing.get_origin(wanted) is Literal:
            rule = f"must be one of {', '.join(map(repr, typing.get_args(wanted)))}"
        else:
            rule = f"must be of type {wanted.__name__ if isinstance(wanted, type) else wanted}"
        _require(_has_type(value, wanted), f"{name}={value!r} {rule}")
        if isinstance(value, float):
            _require(math.isfinite(value), f"{name}={value} must be finite: use a number")


def _multiples(value: int, unit: int) -> str:
    """The two multiples of `unit` around `value`, as advice."""
    below = value // unit * unit
    return f"use {below} or {below + unit}" if below else f"use {unit}"


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
      gate_floor: least gate of selected blocks, in [0, 2), the largest being 2 (with fusion="sum").
        With 0 a head may close it early in training, and then never learns what to select.
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
    gate_floor: float = 0.0
    rope_base: float = 10_000.0

    def __post_init__(self):
        _check_types(self)
        _require_positive(
            self, "window", "block_size", "segment_length", "landmarks_per_segment",
            "nodes_per_level", "score_dim", "search_beam", "rope_base",
        )  # fmt: skip
        _require(self.top_k >= 0, f"top_k={self.top_k} must not be negative: use 0 for none")
        _require(
            self.window % self.block_size == 0,
            f"window={self.window} must be a multiple of block_size={self.block_size}:"
            f" {_multiples(self.window, self.block_size)}",
        )
        blocks = self.segment_length // self.block_size
        _require(
            self.segment_length % self.block_size == 0 and blocks & (blocks - 1) == 0,
            f"segment_length={self.segment_length} must be block_size={self.block_size} times a"
            f" power of two: use {self.block_size << max(blocks.bit_length() - 1, 0)}",
        )
        _require(
            self.landmarks_per_segment <= self.block_size,
            f"landmarks_per_segment={self.landmarks_per_segment} must be at most"
            f" block_size={self.block_size}: use fewer landmarks",
        )
        _require(
            self.fusion == "sum" or self.landmarks == "off",
            f"fusion='softmax' with landmarks={self.landmarks!r} would count landmark tokens twice:"
            " use landmarks='off', or fusion='sum'",
        )
        node = self.search_node_size
        _require(
            0 <= node <= 64 and node % 8 == 0,
            f"search_node_size={node} must be a multiple of 8 up to 64, or 0 to search all blocks:"
            " use 8",
        )
        _require(
            not node or self.search_beam * node >= self.top_k,
            f"search_beam={self.search_beam} nodes of search_node_size={node} blocks hold fewer"
            f" than top_k={self.top_k}: use search_beam={-(-self.top_k // max(node, 1))} or more",
        )
        _require(
            self.near_reach >= 0,
            f"near_reach={self.near_reach} must not be negative: use 0 for everything",
        )
        _require(
            self.near_reach % self.block_size == 0,
            f"near_reach={self.near_reach} must be a multiple of block_size={self.block_size}, or 0"
            f" to select blocks of everything: {_multiples(self.near_reach, self.block_size)}",
        )
        _require(
            not self.near_reach or self.top_k != 1,
            "top_k=1 with near_reach has no half: use top_k=2 or more, or near_reach=0",
        )
        _require(
            not self.recency or self.fusion == "sum",
            "recency with fusion='softmax', where blocks have no bias: use fusion='sum'",
        )
        _require(
            0 <= self.gate_floor < 2,
            f"gate_floor={self.gate_floor} must lie in [0, 2), below the largest gate: use 0.5",
        )
        _require(
            not self.gate_floor or self.fusion == "sum",
            f"gate_floor={self.gate_floor} with fusion='softmax', which has no gates: use"
            " fusion='sum', or gate_floor=0",
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
        _check_types(self)
        _require_positive(self, "global_tokens", "random_blocks")
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
    layers: str = "llls"
    attention: AttentionConfig = AttentionConfig()
    baseline: BaselineConfig = BaselineConfig()
    remat: Literal["none", "layer", "repetition"] = "none"
    loss_chunk: int = 8192
    selection_loss: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        _check_types(self)
        _require_positive(
            self, "vocab_size", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
            "loss_chunk",
        )  # fmt: skip
        _require(
            self.selection_loss >= 0,
            f"selection_loss={self.selection_loss} must not be negative: use 0 for none",
        )
        _require(self.conv_width >= 0, f"conv_width={self.conv_width} is negative: use 0 for none")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}:"
            f" {_multiples(self.num_heads, self.num_kv_heads)}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even: use {self.head_dim + 1}",
        )
        _require(
            bool(self.layers) and set(self.layers) <= set(LAYERS),
            f"layers={self.layers!r} must consist of 'l' (local), 's' (sparse), 'd' (dense),"
            " 'f' (Longformer) and 'b' (BigBird): use 'llls', say",
        )
        for kind in set(self.layers) & {"f", "b"}:
            self._check_baseline(kind)

    def _check_baseline(self, kind: str) -> None:
        size, window = self.attention.block_size, self.baseline_window(kind)
        for name, value in (("global_tokens", self.baseline.global_tokens), ("window", window)):
            _require(
                value >= size and value % size == 0,
                f"baseline.{name}={value} of {LAYERS[kind]} layers must be a positive multiple of"
                f" block_size={size}: set it to one, {size} say",
            )

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


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up, cosine decay and clipping of the global gradient norm.

    Attributes:
      method: "adamw" (Loshchilov and Hutter, arXiv:1711.05101), or "muon" (Jordan, 2024; scaled as
        in arXiv:2502.16982, so that learning rates are those of AdamW) for projections of at least
        32 inputs and outputs, and Adam for the embedding, norms, convolutions and gates.
      learning_rate: the highest, at the end of the warm-up.
      warmup_steps: optimizer steps of linear warm-up; 0 for none.
      final_fraction: the last learning rate as a share of `learning_rate`.
      beta1: share of the running mean of the gradients that a step of AdamW keeps.
      beta2: share of the running mean of their squares that a step of AdamW keeps.
      momentum: share of the running mean of the gradients that a step of Muon keeps.
      weight_decay: decay per step, in units of the learning rate: of matrices with AdamW, of what
        Muon moves with Muon.
      clip_norm: largest global norm of the gradients; longer ones are scaled down to it.
    """

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 1.0

    def __post_init__(self):
        _check_types(self)
        _require_positive(self, "learning_rate", "clip_norm")
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} is negative: use 0")
        _require(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction} must lie in [0, 1]: use 0.1, say",
        )
        for name, usual in (("beta1", 0.9), ("beta2", 0.95), ("momentum", 0.95)):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}={value} must lie in [0, 1): use {usual}, say")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and what is made of it.

    Attributes:
      haystack: folder of text files; None means the running Python's standard library.
      code: folder made by scripts/prepare_linux.py, in the place of `haystack`: its train split is
        the text of all sources, and its tokenizer the model's (docs/code.md); None for none.
      text_weight: weight in the loss of tokens that are no answer (answers weigh 1).
      workers: processes that make batches beside the one that trains, where a core cannot make them
        as fast as the devices take them; 0 for a thread. The batches are the same.
    """

    haystack: str | None = None
    code: str | None = None
    text_weight: float = 0.1
    workers: int = 0

    def __post_init__(self):
        _check_types(self)
        _require(
            self.haystack is None or self.code is None,
            f"haystack={self.haystack!r} and code={self.code!r} both name the text: use one",
        )
        _require(self.text_weight >= 0, f"text_weight={self.text_weight} is negative: use 0")
        _require(self.workers >= 0, f"workers={self.workers} is negative: use 0 for a thread")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stretch of training with fixed shapes; stages follow one another (the curriculum).

    Attributes:
      steps: optimizer steps.
      length: tokens of a sequence.
      batch_size: sequences of an optimizer step, over all devices.
      top_k: blocks selected; None takes the model's.
      mix: (source, weight) pairs, sources being those of `sparsex_jax.tasks.SOURCES`: "text", what
        is made for training, tasks, and "definitions" and "descriptions" of `DataConfig.code`.
      needles: fewest and most needles hidden in a sequence.
      questions: most questions asked at the end of a sequence.
      loss_tokens: tokens of a sequence that count in the loss, the last ones; the others are
        context, and layers skip what only they would need. None: all of them.
    """

    steps: int
    length: int
    batch_size: int
    top_k: int | None = None
    mix: tuple[tuple[str, float], ...] = (("needle", 1.0),)
    needles: tuple[int, int] = (1, 16)
    questions: int = 16
    loss_tokens: int | None = None

    def __post_init__(self):
        _check_types(self)
        _require_positive(self, "steps", "length", "batch_size", "questions")
        _require(
            self.loss_tokens is None or 1 <= self.loss_tokens <= self.length,
            f"loss_tokens={self.loss_tokens} must be from 1 to length={self.length}: use None for"
            " all tokens",
        )
        low, high = self.needles
        _require(1 <= low <= high, f"needles={self.needles} must be (fewest, most), at least 1")
        _require(
            bool(self.mix) and all(0 < weight < math.inf for _, weight in self.mix),
            f"mix={self.mix} must name a source, each with a positive, finite weight",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share a training step: sizes of the axes of their mesh (docs/scaling.md).

    One axis may be -1: it takes the devices that the others leave.

    Attributes:
      data: groups with their own sequences, each holding the whole state.
      fsdp: groups with their own sequences, each holding a part of parameters and moments.
      seq: parts of every sequence; each device holds a part of the group's parameters and moments.
      tensor: parts of the heads, and of the hidden width of feed-forward layers.
      sequence_strategy: how selected blocks in another part of the sequence are attended to:
        "ring" (keys and values travel), "dispatch" (queries do) or "auto" (fewer bytes).
    """

    data: int = 1
    fsdp: int = -1
    seq: int = 1
    tensor: int = 1
    sequence_strategy: Literal["auto", "ring", "dispatch"] = "auto"

    def __post_init__(self):
        _check_types(self)
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "seq", "tensor")}
        for name, size in sizes.items():
            _require(
                size >= 1 or size == -1,
                f"{name}={size} must be at least 1, or -1 for the devices that the others leave",
            )
        left = [name for name, size in sizes.items() if size == -1]
        _require(
            len(left) <= 1,
            f"{' and '.join(f'{name}=-1' for name in left)}: only one axis can take what the others"
            " leave, give the other a size",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, complete.

    Attributes:
      mesh: how devices share a step.
      accumulation: micro-batches of an optimizer step; divides every stage's batch_size.
      seed: decides the initial parameters and the data; from 0 to 2^32 - 1.
      init_from: directory of a model whose parameters the run begins with, to go on with longer
        sequences, say; None for random ones.
      checkpoint_every: optimizer steps between checkpoints (the last step has one, too).
      keep: checkpoints kept.
      log_every: optimizer steps between rows of the metrics.
      implementation: of the attention's primitives (mosaic_gpu, mosaic_tpu, xla, reference); None
        for what `sparsex info` names.
    """

    model: ModelConfig = ModelConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(steps=1000, length=1024, batch_size=16),)
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    accumulation: int = 1
    seed: int = 0
    init_from: str | None = None
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 20
    implementation: str | None = None

    def __post_init__(self):
        _check_types(self)
        _require_positive(self, "accumulation", "checkpoint_every", "keep", "log_every")
        check_seed(self.seed)
        _require(bool(self.stages), "stages=() must hold at least one StageConfig")
        for number, stage in enumerate(self.stages):
            _require(
                stage.batch_size % self.accumulation == 0,
                f"stages[{number}].batch_size={stage.batch_size} must be a multiple of"
                f" accumulation={self.accumulation}:"
                f" {_multiples(stage.batch_size, self.accumulation)}",
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)
