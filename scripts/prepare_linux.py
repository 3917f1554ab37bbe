"""Prepares the sources of Linux, or of another C project, for `sparsex eval code` and training.

    apt-get download linux-source-6.1 && dpkg-deb -x linux-source-6.1_*.deb deb
    python scripts/prepare_linux.py deb/usr/src/linux-source-6.1.tar.xz --out linux-6.1

Needs the extra "code" (pip install '.[code]'). What the folder has is in docs/code.md.
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from sparsex_jax.commands.arguments import make_console, make_progress, parse
from sparsex_jax.errors import is_disk_full
from sparsex_jax.tasks.code.prepare import PrepareConfig, prepare


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Makes a tokenizer, token arrays, an index of functions and a split of C sources.

    Attributes:
      source: folder of the sources, or a tar file of them.
      out: folder to make.
      config: how.
    """

    source: tyro.conf.Positional[Path]
    out: Path
    config: tyro.conf.OmitArgPrefixes[PrepareConfig] = PrepareConfig()


def run(arguments: Arguments) -> None:
    """Prepares, with a bar."""
    console = make_console()
    with make_progress(console) as bar:
        shown = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total or None)

        index = prepare(arguments.source, arguments.out, arguments.config, show)
    for name, counts in index["splits"].items():
        console.print(
            f"{name}: {counts['files']:,} files, {counts['tokens']:,} tokens,"
            f" {counts['functions']:,} functions, {counts['documented']:,} of them with kernel-doc"
        )
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in index["left_out"].items())
    console.print(f"left out: {left_out}")
    console.print(f"prepared: {arguments.out}", markup=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Returns the exit status: 2 after a mistake in the input or where something fails."""
    try:
        run(parse(Arguments, "scripts/prepare_linux.py", arguments))
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except (ValueError, OSError) as error:
        if is_disk_full(error):
            return _complain("no space left on the device: use --out on another one")
        return _complain(str(error))
    return 0


def _complain(message: str, status: int = 2) -> int:
    print("prepare_linux: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
