"""`sparsex ask`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from sparsex_jax.commands.arguments import SHIPPED_MODEL, make_console, make_progress, parse
from sparsex_jax.config import ConfigError

if TYPE_CHECKING:
    from sparsex_jax.cache.sources import Sources

_PLACES = 3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Answers questions from a cache that `sparsex ingest` made, without reading the text again.

    Below an answer stand the files and lines that were attended to most while it was written. An
    answer is a line, but one to "define: NAME" or "describe: DESCRIPTION", which models of source
    code answer with the beginning of a function (docs/code.md).

    Attributes:
      directory: of the cache.
      question: what the model reads after the text; several are answered one by one.
      model: directory of the model that made the cache; by default the one that comes with sparsex.
      tier: where keys and values are while it is asked, "device" or "host"; by default as ingested.
      sources: places in files named below an answer; by default 3 where they are known, which is
        in the tier device.
      max_new_tokens: most tokens of an answer.
      temperature: of the softmax that tokens are drawn from; 0 takes the most likely one.
      top_p: tokens are drawn from the fewest likely ones that have this probability together.
      seed: decides what is drawn.
    """

    directory: tyro.conf.Positional[Path]
    question: tyro.conf.Positional[tuple[str, ...]]
    model: Path = SHIPPED_MODEL
    tier: Literal["device", "host", "compressed"] | None = None
    sources: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    ask(parse(Arguments, "ask", arguments))


def ask(arguments: Arguments) -> None:
    """Runs the command."""
    from sparsex_jax.cache import Engine, Sampling
    from sparsex_jax.cache.explain import attention_of_answer, why_unknown
    from sparsex_jax.cache.store import CacheDirectory, CacheError
    from sparsex_jax.cache.tiers import EXACT
    from sparsex_jax.commands.model import fingerprint, load
    from sparsex_jax.tasks import decode_answer
    from sparsex_jax.tasks.code.wording import prompt_of

    sampling = Sampling(arguments.temperature, arguments.top_p)
    if not arguments.directory.is_dir():
        raise FileNotFoundError(f"{arguments.directory} does not exist: run `sparsex ingest` first")
    model, tokenizer, _ = load(arguments.model)
    directory = CacheDirectory(arguments.directory, fingerprint(arguments.model, model, tokenizer))
    if directory.tier is None or directory.capacity is None or directory.chunk is None:
        raise CacheError(f"{arguments.directory} holds no cache: run `sparsex ingest` first")
    about_code = [prompt_of(question) for question in arguments.question]
    questions = tokenizer.encode_batch([
        text if prompt is None else prompt[0]
        for text, prompt in zip(arguments.question, about_code, strict=True)
    ])  # fmt: skip
    if not questions or not all(map(len, questions)):
        raise ConfigError("a question has no tokens: give a text in quotes")
    tier = arguments.tier or directory.tier
    sources = _sources(arguments, why_unknown(tier, model.config))
    length = directory.length
    capacity = directory.capacity
    if tier in EXACT:
        capacity = length + max(map(len, questions)) + arguments.max_new_tokens
    engine = Engine(model, capacity, chunk=directory.chunk, tier=tier)
    console = make_console()
    with make_progress(console) as bar:
        task = bar.add_task("loading", total=length)
        cache = directory.load(engine, lambda tokens: bar.update(task, completed=tokens))
    for question, prompt in zip(questions, about_code, strict=True):
        stops = tokenizer.stop_ids if prompt is None else (tokenizer.end_id,)
        found = engine.answer(
            cache, [question], arguments.max_new_tokens, stops, sampling, arguments.seed
        )
        begin = "" if prompt is None else prompt[1]
        print(begin + decode_answer(found[0], tokenizer, stops))  # rich would expand tabs
        if sources is not None:
            attention = attention_of_answer(model, cache, question, found[0])
            for place in sources.places(attention, arguments.sources or _PLACES):
                console.print(f"  {place}", markup=False, highlight=False, soft_wrap=True)
    if tier == "host":
        hits, misses = cache.block_hits
        console.print(f"{hits} of {hits + misses} selected blocks were on the device")


def _sources(arguments: Arguments, why_not: str | None) -> "Sources | None":
    """What the cache was made of; None where its places are not wanted, or by default not known."""
    from sparsex_jax.cache.sources import Sources

    wanted, folder = arguments.sources, arguments.directory
    if wanted is None:
        known = why_not is None and Sources.are_in(folder)
        return Sources.load(folder) if known else None
    if wanted < 0:
        raise ConfigError(f"sources={wanted} is negative: use 0 for none")
    if wanted and why_not is not None:
        raise ConfigError(f"sources={wanted}: {why_not}: use 0")
    return Sources.load(folder) if wanted else None
