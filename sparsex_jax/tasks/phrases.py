"""The sentences of the needle tasks, as tokens.

The wording is that of RULER (Hsieh et al. 2024, arXiv:2404.06654). Everything is encoded piece
by piece, and the pieces end where the tokenizer splits anyway, so a key or a value has the same
tokens wherever it stands.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sparsex_jax.tasks import words
from sparsex_jax.tasks.tokenizer import Tokenizer

Kind = Literal["numbers", "uuids", "words"]
KINDS: tuple[Kind, ...] = ("numbers", "uuids", "words")

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def draw_value(rng: np.random.Generator, kind: Kind, split: words.KeySplit) -> str:
    """A random key or value of a kind."""
    if kind == "numbers":
        return words.draw_number(rng)
    if kind == "uuids":
        return words.draw_uuid(rng)
    return "-".join(words.draw_pair(rng, split))


def join_list(items: Sequence[str]) -> str:
    """Items as in a sentence: "a", or "a, and b", or "a, b, and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def join_tokens(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts one after another, int32 [N]; none gives an empty array."""
    return np.concatenate([np.zeros(0, np.int32), *parts])


class Phrases:
    """Sentences as tokens, int32 [N]; `kind` is the plural, "numbers" and so on."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._digits = tokenizer.encode("0123456789")

    def value(self, text: str) -> np.ndarray:
        """A key or value with a space before it."""
        fixed = self.tokenizer.fixed
        if text.isdigit():
            digits = np.frombuffer(text.encode(), np.uint8) - ord("0")
            return np.concatenate([fixed(" "), self._digits[digits]])
        adjective, hyphen, noun = text.partition("-")
        if hyphen and noun.isalpha():
            return np.concatenate([fixed(" " + adjective), fixed("-"), fixed(noun)])
        return self.tokenizer.encode(" " + text)

    def list(self, items: Sequence[str]) -> np.ndarray:
        """Items as `join_list` writes them, with a space before."""
        parts: list[np.ndarray] = []
        for number, item in enumerate(items):
            parts += [self.before(number, len(items)), self.value(item)]
        return np.concatenate(parts)

    def before(self, number: int, count: int) -> np.ndarray:
        """What stands before item `number` of a list of `count`, but for its space."""
        if number == 0:
            return join_tokens([])
        fixed = self.tokenizer.fixed
        return join_tokens([fixed(","), fixed(" and")] if number == count - 1 else [fixed(",")])

    def preface(self, kind: Kind, single: bool) -> np.ndarray:
        """The first line of the prompt; `single` when there is one question with one answer."""
        name = kind[:-1] if single else kind
        opening = f"A special magic {name} is" if single else f"Some special magic {name} are"
        return self.tokenizer.fixed(
            f"{opening} hidden within the following text. Make sure to memorize it."
            f" I will quiz you about the {name} afterwards.\n"
        )

    def needle(self, kind: Kind, key: str, value: str) -> np.ndarray:
        """The line that hides a value."""
        before, between, after = self.frame(kind)
        return np.concatenate([before, self.value(key), between, self.value(value), after])

    def frame(self, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands in such a line before the key, between the two, and behind the value."""
        fixed = self.tokenizer.fixed
        return fixed(f"One of the special magic {kind} for"), fixed(" is:"), fixed(".\n")

    def question(self, kind: Kind, keys: Sequence[str], single: bool) -> np.ndarray:
        """The question and the beginning of its answer."""
        fixed = self.tokenizer.fixed
        asked = self.list(keys)
        name = kind[:-1] if single else kind
        return np.concatenate(
            [
                fixed(f"What {'is' if single else 'are all'} the special magic {name} for"),
                asked,
                fixed(f" mentioned in the provided text? The special magic {name} for"),
                asked,
                fixed(f" mentioned in the provided text {'is' if single else 'are'}"),
            ]
        )

    def answer(self, values: Sequence[str]) -> np.ndarray:
        """What a right answer generates: the values, a full stop and the end of the line."""
        return np.concatenate([self.list(values), self.tokenizer.fixed(".\n")])


def question_text(kind: Kind, keys: Sequence[str], single: bool) -> str:
    """The question for people to read, without the beginning of the answer."""
    name = kind[:-1] if single else kind
    verb = "is" if single else "are all"
    return (
        f"What {verb} the special magic {name} for {join_list(keys)}"
        " mentioned in the provided text?"
    )
