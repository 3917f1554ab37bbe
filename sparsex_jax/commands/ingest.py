"""`sparsex ingest`."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    make_console,
    make_progress,
    parse,
    parse_length,
)
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.tasks import Tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Reads text files once and keeps what the model made of them, for `sparsex ask`.

    The same command goes on where a killed one stands. Files are read in the order given, those of
    a folder in the order of their paths; what is no UTF-8 text in a folder is left out.

    Attributes:
      paths: files and folders.
      out: directory for the cache.
      model: directory of a model; by default the one that comes with sparsex.
      tier: where keys and values of old blocks are kept: in the device's memory, in the host's, or
        compressed (which forgets; docs/cache.md).
      chunk: tokens read at a time; auto takes what suits the device.
      save_every: tokens between saves: 4096, 16K and 1M are understood.
      room: tokens left for a question and its answer.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    model: Path = SHIPPED_MODEL
    tier: Literal["device", "host", "compressed"] = "device"
    chunk: str = "auto"
    save_every: str = "1M"
    room: str = "4K"


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    ingest(parse(Arguments, "ingest", arguments))


def ingest(arguments: Arguments) -> None:
    """Runs the command."""
    from sparsex_jax.cache import Engine
    from sparsex_jax.cache.sources import Sources
    from sparsex_jax.cache.store import CacheDirectory
    from sparsex_jax.cache.tiers import EXACT
    from sparsex_jax.commands.model import chunk_size, fingerprint, load

    step = parse_length(arguments.save_every, "save_every")
    room = parse_length(arguments.room, "room")
    chunk = chunk_size() if arguments.chunk == "auto" else parse_length(arguments.chunk, "chunk")
    console = make_console()
    model, tokenizer, description = load(arguments.model)
    CacheDirectory.check_model(model.config)
    console.print(f"model: {description}", markup=False, soft_wrap=True)
    directory = CacheDirectory(arguments.out, fingerprint(arguments.model, model, tokenizer))
    if directory.exists and directory.tier != arguments.tier:
        raise ConfigError(
            f"{arguments.out} has tier={directory.tier!r}, not {arguments.tier!r}: use that, or a"
            " new directory"
        )
    files = read_texts(arguments.paths, tokenizer)
    tokens = np.concatenate([part for _, part in files])
    directory.check_tokens(tokens)
    capacity, chunk = len(tokens) + room, directory.chunk or chunk
    if arguments.tier not in EXACT:
        capacity = directory.capacity or capacity
    engine = Engine(model, capacity, chunk=chunk, tier=arguments.tier)
    sources = Sources.of(files, tokenizer.newlines)
    if directory.exists:  # before more tokens are, so that none is without its line
        sources.save(arguments.out)
    with make_progress(console) as bar:
        task = bar.add_task("reading", total=len(tokens))
        done = directory.length
        bar.update(task, completed=done)
        if done:
            console.print(f"{done} of {len(tokens)} tokens are there already")
        cache = directory.load(engine) if 0 < done < len(tokens) else engine.empty()
        for begin in range(done, len(tokens), step):
            part = tokens[None, begin : begin + step]
            show = functools.partial(_show, bar, task, begin)
            cache = engine.prefill(part, show, cache)
            directory.save(engine, cache, tokens)
            if begin == 0:
                sources.save(arguments.out)
    console.print(
        f'{len(tokens)} tokens in {arguments.out}: sparsex ask {arguments.out} "..."',
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _show(bar, task, begin: int, tokens: int) -> None:
    bar.update(task, completed=begin + tokens)


def read_texts(paths: tuple[Path, ...], tokenizer: "Tokenizer") -> list[tuple[str, np.ndarray]]:
    """Paths and tokens, int32 [n], of files and of the text files of folders.

    Raises:
      FileNotFoundError: a path does not exist.
      ConfigError: a file is no UTF-8 text, or there is none.
    """
    from sparsex_jax.tasks.corpus import find_files, read_chunks

    found: list[tuple[str, np.ndarray]] = []
    for path in paths:
        if path.is_dir():
            files = [path / name for name in find_files(path)]
        elif path.is_file():
            files = [path]
        else:
            raise FileNotFoundError(f"{path} does not exist: give a file or a folder")
        for file in files:
            chunks = list(read_chunks(file))
            if not chunks and file is path:
                raise ConfigError(f"{path} is no UTF-8 text, or empty: leave it out")
            tokens = np.concatenate([np.zeros(0, np.int32), *tokenizer.encode_batch(chunks)])
            if len(tokens):
                found.append((str(file), tokens))
    if not found:
        raise ConfigError("the paths hold no text: give a file or a folder with some")
    return found
