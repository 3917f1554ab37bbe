"""Training: the loop, its optimizer, data streams, checkpoints and metrics."""

from sparsex_jax.training.checkpoints import load_model, save_model
from sparsex_jax.training.errors import CheckpointError, TrainingError
from sparsex_jax.training.loop import TrainResult, export_model, train

__all__ = [
    "CheckpointError",
    "TrainResult",
    "TrainingError",
    "export_model",
    "load_model",
    "save_model",
    "train",
]
