"""What can go wrong in training, and how it is worded."""

from sparsex_jax.errors import first_line, is_disk_full

__all__ = ["CheckpointError", "TrainingError", "first_line", "is_disk_full"]


class TrainingError(ValueError):
    """A run cannot start or go on; the message names the cause and the way out."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message names path, rule and way out."""
