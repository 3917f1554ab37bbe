"""`sparsex eval perplexity`."""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    format_length,
    make_console,
    make_progress,
    parse,
    parse_lengths,
)
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.tasks import Tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures the perplexity of models on the same text, every token of each sequence counting.

    Attributes:
      checkpoints: directories of models; the others are compared with the first. By default the
        one that comes with sparsex.
      lengths: tokens of a sequence; 4096, 4K and 1M are understood.
      sequences: at most so many, two or more, evenly spread over the text; by default all that it
        has.
      data: folder made by scripts/prepare_linux.py: its test split is read, by models that were
        trained with its tokenizer.
      haystack: folder of text files; by default, without `data`, the held-out split of the sources
        of Python's standard library.
      held_out: of the haystack takes only the files, one in ten, that training on it
        (--data.haystack) leaves out.
      out: results file (JSON); by default results/HARDWARE/perplexity.json (cpu, h200, ...).
    """

    checkpoints: tuple[Path, ...] = (SHIPPED_MODEL,)
    lengths: tuple[str, ...] = ("4K", "32K")
    sequences: int | None = None
    data: Path | None = None
    haystack: Path | None = None
    held_out: bool = False
    out: Path | None = None


def main(arguments: list[str], command: str) -> None:
    """Parses the arguments and runs the command, which is quoted in what it writes."""
    perplexity(parse(Arguments, "eval perplexity", arguments), command)


def perplexity(arguments: Arguments, command: str) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.results import check_writable, default_path, write_results
    from sparsex_jax.benchmarks.tables.quality import perplexity_table
    from sparsex_jax.commands.answering import why_missing
    from sparsex_jax.commands.model import load, name_of
    from sparsex_jax.tasks.perplexity import cut, make_row, sequence_losses
    from sparsex_jax.training import model_crc32
    from sparsex_jax.training.checkpoints import to_json

    lengths = parse_lengths(arguments.lengths)
    if arguments.data is not None and (arguments.haystack is not None or arguments.held_out):
        raise ConfigError("data and haystack both name the text: use one of them")
    if not arguments.checkpoints:
        raise ConfigError("checkpoints must name at least one: use runs/a/model, say")
    if arguments.sequences is not None and arguments.sequences < 2:
        raise ConfigError(f"sequences={arguments.sequences} leave no interval: use at least 2")
    path = arguments.out or default_path("perplexity")
    check_writable(path)
    console = make_console()
    stream, tokenizer, description = _open_text(arguments)
    texts = {length: cut(stream, length, arguments.sequences) for length in lengths}
    console.print(f"text: {description}", markup=False, soft_wrap=True)
    config: dict[str, Any] = {
        "text": description,
        "text_tokens": len(stream),
        "models": [],
        "sequences": arguments.sequences,
    }
    rows: list[dict[str, Any]] = []
    first: dict[int, np.ndarray] = {}
    for checkpoint, length in itertools.product(arguments.checkpoints, lengths):
        name = name_of(checkpoint)
        if length == lengths[0]:
            model, _, description = load(checkpoint, tokenizer)
            console.print(f"model: {description}", markup=False, soft_wrap=True)
            described = {"model": to_json(model.config), "model_crc32": model_crc32(checkpoint)}
            config["models"].append({"checkpoint": name} | described)
        found: list[float] = []
        missing: dict[str, Any] = {}
        with make_progress(console) as bar:
            shown = bar.add_task(f"{name}, {format_length(length)}", total=len(texts[length]))
            try:
                for loss in sequence_losses(model, texts[length]):
                    found.append(loss)
                    bar.advance(shown)
            except Exception as error:
                found, missing = [], why_missing(error)
        losses = np.array(found)
        compared = first.get(length) if checkpoint != arguments.checkpoints[0] else None
        first.setdefault(length, losses)
        rows.append(make_row(model.config.system, name, length, losses, compared, **missing))
        write_results(path, "perplexity", command, config, rows)
    console.print(perplexity_table(rows, format_length), markup=False, soft_wrap=True)
    console.print(f"results: {path}", markup=False, soft_wrap=True)


def _open_text(arguments: Arguments) -> tuple[np.ndarray, "Tokenizer", str]:
    """The text as tokens, the tokenizer, and where the text comes from, in words."""
    from sparsex_jax.commands.model import open_haystack
    from sparsex_jax.tasks import load
    from sparsex_jax.tasks.code.prepared import PreparedCode

    if arguments.data is None:
        tokenizer = load()
        corpus, description = open_haystack(
            arguments.haystack, tokenizer, held_out=arguments.held_out
        )
        return corpus.all_tokens(), tokenizer, description
    prepared = PreparedCode(arguments.data)
    description = f"{prepared.index['source']}, test split, prepared {prepared.fingerprint}"
    return prepared.split("test").tokens, prepared.tokenizer, description
