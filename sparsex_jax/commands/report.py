"""`sparsex report`."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from sparsex_jax.benchmarks.names import DIRECTIONS
from sparsex_jax.benchmarks.tables import devices, quality, speed
from sparsex_jax.benchmarks.tables.cells import place
from sparsex_jax.commands.arguments import format_length, parse
from sparsex_jax.commands.eval_needle import Task
from sparsex_jax.config import LAYERS, ConfigError

Files = list[tuple[Path, dict[str, Any]]]  # results files and what is in them


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Prints tables of all results (Markdown) and draws those of attention, needles and code.

    Attributes:
      results: folder with a folder for each hardware, which holds results files.
      out: folder for the pictures, one in it for each hardware; by default
        RESULTS/HARDWARE/plots.
      readme: a text in which what stands between a line `<!-- results:needles HARDWARE -->` and the
        next `<!-- /results -->` is replaced by the table of all systems, in the tier device.
    """

    results: Path = Path("results")
    out: Path | None = None
    readme: Path | None = None


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    report(parse(Arguments, "report", arguments))


def report(arguments: Arguments) -> None:
    """Runs the command."""
    from sparsex_jax.benchmarks.code_plots import draw_code
    from sparsex_jax.benchmarks.needle_plots import draw_needles
    from sparsex_jax.benchmarks.plots import draw_attention

    found = _read(arguments.results)
    if not found:
        raise ConfigError(
            f"results='{arguments.results}' must hold files like h200/attention.json: run `sparsex"
            " bench attention` first, or give --results DIR"
        )
    for hardware, files in found.items():
        folder = arguments.results / hardware / "plots"
        if arguments.out is not None:
            folder = arguments.out / hardware
        pictures = []
        for name in dict.fromkeys(kind.drawn for kind in KINDS.values() if kind.drawn):
            timed = [x for _, x in files if KINDS[x["benchmark"]].drawn == name]
            rows = [row for results in timed for row in results["rows"] if not row.get("target")]
            shapes = speed.shapes(rows)
            for shape in shapes:
                suffix = "" if len(shapes) == 1 else "-" + "-".join(map(str, shape))
                chosen = speed.of_shape(rows, shape)
                pictures += draw_attention(chosen, folder, format_length, name, suffix)
        needles = needle_rows(files)
        pictures += draw_needles(needles, folder, format_length) if needles else []
        code, losses = (
            [row for _, x in files if x["benchmark"] == name for row in x["rows"]]
            for name in ("code", "lm")
        )
        pictures += draw_code(code, losses, folder, format_length)
        for path, results in files:
            _print_section(hardware, path, results)
        if len({row["system"] for row in needles}) > 1:
            print(f"### {hardware}: needles, all systems\n")
            print(quality.headline_table(needles, format_length), end="\n\n")
        for path in pictures:
            print(f"![{path.stem}]({path})")
        print()
    if arguments.readme is not None:
        _write_readme(arguments.readme, found)


def needle_rows(files: Files) -> list[dict[str, Any]]:
    """Rows of all needle files by task and system; several models and tiers have longer names.

    What one model answered may stand in several files; of rows of the same the one with the most
    samples is taken.
    """
    chosen = [(path, x) for path, x in files if x["benchmark"] == "needle"]
    models = {path: (x.get("config") or {}).get("model_crc32", path.stem) for path, x in chosen}
    kinds = {(models[path], row["system"]) for path, x in chosen for row in x["rows"]}

    def name(path: Path, row: dict[str, Any]) -> str:
        details = []
        if sum(system == row["system"] for _, system in kinds) > 1:
            details.append(next(p.stem for p in models if models[p] == models[path]))
        if not _on_device(row):
            details.append(f"tier {row['tier']}")
        return row["system"] + (f" ({', '.join(details)})" if details else "")

    found: dict[tuple, dict[str, Any]] = {}
    for path, x in chosen:
        for row in x["rows"]:
            key = name(path, row), row["task"], row["tokens"], row.get("depth")
            if key not in found or found[key]["samples"] < row["samples"]:
                found[key] = row | {"system": key[0]}

    def order(row: dict[str, Any]) -> tuple[int, int]:
        kind = re.split(r"\W", row["system"])[0]
        return place(get_args(Task), row["task"]), place(tuple(LAYERS.values()), kind)

    return sorted(found.values(), key=order)


