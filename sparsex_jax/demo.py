"""Needles hidden at ten depths of a long text, and found again by generating the answers."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparsex_jax.cache import Engine
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import Tokenizer, decode_answer, make_haystack_with_needles, score

DEPTHS = tuple(round(100 * i / 9) for i in range(10))  # per cent


@dataclasses.dataclass(frozen=True)
class Finding:
    """A needle and what the model answered.

    Attributes:
      tokens: of the context, the question and the answer.
      depth: of the needle, per cent of the context.
      expected: what is hidden.
      answered: what was generated.
      seconds: from the question to the answer (the first ones include compilation).
    """

    tokens: int
    depth: float
    expected: str
    answered: str
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the answer contains what is hidden."""
        return score(self.answered, [self.expected]) == 1


@dataclasses.dataclass(frozen=True)
class Search:
    """All needles of one text.

    Attributes:
      prefill_seconds: to read the text, compilation included.
      findings: by depth.
    """

    prefill_seconds: float
    findings: tuple[Finding, ...]


def find_needles(
    model: Transformer,
    length: int,
    *,
    tokenizer: Tokenizer,
    haystack: np.ndarray,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    chunk: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Search:
    """Reads a text once and asks for each needle in it.

    Args:
      model: a Transformer with the tokenizer's vocabulary.
      length: tokens of the text, a question and its answer.
      tokenizer: of the model.
      haystack: int [N], text as tokens.
      depths: of the needles, per cent.
      seed: decides keys, values and the part of the haystack.
      chunk: tokens read at a time.
      progress: called with the number of tokens read so far.

    Raises:
      ValueError: the length cannot hold the needles.
    """
    context = make_haystack_with_needles(
        length, depths, rng=np.random.default_rng([seed, length]), tokenizer=tokenizer,
        haystack=haystack,
    )  # fmt: skip
    engine = Engine(model, capacity=length, chunk=chunk)
    began = time.perf_counter()
    cache = engine.prefill(context.tokens[None], progress)
    cache.block_until_ready()
    prefill_seconds = time.perf_counter() - began
    findings = []
    for needle in context.needles:
        began = time.perf_counter()
        new = engine.answer(cache, needle.prompt[None], context.answer_room, tokenizer.stop_ids)
        seconds = time.perf_counter() - began
        answered = decode_answer(new[0], tokenizer)
        findings.append(Finding(length, needle.depth, needle.value, answered, seconds))
    return Search(prefill_seconds, tuple(findings))


def draw_heat_map(
    findings: Sequence[Finding],
    path: str | os.PathLike,
    label: Callable[[int], str] = str,
) -> None:
    """Writes a picture of what was found, depth by length, as PNG.

    Args:
      findings: of any lengths and depths.
      path: of the picture; its folder is made.
      label: text for a length.

    Raises:
      OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({finding.tokens for finding in findings})
    depths = sorted({finding.depth for finding in findings})
    found = np.full((len(depths), len(lengths)), np.nan)
    for finding in findings:
        found[depths.index(finding.depth), lengths.index(finding.tokens)] = finding.correct
    figure = Figure(figsize=(2.5 + 1.1 * len(lengths), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(found, cmap="RdYlGn", vmin=-0.4, vmax=1.4, aspect="auto")
    for (row, column), value in np.ndenumerate(found):
        axes.text(column, row, "found" if value == 1 else "missed", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [label(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title("Needles found")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
