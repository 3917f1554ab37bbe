"""What errors of JAX and of the system mean."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full, as XLA words it."""
    return "RESOURCE_EXHAUSTED" in str(error)


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


@contextmanager
def writing(kind: type[Exception], what: str, way_out: str) -> Iterator[None]:
    """Turns errors of writing into errors of a kind, which pass as they are."""
    try:
        yield
    except kind:
        raise
    # orbax and tensorstore have no common type for what can go wrong with files.
    except Exception as error:
        reason = "no space left on the device" if is_disk_full(error) else first_line(error)
        raise kind(f"{what} could not be written: {reason}. {way_out}") from error


@contextmanager
def reading(kind: type[Exception], path: Path, way_out: str) -> Iterator[None]:
    """Turns errors of reading likewise."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(
            f"{path} cannot be read, files are missing or damaged ({first_line(error)}): {way_out}"
        ) from error
