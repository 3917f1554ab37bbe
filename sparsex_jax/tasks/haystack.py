"""Haystacks: parts of a stream of tokens, and lines hidden in them."""

from collections.abc import Sequence

import numpy as np

from sparsex_jax.tasks.phrases import NOISE, join_tokens
from sparsex_jax.tasks.tokenizer import Tokenizer

# RULER's grid of depths, in per cent.
DEPTHS: tuple[int, ...] = tuple(int(depth) for depth in np.round(np.linspace(0, 100, 40)))

# How far back a line end is looked for before a line is cut in two.
_REACH = 256


def take_text(
    stream: np.ndarray, count: int, rng: np.random.Generator, tokenizer: Tokenizer
) -> np.ndarray:
    """`count` tokens from a random line start of a stream, int32; the stream goes round."""
    start = int(rng.integers(len(stream)))
    ahead = stream[start : start + _REACH]
    ends = np.flatnonzero(tokenizer.line_end[ahead])
    if len(ends):
        start += int(ends[0]) + 1
    if start + count <= len(stream):
        return stream[start : start + count].astype(np.int32)
    parts = [stream[start:]]
    missing = count - len(parts[0])
    parts += [stream] * (missing // len(stream))
    parts.append(stream[: missing % len(stream)])
    return np.concatenate(parts).astype(np.int32)


def noise_line(tokenizer: Tokenizer, space: bool = True) -> np.ndarray:
    """The line that noise repeats, int32; with a space before it if `space`."""
    return tokenizer.fixed((" " if space else "") + NOISE + "\n")


def noise_text(count: int, tokenizer: Tokenizer, space: bool = False) -> np.ndarray:
    """The noise line again and again, int32 [count], whole lines at the end.

    Args:
      space: a space stands before each line (as in variable tracking).
    """
    line = noise_line(tokenizer, space)
    lines = np.resize(line, (count // len(line) + 1) * len(line))
    return lines[len(lines) - count :].copy()


def insert(
    text: np.ndarray,
    lines: Sequence[np.ndarray],
    depths: Sequence[float],
    tokenizer: Tokenizer,
) -> tuple[np.ndarray, list[int]]:
    """Hides lines in a text, each at its depth or at the next line start before it.

    Where no line starts nearby, the token before the hidden line becomes a newline; so does the
    last token of the text. The length is therefore that of all parts together.

    Args:
      text: int32 [N], changed in place.
      lines: tokens of each line, ending with a newline.
      depths: per cent of the text, one a line; equal ones keep their order.

    Returns:
      int32 [N + tokens of the lines], and the index of each line's first token in it.
    """
    count = len(text)
    if count and not tokenizer.line_end[text[-1]]:
        text[-1] = tokenizer.newline_id
    starts = np.concatenate([[0], np.flatnonzero(tokenizer.line_end[text]) + 1])
    targets = np.round(np.asarray(depths) / 100 * count).astype(np.int64)
    cuts = starts[np.searchsorted(starts, targets, side="right") - 1]
    far = targets - cuts > _REACH
    cuts[far] = targets[far]
    text[cuts[far] - 1] = tokenizer.newline_id
    parts: list[np.ndarray] = []
    positions = [0] * len(lines)
    last = size = 0
    for index in np.argsort(cuts, kind="stable"):
        parts += [text[last : cuts[index]], lines[index]]
        positions[index] = size + int(cuts[index] - last)
        size = positions[index] + len(lines[index])
        last = cuts[index]
    return join_tokens([*parts, text[last:]]), positions
