"""Training: the loop, its optimizer, data streams, checkpoints and metrics."""

from sparsex_jax.training.errors import CheckpointError, TrainingError
from sparsex_jax.training.loop import TrainResult, train
from sparsex_jax.training.models import export_model, load_model, model_crc32, save_model

__all__ = [
    "CheckpointError",
    "TrainResult",
    "TrainingError",
    "export_model",
    "load_model",
    "model_crc32",
    "save_model",
    "train",
]
