"""`sparsex generate`."""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.arguments import SHIPPED_MODEL, make_console, make_progress, parse
from sparsex_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continues prompts, all at the same time; each as it would be continued alone.

    Attributes:
      model: directory of a model; by default the one that comes with sparsex.
      prompt: texts to continue.
      file: files with texts to continue.
      max_new_tokens: most tokens of a continuation.
      temperature: of the softmax that tokens are drawn from; 0 takes the most likely one.
      top_p: tokens are drawn from the fewest likely ones that have this probability together.
      seed: decides what is drawn; the same seed and prompt give the same text.
      stop_at_newline: ends a continuation with its line; else only the end of text does.
    """

    model: Path = SHIPPED_MODEL
    prompt: tuple[str, ...] = ()
    file: tuple[Path, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_at_newline: bool = False


def main(arguments: list[str]) -> None:
    """Parses the arguments and runs the command."""
    generate(parse(Arguments, "generate", arguments))


def generate(arguments: Arguments) -> None:
    """Runs the command."""
    from sparsex_jax.cache import Engine, Sampling
    from sparsex_jax.commands.model import chunk_size, load

    sampling = Sampling(arguments.temperature, arguments.top_p)
    texts = [*arguments.prompt, *(path.read_text(encoding="utf-8") for path in arguments.file)]
    if not texts:
        raise ConfigError("nothing to continue: give --prompt TEXT or --file PATH")
    model, tokenizer, _ = load(arguments.model)
    prompts = tokenizer.encode_batch(texts)
    for text, prompt in zip(texts, prompts, strict=True):
        if not len(prompt):
            raise ConfigError(f"prompt={text!r} has no tokens: use a text")
    longest = max(map(len, prompts))
    engine = Engine(model, longest + arguments.max_new_tokens, len(prompts), chunk_size())
    stops = tokenizer.stop_ids if arguments.stop_at_newline else (tokenizer.end_id,)
    console = make_console()
    with make_progress(console) as bar:
        task = bar.add_task("reading", total=longest)
        found = engine.generate(
            prompts, arguments.max_new_tokens, stops, sampling=sampling, seeds=arguments.seed,
            progress=lambda tokens: bar.update(task, completed=tokens),
        )  # fmt: skip
    for number, row in enumerate(found, 1):
        if len(found) > 1:
            console.print(f"--- {number}")
        kept = [token for token in row.tolist() if token >= 0]
        console.print(tokenizer.decode(kept), markup=False, soft_wrap=True)
