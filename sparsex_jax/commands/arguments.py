"""What several commands share: parsing, lengths in K and M, the shipped model."""

import contextlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import rich.console
import rich.progress
import tyro

from sparsex_jax.config import ConfigError, check_seed

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "needle"


def parse_length(text: str, name: str = "length") -> int:
    """Tokens: "4096", "16K", "1M" (powers of two); `name` is the argument's, for the message.

    Raises:
      ValueError: the text is no such number.
    """
    match = re.fullmatch(r"([1-9]\d*)([KM]?)", text.upper())
    if match is None:
        raise ValueError(f"{name}={text!r} must be a number of tokens: use 4096, 16K or 1M, say")
    return int(match[1]) * UNITS[match[2]]


def format_length(tokens: int) -> str:
    """The shortest text that `parse_length` reads as `tokens`."""
    for unit in ("M", "K"):
        if tokens % UNITS[unit] == 0:
            return f"{tokens // UNITS[unit]}{unit}"
    return str(tokens)


def parse_lengths(texts: Iterable[str]) -> list[int]:
    """Several lengths, in ascending order, each once; raises ValueError where there is none."""
    lengths = sorted({parse_length(text) for text in texts})
    if not lengths:
        raise ValueError("lengths must name at least one: use 16K, say")
    return lengths


def parse[T](target: type[T], name: str, arguments: list[str], default: T | None = None) -> T:
    """Like `tyro.cli`, but what is wrong with the arguments is raised, in one line.

    Args:
      target: a dataclass; a field `seed` must be one that `check_seed` accepts.
      name: of the command.
      arguments: what follows it.
      default: the defaults; None takes those of the dataclass.

    Raises:
      ConfigError: an argument is unknown, missing or has a value that is not allowed.
    """
    errors = io.StringIO()
    program = f"sparsex {name}"
    try:
        with contextlib.redirect_stderr(errors):
            parsed: T = tyro.cli(target, prog=program, args=arguments, default=default)  # type: ignore[assignment]
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ConfigError(f"{_unboxed(errors.getvalue())} (see {program} --help)") from None
    check_seed(getattr(parsed, "seed", 0))
    return parsed


def _unboxed(text: str) -> str:
    """The first part of a message in tyro's box of lines or, without Unicode, of dashes."""
    lines = [line.strip("│|╭╮╰╯ ") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.search("[─-]{3}$", line)]
    first, last = rules[:2] if len(rules) > 1 else (-1, len(lines))
    return " ".join(lines[first + 1 : last])


class _Console(rich.console.Console):
    """One that leaves it to `sparsex_jax.cli` what happens when nobody reads the output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console() -> rich.console.Console:
    """The terminal, or a file wide enough for tables."""
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=120)


def make_progress(console: rich.console.Console) -> rich.progress.Progress:
    """A bar with the time left, which vanishes when it is done; nothing in a file."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
