"""`sparsex demo`."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich.markup
import rich.table

from sparsex_jax.commands.arguments import (
    SHIPPED_MODEL,
    format_length,
    make_console,
    make_progress,
    parse,
    parse_lengths,
)

if TYPE_CHECKING:
    from sparsex_jax.demo import Finding

HEAT_MAP, FINDINGS = "needles.png", "demo.json"
LONGEST_ANSWER = 40  # characters in the table; a uuid has 36


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Hides needles at ten depths of real source text and finds them by generating the answers.

    Attributes:
      length: tokens of each text; 4096, 16K and 1M are understood.
      haystack: folder of text files to hide the needles in; by default the held-out split of the
        sources of Python's standard library.
      checkpoint: directory of a model; by default the one that comes with sparsex.
      out: directory for the heat map (needles.png) and the answers (demo.json), made if missing.
      seed: decides keys, values and the part of the text.
    """

    length: tuple[str, ...] = ("16K", "128K")
    haystack: Path | None = None
    checkpoint: Path = SHIPPED_MODEL
    out: Path = Path("sparsex-demo")
    seed: int = 0


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    command = shlex.join(["sparsex", "demo", *arguments])
    demo(parse(Arguments, "demo", arguments), command)


def demo(arguments: Arguments, command: str) -> None:
    """Runs the command, which is quoted in what it writes."""
    from sparsex_jax.benchmarks.results import write_results
    from sparsex_jax.commands.model import chunk_size, describe_run, load, open_haystack
    from sparsex_jax.demo import draw_heat_map, find_needles
    from sparsex_jax.training import model_crc32

    console = make_console()
    lengths = parse_lengths(arguments.length)
    model, tokenizer, description = load(arguments.checkpoint)
    crc32 = model_crc32(arguments.checkpoint)
    console.print(f"model: {description}", markup=False, soft_wrap=True)
    corpus, description = open_haystack(arguments.haystack, tokenizer)
    console.print(f"haystack: {description}", markup=False, soft_wrap=True)
    haystack = corpus.tokens(max(lengths), arguments.seed)
    # Made before the work, so that a wrong name does not spoil it.
    arguments.out.mkdir(parents=True, exist_ok=True)

    findings: list[Finding] = []
    for length in lengths:
        with make_progress(console) as bar:
            task = bar.add_task(f"reading {format_length(length)}", total=length)

            def show(tokens: int, bar=bar, task=task) -> None:
                bar.update(task, completed=tokens)

            search = find_needles(
                model, length, tokenizer=tokenizer, haystack=haystack, seed=arguments.seed,
                chunk=chunk_size(), progress=show,
            )  # fmt: skip
        console.print(
            f"{format_length(length)} tokens read in {search.prefill_seconds:.1f} s,"
            f" {sum(finding.correct for finding in search.findings)} of"
            f" {len(search.findings)} needles found"
        )
        findings += search.findings
    console.print(_table(findings))
    path = arguments.out / HEAT_MAP
    draw_heat_map(findings, path, format_length)
    config = describe_run(arguments.checkpoint, model.config, description, arguments.seed)
    rows = [{**dataclasses.asdict(each), "correct": each.correct} for each in findings]
    write_results(arguments.out / FINDINGS, "demo", command, config, rows, crc32)
    console.print(
        f"heat map: {path}\nanswers: {arguments.out / FINDINGS}", markup=False, soft_wrap=True
    )


def _table(findings: Sequence["Finding"]) -> rich.table.Table:
    table = rich.table.Table(caption="The first answer at each length includes compilation.")
    for name in ("length", "depth", "expected", "answered", "ok", "seconds"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(
            format_length(finding.tokens),
            f"{finding.depth:g} %",
            finding.expected,
            rich.markup.escape(_shortened(finding.answered)),
            "[green]yes[/]" if finding.correct else "[red]no[/]",
            f"{finding.seconds:.2f}",
        )
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[: LONGEST_ANSWER - 1] + "…"
