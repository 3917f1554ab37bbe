"""Loss by position in long sequences, with all that came before as context or with less."""

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsex_jax.cache import Engine
from sparsex_jax.tasks.evaluation import mean_interval

_FIRST = 1024  # tokens of the first bucket


def buckets(length: int) -> list[tuple[int, int]]:
    """Begins and ends of buckets of positions: to 1K, to each power of two, to the length."""
    edges = [0, min(_FIRST, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(zip(edges, edges[1:], strict=False))


def losses_with(
    engine: Engine, tokens: np.ndarray, context: int, progress: Callable[[int], None]
) -> np.ndarray:
    """Nats of each token but the first, given at most `context` tokens before it.

    With less context than tokens, these are read in windows of `context` that overlap by half, of
    which the second half counts: a token has from half of `context` on to all of it before it, or
    all there is.

    Args:
      engine: for sequences of `context` + 1 tokens.
      tokens: int [T + 1].
      context: tokens, 2 to T.
      progress: called with the number of tokens that are done.

    Returns:
      f32 [T].
    """
    count = len(tokens) - 1
    step = context // 2
    begins = [*range(0, count - context, step), count - context]
    found = np.full(count, np.nan, np.float32)
    for first in range(0, len(begins), engine.batch_size):
        batch = begins[first : first + engine.batch_size]
        # A last batch that is not full repeats its last window: one shape, one compilation.
        padded = batch + batch[-1:] * (engine.batch_size - len(batch))
        windows = np.stack([tokens[begin : begin + context + 1] for begin in padded])
        whole = progress if context == count else None
        losses = engine.losses(windows, whole)
        for begin, row in zip(batch, losses, strict=False):
            skipped = step if begin else 0
            found[begin + skipped : begin + context] = row[skipped:]
        progress(batch[-1] + context)
    return found


def bucket_means(losses: np.ndarray) -> np.ndarray:
    """Means over the buckets of positions, f64 [buckets], of losses [T]."""
    return np.array([losses[a:b].mean(dtype=np.float64) for a, b in buckets(len(losses))])


def make_rows(
    system: str,
    checkpoint: str,
    tokens: int,
    context: int,
    losses: np.ndarray,
    compared: np.ndarray | None,
    stride: int,
    status: str = "measured",
    note: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of a results file, one a bucket; numbers are None where there are no losses.

    `more` is how much more the loss is than in what is compared with, sequence by sequence.
    Intervals are of 95 %, by the normal distribution, and take sequences for independent, or, where
    they overlap in a bucket, so many of them that do not.

    Args:
      system: what attends.
      checkpoint: its name.
      tokens: of a sequence.
      context: most tokens that a token is predicted from.
      losses: nats per token, [sequences, buckets].
      compared: those of what this is compared with; None for none.
      stride: tokens from the begin of one sequence to that of the next.
      status: "out_of_memory" where there are no losses.
      note: the figure that shows the status.
    """
    rows = []
    for number, (begin, end) in enumerate(buckets(tokens)):
        row: dict[str, Any] = {
            "system": system, "checkpoint": checkpoint, "tokens": tokens, "context": context,
            "begin": begin, "end": end, "sequences": len(losses), "loss": None, "low": None,
            "high": None, "more": None, "more_low": None, "more_high": None, "status": status,
            "note": note,
        }  # fmt: skip
        if len(losses):
            overlap = max(1.0, (end - begin) / stride)
            found = mean_interval(losses[:, number], overlap)
            row |= zip(("loss", "low", "high"), found, strict=True)
            if compared is not None and len(compared):
                found = mean_interval(losses[:, number] - compared[:, number], overlap)
                row |= zip(("more", "more_low", "more_high"), found, strict=True)
        rows.append(row)
    return rows