def _on_device(row: dict[str, Any]) -> bool:
    """Whether the cache was in the tier "device", which is exact."""
    return row.get("tier") in (None, "device")


def _write_readme(path: Path, found: dict[str, Files]) -> None:
    """Puts tables between their marks; raises ConfigError where there are none."""
    text = path.read_text()
    marks = list(re.finditer(r"^<!-- results:needles (\S+) -->\n", text, re.M))
    for mark in reversed(marks):
        end = text.find("<!-- /results -->", mark.end())
        rows = [row for row in needle_rows(found.get(mark[1], [])) if _on_device(row)]
        if end < 0 or not rows:
            raise ConfigError(
                f"{path}: {mark[0].strip()} needs a line <!-- /results --> below it, and results of"
                f" needles in {mark[1]}/: add what is missing"
            )
        text = text[: mark.end()] + quality.headline_table(rows, format_length) + "\n" + text[end:]
    if not marks:
        raise ConfigError(
            f"readme='{path}' must have a line <!-- results:needles HARDWARE --> and, below it,"
            " <!-- /results -->: add them"
        )
    path.write_text(text)


def _read(folder: Path) -> dict[str, Files]:
    """Results files by hardware; what is no such file is named on stderr and left out."""
    from sparsex_jax.benchmarks.results import read_results

    found: dict[str, Files] = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            results = read_results(path)
            _check(path, results)
        except ConfigError as error:
            print(f"sparsex: {error}: left out", file=sys.stderr)
        else:
            found.setdefault(path.parent.name, []).append((path, results))
    return found


def _check(path: Path, results: dict[str, Any]) -> None:
    """Raises ConfigError unless rows are of a known kind and have its fields."""
    kind = KINDS.get(results.get("benchmark", ""))
    if kind is None:
        known = ", ".join(KINDS)
        raise ConfigError(f"{path} has benchmark={results.get('benchmark')!r}, not {known}")
    for number, row in enumerate(results["rows"]):
        compiled = kind.drawn == "attention" and row.get("target")
        more = speed.COMPILED_FIELDS if compiled else ()
        missing = [field for field in (*kind.fields, *more) if field not in row]
        if missing:
            raise ConfigError(f"{path}: row {number} lacks {', '.join(missing)}")


def _print_section(hardware: str, path: Path, results: dict[str, Any]) -> None:
    """A heading, what the numbers rest on, and the tables."""
    machine = results.get("hardware") or {}
    print(f"### {hardware}: {results['benchmark']}\n")
    count = "" if machine.get("count") is None else f"{machine['count']} x "
    print(
        f"`{results.get('command')}` on {count}{machine.get('kind')}, driver"
        f" {machine.get('driver')}, commit {results.get('commit')}, {results.get('date')}"
        f" (`{path}`)\n"
    )
    KINDS[results["benchmark"]].show(results)


def _show_table(table: Callable[..., str], intro: str = "", label: Callable = format_length):
    """Shows results by a table of `tables`."""

    def show(results: dict[str, Any]) -> None:
        if intro:
            model = (results.get("config") or {}).get("model_name")
            print(intro.format(model=model) + "\n")
        print(table(results["rows"], label), end="\n\n")

    return show


def _show_attention(results: dict[str, Any]) -> None:
    _print_attention([row for row in results["rows"] if not row.get("target")])
    compiled = [row for row in results["rows"] if row.get("target")]
    _print_compiled(compiled, (results.get("config") or {}).get("method"))


def _show_decode(results: dict[str, Any]) -> None:
    print("Milliseconds of one decoding step of one layer over a full cache.\n")
    _print_attention(results["rows"])


