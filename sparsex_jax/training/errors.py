"""What can go wrong in training, and how it is worded."""


class TrainingError(ValueError):
    """A run cannot start or go on; the message names the cause and the way out."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message names path, rule and way out."""
