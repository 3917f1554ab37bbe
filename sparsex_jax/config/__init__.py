"""Configurations of attention, model and training."""

from sparsex_jax.config.model import (
    BASELINES,
    LAYERS,
    AttentionConfig,
    BaselineConfig,
    ModelConfig,
    baselines_in,
)
from sparsex_jax.config.rules import SEEDS, ConfigError, check_seed
from sparsex_jax.config.training import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "BASELINES",
    "LAYERS",
    "SEEDS",
    "AttentionConfig",
    "BaselineConfig",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StageConfig",
    "TrainConfig",
    "baselines_in",
    "check_seed",
]
