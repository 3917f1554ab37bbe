"""What can go wrong in training, and how it is worded."""

import errno


class TrainingError(ValueError):
    """A run cannot start or go on; the message names the cause and the way out."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used; the message names path, rule and way out."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that the device is full."""
    while error is not None:
        # tensorstore reports the condition in words, inside errors of other types.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error, short enough to be quoted in another message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= limit else lines[0][:limit] + "..."
