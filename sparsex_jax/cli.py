"""`sparsex`: one module of `sparsex_jax.commands` per command, imported when it is asked for."""

import importlib
import os
import select
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import sparsex_jax
from sparsex_jax.errors import is_memory_full


class Command(NamedTuple):
    """A command.

    Attributes:
      module: of `sparsex_jax.commands`; its `main(arguments)` runs the command.
      summary: a line for `sparsex --help`.
    """

    module: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "hide needles in 16K and 128K tokens of source text and find them"),
    "train": Command("train", "train a model from a preset, or go on where a run stands"),
    "plan": Command("plan", "what a step or a prefill takes of chips not here: it is compiled"),
    "eval": Command("evaluate", "score a model: `sparsex eval needle`"),
    "generate": Command("generate", "continue prompts"),
    "ingest": Command("ingest", "read documents once and keep what the model made of them"),
    "ask": Command("ask", "answer a question from what was ingested"),
    "bench": Command("bench", "speed against dense attention, decoding, prefill, errors, traffic"),
    "profile": Command("profile", "the GPU's kernels that the attention spends its time in"),
    "report": Command("report", "tables and plots of what is in results/"),
    "tune": Command("tune", "find the fastest configs of the kernels on this Hopper GPU"),
    "info": Command("info", "devices, versions, and the kernel that each primitive would take"),
}
# Where a ValueError may come from that tells the user what to change; others are bugs.
OUR_PACKAGES = ("sparsex_jax", "pallas_kernels")
DEBUG = "SPARSEX_DEBUG"


def usage() -> str:
    """Help of the program itself."""
    lines = (f"  {name:<9}{command.summary}" for name, command in COMMANDS.items())
    return "\n".join((
        "usage: sparsex COMMAND [arguments]",
        "",
        "Sparse-X: trainable sparse attention for very long contexts.",
        "",
        *lines,
        "",
        "`sparsex COMMAND --help` tells units and defaults. Lengths are tokens; K and M are powers",
        f"of two (16K = 16384). {DEBUG}=1 shows where an error comes from.",
    ))  # fmt: skip


def main() -> None:
    """Runs the program and exits.

    With 0, also where a training was stopped and saved; with 1 if a benchmark's results are wrong
    or failed in part; with 2 after a mistake in the input; with 75 where another process of a
    training was lost; with 130 after an interruption that lost work; with 141, as by SIGPIPE, where
    nobody reads the output any more (`sparsex report | head`).
    """
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        # What is left in the buffer goes nowhere, instead of failing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def _output_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run(arguments: list[str]) -> int:
    """Runs a command.

    Args:
      arguments: its name and what follows.

    Returns:
      The exit status.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if name == "--version":
        print(f"sparsex {sparsex_jax.__version__}")
        return 0
    if name not in COMMANDS:
        return _complain(f"command {name!r} is not known: use {', '.join(COMMANDS)}")
    command = importlib.import_module(f"sparsex_jax.commands.{COMMANDS[name].module}")
    try:
        status: int | None = command.main(rest)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except Exception as error:
        closed = isinstance(error, BrokenPipeError) and _output_is_closed()
        if os.environ.get(DEBUG) == "1" or closed or not _is_expected(error):
            raise
        if is_memory_full(error):
            return _complain("the device's memory is full: use a smaller length or batch size")
        return _complain(str(error))
    return status or 0


def _complain(message: str, status: int = 2) -> int:
    print("sparsex: " + " ".join(message.split()), file=sys.stderr)
    return status


def _is_expected(error: Exception) -> bool:
    """Whether an error is about the user's input or machine rather than about this program."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError):
        return is_memory_full(error)
    frames = traceback.extract_tb(error.__traceback__)
    folders = [str(Path(__file__).parents[1] / name) + os.sep for name in OUR_PACKAGES]
    return frames[-1].filename.startswith(tuple(folders))


if __name__ == "__main__":
    main()
