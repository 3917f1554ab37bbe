"""`sparsex eval`."""

import importlib
import shlex
from typing import NamedTuple

from sparsex_jax.config import ConfigError


class What(NamedTuple):
    """Something to evaluate.

    Attributes:
      module: of `sparsex_jax.commands`; its `main(arguments, command)` does it.
      summary: a line for `sparsex eval --help`.
    """

    module: str
    summary: str


KINDS = {
    "needle": What("eval_needle", "RULER's needle tasks by free generation, with intervals"),
    "code": What("eval_code", "functions in whole C files, by name and by description"),
    "lm": What("eval_lm", "loss by position in long sequences of C files, and with less context"),
    "perplexity": What("eval_perplexity", "perplexity of models on the same held-out text"),
}


def main(arguments: list[str]) -> None:
    """Runs the command that the first argument names."""
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: sparsex eval WHAT [arguments]\n")
        for name, what in KINDS.items():
            print(f"  {name:<12}{what.summary}")
        print("\n`sparsex eval WHAT --help` tells more.")
    elif arguments and arguments[0] in KINDS:
        module = importlib.import_module(f"sparsex_jax.commands.{KINDS[arguments[0]].module}")
        module.main(arguments[1:], shlex.join(["sparsex", "eval", *arguments]))
    else:
        given = f"{arguments[0]!r}" if arguments else "nothing"
        raise ConfigError(
            f"eval must be followed by what to evaluate, not {given}: use {', '.join(KINDS)}"
        )
