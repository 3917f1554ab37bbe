"""Variable tracking: follow a chain of assignments through a text (RULER, section 3.2).

One chain of four hops in repeated noise, after one example with its answer. A statement is
written as published, without a line of its own.
"""

import dataclasses
import string

import numpy as np

from sparsex_jax.tasks.haystack import DEPTHS, insert, noise_line, noise_text
from sparsex_jax.tasks.tokenizer import Tokenizer

HOPS = 4
_LETTERS, _EXAMPLE_LETTERS = 5, 3
# Lines of noise in the example: with its statements and template close to the 500 tokens of RULER.
_EXAMPLE_LINES = 10

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A value and the variables that have it: the first directly, each other from the one before.

    Attributes:
      value: five digits.
      variables: HOPS + 1 names.
      answer: int32, the names and the end of the line.
      statements: int32 each, in the order of the text.
    """

    value: str
    variables: tuple[str, ...]
    answer: np.ndarray
    statements: tuple[np.ndarray, ...]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, tokenizer: Tokenizer, letters: int = _LETTERS
    ) -> "Chain":
        """A random chain."""
        names: list[str] = []
        while len(names) < HOPS + 1:
            name = "".join(rng.choice(list(string.ascii_uppercase), letters))
            if name not in names:
                names.append(name)
        value = str(rng.integers(10**4, 10**5))
        sources = [value, *(f"VAR {name}" for name in names)]
        statements = [
            tokenizer.encode(f" VAR {name} = {source}" + (" " if index else ""))
            for index, (name, source) in enumerate(zip(names, sources, strict=False))
        ]
        answer = tokenizer.encode(f" {' '.join(names)}\n")
        return cls(value, tuple(names), answer, tuple(statements))


def draw_chains(rng: np.random.Generator, tokenizer: Tokenizer, count: int) -> list[Chain]:
    """Random chains that share neither values nor names."""
    chains: list[Chain] = []
    taken: set[str] = set()
    while len(chains) < count:
        chain = Chain.draw(rng, tokenizer)
        if taken.isdisjoint((chain.value, *chain.variables)):
            taken.update((chain.value, *chain.variables))
            chains.append(chain)
    return chains


def question(chain: Chain) -> str:
    """The question for people to read, without the beginning of the answer."""
    return _question(chain.value)


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def ending(value: str, tokenizer: Tokenizer) -> np.ndarray:
    """The question and the beginning of its answer, int32."""
    parts = [
        "\n",
        f"{_question(value)} Answer: According to the chain(s) of variable assignment in the text"
        f" above, {HOPS + 1} variables are assigned the value {value}, they are:",
    ]
    return np.concatenate([tokenizer.encode(part) for part in parts])


def _statement_depths(rng: np.random.Generator, depth: float | None) -> list[float]:
    """Depths of the statements, in order; a `depth` that is given is the first's."""
    if depth is None:
        return sorted(float(item) for item in rng.choice(DEPTHS, HOPS + 1, replace=False))
    return [float(depth), *sorted(rng.uniform(depth, 100, HOPS))]


def _example(rng: np.random.Generator, tokenizer: Tokenizer) -> np.ndarray:
    chain = Chain.draw(rng, tokenizer, _EXAMPLE_LETTERS)
    text = noise_text(_EXAMPLE_LINES * len(noise_line(tokenizer)), tokenizer, space=True)
    context, _ = insert(text, chain.statements, _statement_depths(rng, None), tokenizer)
    template = tokenizer.fixed(TEMPLATE)
    asked = ending(chain.value, tokenizer)
    return np.concatenate([template, context, asked, chain.answer, tokenizer.fixed("\n")])


def smallest_prompt(tokenizer: Tokenizer) -> int:
    """Least tokens into which any example, chain and question fit."""

    def statements(letters: int) -> int:
        # " VAR NAME = VAR NAME ", a letter of a name being a token at most.
        return (HOPS + 1) * (len(tokenizer.encode(" VAR = VAR ")) + 2 * (letters + 1))

    template = len(tokenizer.fixed(TEMPLATE))
    asked = len(ending("12345", tokenizer))
    noise = _EXAMPLE_LINES * len(noise_line(tokenizer))
    answer = (HOPS + 1) * (_EXAMPLE_LETTERS + 1) + 2
    frames = 2 * (template + asked) + noise + answer
    return frames + statements(_EXAMPLE_LETTERS) + statements(_LETTERS)


def make_prompt(
    chain: Chain,
    length: int,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    depth: float | None = None,
) -> tuple[np.ndarray, float, list[int]]:
    """A prompt of `length` tokens, the depth of the first statement, and the places of all."""
    depths = _statement_depths(rng, depth)
    frame = [_example(rng, tokenizer), tokenizer.fixed(TEMPLATE)]
    asked = ending(chain.value, tokenizer)
    count = length - sum(map(len, [*frame, *chain.statements, asked]))
    text = noise_text(count, tokenizer, space=True)
    context, positions = insert(text, chain.statements, depths, tokenizer)
    begin = sum(map(len, frame))
    places = [begin + position for position in positions]
    return np.concatenate([*frame, context, asked]), depths[0], places


def sources(chain: Chain, positions: list[int], tokenizer: Tokenizer) -> np.ndarray:
    """Places in the prompt that the tokens of the answer are copied from; -1 for its end."""
    before = len(tokenizer.encode(" VAR"))
    sizes = [len(tokenizer.encode(f" {name}")) for name in chain.variables]
    parts = [np.arange(size) + begin + before for begin, size in zip(positions, sizes, strict=True)]
    return np.concatenate([*parts, np.full(len(chain.answer) - sum(sizes), -1)])