def _print_compiled(rows: list[dict[str, Any]], method: str | None) -> None:
    if rows:
        print(f"Compiled, not run. Memory is a chip's. Times are {method or 'not measured'}\n")
    for shape in speed.shapes(rows):
        print("{} query heads, {} KV heads, head dim {}:\n".format(*shape))
        print(speed.compiled_table(speed.of_shape(rows, shape), format_length), end="\n\n")


def _print_attention(rows: list[dict[str, Any]]) -> None:
    for shape in speed.shapes(rows):
        chosen = speed.of_shape(rows, shape)
        print("{} query heads, {} KV heads, head dim {}:\n".format(*shape))
        if any(row["part"] == "op" for row in chosen):
            print(speed.op_table(chosen, format_length), end="\n\n")
        for direction in DIRECTIONS:
            table = speed.parts_table(chosen, direction, format_length)
            if table:
                print(f"Parts, {direction.replace('_', ' and ')}, milliseconds:\n\n{table}\n")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Results files of one benchmark.

    Attributes:
      fields: that each row has.
      show: prints the tables of a file.
      drawn: what pictures of them are called, None without any; rows of targets that are drawn as
        "attention" have `speed.COMPILED_FIELDS`.
    """

    fields: tuple[str, ...]
    show: Callable[[dict[str, Any]], None]
    drawn: str | None = None


KINDS = {
    "attention": Kind(speed.ATTENTION_FIELDS, _show_attention, drawn="attention"),
    "attention_peers": Kind(speed.ATTENTION_FIELDS, _show_attention, drawn="attention"),
    "needle": Kind(quality.ACCURACY_FIELDS, _show_table(quality.accuracy_table)),
    "code": Kind(
        quality.ACCURACY_FIELDS,
        _show_table(
            quality.accuracy_table, "Functions found in whole C files, by name and by description."
        ),
    ),
    "ablations": Kind(
        quality.ABLATION_FIELDS,
        _show_table(
            quality.ablations_table,
            "Accuracy in per cent of variants of one model: means over seeds, and their range.",
        ),
    ),
    "perplexity": Kind(
        quality.PERPLEXITY_FIELDS,
        _show_table(
            quality.perplexity_table,
            "On the same held-out text; behind the semicolon, how much more than the first line's.",
        ),
    ),
    "lm": Kind(
        quality.LM_FIELDS,
        _show_table(
            quality.position_table,
            "Nats per token by position in long sequences; behind the semicolon, how many more than"
            " the first line's.",
        ),
    ),
    "numerics": Kind(
        quality.NUMERICS_FIELDS,
        _show_table(
            quality.numerics_table,
            "Relative errors: of the worst query's output, and of the worst lse.",
        ),
    ),
    "plan": Kind(
        devices.PLAN_FIELDS,
        _show_table(devices.plan_table, "Compiled and not run; GiB on each chip."),
    ),
    "decode": Kind(speed.ATTENTION_FIELDS, _show_decode, drawn="decode"),
    "prefill": Kind(
        speed.PREFILL_FIELDS,
        _show_table(speed.prefill_table, "A context read in chunks by {model}."),
    ),
    "losses": Kind(
        quality.LOSSES_FIELDS,
        _show_table(
            quality.losses_table, "The same training, by implementation of the primitives.", str
        ),
    ),
    "scaling": Kind(
        devices.SCALING_FIELDS,
        _show_table(
            devices.scaling_table,
            "As many tokens on each of ever more chips: modelled, not measured. Efficiency is the"
            " time with the fewest chips over that with so many, arithmetic and links one after the"
            " other, or one beside the other.",
        ),
    ),
    "traffic": Kind(
        devices.TRAFFIC_FIELDS,
        _show_table(
            devices.traffic_table,
            "One layer's attention, forward and backward, compiled and not run; MiB that a chip"
            " sends.",
        ),
    ),
}
