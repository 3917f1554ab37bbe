"""Configurations of a training: frozen, and validated once, at construction."""

import dataclasses
import math
from typing import Literal

from sparsex_jax.config.model import ModelConfig
from sparsex_jax.config.rules import check_seed, check_types, multiples, require, require_positive


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
        check_types(self)
        require_positive(self, "learning_rate", "clip_norm")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} is negative: use 0")
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction} must lie in [0, 1]: use 0.1, say",
        )
        for name, usual in (("beta1", 0.9), ("beta2", 0.95), ("momentum", 0.95)):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must lie in [0, 1): use {usual}, say")


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
        check_types(self)
        require(
            self.haystack is None or self.code is None,
            f"haystack={self.haystack!r} and code={self.code!r} both name the text: use one",
        )
        require(self.text_weight >= 0, f"text_weight={self.text_weight} is negative: use 0")
        require(self.workers >= 0, f"workers={self.workers} is negative: use 0 for a thread")


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
        check_types(self)
        require_positive(self, "steps", "length", "batch_size", "questions")
        require(
            self.loss_tokens is None or 1 <= self.loss_tokens <= self.length,
            f"loss_tokens={self.loss_tokens} must be from 1 to length={self.length}: use None for"
            " all tokens",
        )
        low, high = self.needles
        require(1 <= low <= high, f"needles={self.needles} must be (fewest, most), at least 1")
        require(
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
        check_types(self)
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "seq", "tensor")}
        for name, size in sizes.items():
            require(
                size >= 1 or size == -1,
                f"{name}={size} must be at least 1, or -1 for the devices that the others leave",
            )
        left = [name for name, size in sizes.items() if size == -1]
        require(
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
        check_types(self)
        require_positive(self, "accumulation", "checkpoint_every", "keep", "log_every")
        check_seed(self.seed)
        require(bool(self.stages), "stages=() must hold at least one StageConfig")
        for number, stage in enumerate(self.stages):
            require(
                stage.batch_size % self.accumulation == 0,
                f"stages[{number}].batch_size={stage.batch_size} must be a multiple of"
                f" accumulation={self.accumulation}:"
                f" {multiples(stage.batch_size, self.accumulation)}",
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)
