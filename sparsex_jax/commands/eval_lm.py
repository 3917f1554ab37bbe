"""`sparsex eval lm`."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax.commands.arguments import (
    format_length,
    make_console,
    make_progress,
    parse,
    parse_length,
    parse_lengths,
)
from sparsex_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures the loss by position in long sequences of test files (docs/code.md).

    Each model reads the same sequences, with all of its past and, for comparison, with less. All
    are compared with the first model that has all of it.

    Attributes:
      data: folder made by scripts/prepare_linux.py; its test split is read.
      checkpoints: directories of models trained with the folder's tokenizer.
      length: tokens of a sequence; 4096, 32K and 2M are understood.
      contexts: most tokens that a token is predicted from, each less than the length; the whole
        sequence is always among them.
      stride: tokens from the begin of one sequence to that of the next, by default the length. With
        less they overlap, and a bucket no wider has nearly all of the text, as others have: then
        their losses differ by what came before rather than by what they are about.
      sequences: at most so many, two or more; by default all that the test split has.
      chunk: tokens that are read at a time; auto fits them to the device.
      out: results file (JSON); by default results/HARDWARE/lm.json (cpu, h200, ...).
    """

    data: Path
    checkpoints: tuple[Path, ...]
    length: str = "2M"
    contexts: tuple[str, ...] = ("4K", "32K", "128K")
    stride: str | None = None
    sequences: int | None = None
    chunk: str = "auto"
    out: Path | None = None


def main(arguments: list[str], command: str) -> None:
    """Parses the arguments and runs the command, which is quoted in what it writes."""
    lm(parse(Arguments, "eval lm", arguments), command)


def lm(arguments: Arguments, command: str) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.results import check_writable, default_path, write_results
    from sparsex_jax.benchmarks.tables.quality import position_table
    from sparsex_jax.cache import Engine
    from sparsex_jax.commands.answering import why_missing
    from sparsex_jax.commands.model import chunk_size, fitting_batch_size, load, name_of
    from sparsex_jax.tasks.code.prepared import PreparedCode
    from sparsex_jax.tasks.perplexity import cut
    from sparsex_jax.tasks.position_loss import bucket_means, losses_with, make_rows
    from sparsex_jax.training import model_crc32
    from sparsex_jax.training.checkpoints import to_json

    length, contexts, stride = _checked_lengths(arguments)
    chunk = chunk_size() if arguments.chunk == "auto" else parse_length(arguments.chunk, "chunk")
    prepared = PreparedCode(arguments.data)
    stream = prepared.split("test").tokens
    sequences = cut(stream, length, arguments.sequences, stride)
    path = arguments.out or default_path("lm")
    check_writable(path)
    console = make_console()
    config: dict[str, Any] = {
        "source": prepared.index["source"],
        "prepared": prepared.fingerprint,
        "text_tokens": len(stream),
        "models": [],
        "sequences": len(sequences),
        "stride": stride,
        "chunk": chunk,
    }
    rows: list[dict[str, Any]] = []
    first: np.ndarray | None = None
    for checkpoint, context in itertools.product(arguments.checkpoints, contexts):
        name = name_of(checkpoint)
        if context == length:
            model, _, description = load(checkpoint, prepared.tokenizer)
            console.print(f"model: {description}", markup=False, soft_wrap=True)
            described = {"model": to_json(model.config), "model_crc32": model_crc32(checkpoint)}
            config["models"].append({"checkpoint": name} | described)
        found: list[np.ndarray] = []
        missing: dict[str, Any] = {}
        title = f"{name}, context {format_length(context)}"
        with make_progress(console) as bar:
            shown = bar.add_task(title, total=len(sequences) * length)
            try:
                batch = fitting_batch_size(context, 2 * length // context)
                engine = Engine(model, context + 1, 1 if context == length else batch, chunk)
                for number, tokens in enumerate(sequences):
                    show = functools.partial(_show, bar, shown, number * length)
                    found.append(bucket_means(losses_with(engine, tokens, context, show)))
            except Exception as error:
                found, missing = [], why_missing(error)
        losses = np.array(found)
        compared, first = first, losses if first is None else first
        rows += make_rows(
            model.config.system, name, length, context, losses, compared, stride, **missing
        )
        write_results(path, "lm", command, config, rows)
        last = rows[-1]
        outcome = last["note"] if missing else f"{last['loss']:.4f} nats in the last bucket"
        console.print(f"{title}: {outcome}", markup=False, soft_wrap=True)
    console.print(position_table(rows, format_length), markup=False, soft_wrap=True)
    console.print(f"results: {path}", markup=False, soft_wrap=True)


def _show(bar, task, begin: int, tokens: int) -> None:
    bar.update(task, completed=begin + tokens)


def _checked_lengths(arguments: Arguments) -> tuple[int, list[int], int]:
    """The length, all contexts, the longest first, and the stride."""
    length = parse_length(arguments.length)
    contexts = parse_lengths(arguments.contexts) if arguments.contexts else []
    if not arguments.checkpoints:
        raise ConfigError("checkpoints must name at least one: use runs/a/model, say")
    if arguments.sequences is not None and arguments.sequences < 2:
        raise ConfigError(f"sequences={arguments.sequences} leave no interval: use at least 2")
    for context in contexts:
        if not 2 <= context < length:
            raise ConfigError(
                f"contexts={context} must lie between 2 and length={length}: use {length // 2}"
            )
    stride = length if arguments.stride is None else parse_length(arguments.stride, "stride")
    if stride > length:
        raise ConfigError(
            f"stride={stride} leaves text out between sequences: use at most length={length}"
        )
    return length, [length, *reversed(contexts)], stride
