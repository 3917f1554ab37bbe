"""Trains the tokenizer that ships with the package.

    python scripts/train_tokenizer.py

Byte-level BPE with 4,096 entries over the train split of the running Python's standard library
and generated needle sentences (so that the tasks' templates and words take few tokens).
A quarter of a minute on 2 CPU cores; the same Python gives the same file.
"""

import pathlib
import random
import string
import uuid
from collections.abc import Iterator

import tyro

from sparsex_jax.tasks import corpus, words
from sparsex_jax.tasks.tokenizer import DEFAULT_PATH, train_bpe


def needle_text(count: int, seed: int) -> Iterator[str]:
    """Needles, questions and answers in the words of the tasks, with training keys."""
    rng = random.Random(seed)
    for _ in range(count):
        adjective, noun = rng.choice(words.ADJECTIVES), rng.choice(words.NOUNS)
        kind = rng.choice(("number", "uuid", "word"))
        key = f"{adjective}-{noun}"
        value = {
            "number": str(rng.randrange(10**6, 10**7)),
            "uuid": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "word": f"{rng.choice(words.ADJECTIVES)}-{rng.choice(words.NOUNS)}",
        }[kind]
        plural = rng.random() < 0.3
        name = kind + "s" if plural else kind
        verb = "are" if plural else "is"
        question = "are all" if plural else "is"
        yield (
            f"{'Some' if plural else 'A'} special magic {name} {verb} hidden within the following"
            f" text. Make sure to memorize it. I will quiz you about the {name} afterwards.\n"
            f"One of the special magic {kind}s for {key} is: {value}.\n"
            f"What {question} the special magic {name} for {key} mentioned in the provided text?"
            f" The special magic {name} for {key} mentioned in the provided text {verb} {value}.\n"
            "The grass is green. The sky is blue. The sun is yellow. Here we go."
            " There and back again.\n"
        )
        first, second = ("".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(2))
        number = rng.randrange(10**4, 10**5)
        yield (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
            f"VAR {first} = {number} VAR {second} = VAR {first}\n"
            f"Question: Find all variables that are assigned the value {number} in the text above."
            " Answer: According to the chain(s) of variable assignment in the text above, 5"
            f" variables are assigned the value {number}, they are: {first} {second}\n"
        )


def texts(sentences: int, seed: int) -> Iterator[str]:
    """Everything that the tokenizer is trained on."""
    folder = corpus.default_folder()
    for name in corpus.find_files(folder, "train", suffix=".py"):
        yield from corpus.read_chunks(folder / name)
    yield from needle_text(sentences, seed)


def main(
    output: pathlib.Path = DEFAULT_PATH,
    vocab_size: int = 4096,
    sentences: int = 20_000,
    seed: int = 0,
) -> None:
    """Trains and writes the tokenizer.

    Args:
      output: file to write.
      vocab_size: entries of the vocabulary.
      sentences: needles with their questions to add to the source text.
      seed: decides these sentences.
    """
    tokenizer = train_bpe(texts(sentences, seed), vocab_size)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size} entries, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    tyro.cli(main)
