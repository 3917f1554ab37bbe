"""Configs refuse what cannot be trained; each message names field, value and rule."""

import math

import pytest

from sparsex_jax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

STAGE = {"steps": 1, "length": 8, "batch_size": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(window=512.0), "window=512.0 must be of type int"),
        (lambda: AttentionConfig(window="512"), "window='512' must be of type int"),
        (lambda: AttentionConfig(top_k=True), "top_k=True must be of type int"),
        (lambda: AttentionConfig(rope_base="1e4"), "rope_base='1e4' must be of type float"),
        (lambda: AttentionConfig(fusion=["sum"]), r"fusion=\['sum'\] must be one of 'sum', 'softm"),
        (lambda: ModelConfig(layers=3), "layers=3 must be of type str"),
        (lambda: ModelConfig(dtype="float16"), "dtype='float16' must be one of 'bfloat16', 'fl"),
        (lambda: ModelConfig(attention={}), "attention={} must be of type AttentionConfig"),
        (lambda: OptimizerConfig(learning_rate=True), "learning_rate=True must be of type float"),
        (lambda: OptimizerConfig(learning_rate=math.inf), "learning_rate=inf must be finite"),
        (lambda: DataConfig(haystack=b"x"), r"haystack=b'x' must be of type str \| None"),
        (lambda: StageConfig(**STAGE, top_k=2.0), r"top_k=2.0 must be of type int \| None"),
        (lambda: StageConfig(**STAGE, needles=(1, 2, 3)), r"must be of type tuple\[int, int\]"),
        (lambda: StageConfig(**STAGE, needles=[1, 2]), r"must be of type tuple\[int, int\]"),
        (lambda: StageConfig(**STAGE, loss_tokens=9), "loss_tokens=9 must be from 1 to length=8"),
        (lambda: StageConfig(**STAGE, loss_tokens=0), "loss_tokens=0 must be from 1 to length=8"),
        (lambda: StageConfig(**STAGE, mix=(("text", "1"),)), r"of type tuple\[tuple\[str, float"),
        (lambda: StageConfig(**STAGE, mix=(("text", math.nan),)), "a positive, finite weight"),
        (lambda: TrainConfig(stages=(STAGE,)), r"must be of type tuple\[.*StageConfig, \.\.\.\]"),
        (lambda: TrainConfig(seed=-1), r"seed=-1 must lie in \[0, 2\^32\): use 0"),
        (lambda: TrainConfig(seed=1 << 32), "seed=4294967296 must lie in"),
        (lambda: OptimizerConfig(beta1=1.0), r"beta1=1.0 must lie in \[0, 1\): use 0.9"),
        (lambda: OptimizerConfig(beta2=1), r"beta2=1 must lie in \[0, 1\): use 0.95"),
        (lambda: OptimizerConfig(learning_rate=0.0), "=0.0 must be positive: use a number above 0"),
        (lambda: OptimizerConfig(clip_norm=0), "clip_norm=0 must be positive: use a number above"),
        (lambda: AttentionConfig(window=0), "window=0 must be positive: use at least 1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_accepted():
    assert OptimizerConfig(learning_rate=1, beta1=0, clip_norm=2).clip_norm == 2
    StageConfig(**STAGE, top_k=0, mix=(("text", 1), ("needle", 0.5)))
    TrainConfig(stages=(StageConfig(**STAGE),), seed=(1 << 32) - 1, data=DataConfig("texts"))
