"""Perplexity of models on the same sequences of text."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparsex_jax.modules.transformer import Transformer
from sparsex_jax.tasks.evaluation import mean_interval


def cut(
    stream: np.ndarray, length: int, most: int | None = None, stride: int | None = None
) -> np.ndarray:
    """Sequences one after another, int32 [sequences, length + 1].

    All that fit, each of which begins with the last token of the one before, or fewer of them,
    evenly spread over the text.

    Args:
      stream: int [N], text as tokens.
      length: tokens read, and as many predicted, of each.
      most: sequences at most; None for all that fit.
      stride: tokens from the begin of one to that of the next; None for `length`.

    Raises:
      ValueError: fewer than two fit, which leaves no interval.
    """
    stride = length if stride is None else stride
    count = (len(stream) - 1 - length) // stride + 1
    if count < 2:
        raise ValueError(
            f"the text has {len(stream)} tokens: lengths must be at most"
            f" {max((len(stream) - 1) // 2, len(stream) - 1 - stride)} for two sequences, not"
            f" {length}, or use more text"
        )
    wanted = count if most is None else min(count, most)
    number = np.arange(wanted) * count // wanted
    place = number[:, None] * stride + np.arange(length + 1)
    return stream[place].astype(np.int32)


@nnx.jit
def _loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    weights = jax.numpy.ones((1, tokens.shape[1] - 1), jax.numpy.float32)
    return model.nll(tokens[:, :-1], tokens[:, 1:], weights)


def sequence_losses(model: Transformer, sequences: np.ndarray) -> Iterator[float]:
    """Nats per token of each of the sequences, int32 [sequences, T + 1], every token counting."""
    for tokens in sequences:
        yield float(_loss(model, tokens[None])) / (len(tokens) - 1)


def make_row(
    system: str,
    checkpoint: str,
    tokens: int,
    losses: np.ndarray,
    compared: np.ndarray | None,
    status: str = "measured",
    note: str | None = None,
) -> dict[str, Any]:
    """A row of a results file; its numbers are None where there are no losses.

    The intervals, of 95 %, are those of the mean of independent sequences, by the normal
    distribution; the ratio's is that of differences, for both models read the same sequences.

    Args:
      system: what attends.
      checkpoint: its name.
      tokens: of a sequence.
      losses: nats per token of each sequence, [sequences].
      compared: those of the model that this one is compared with; None for none.
      status: "out_of_memory" where there are no losses.
      note: the figure that shows the status.
    """
    names = ("loss", "perplexity", "low", "high", "ratio", "ratio_low", "ratio_high")
    row: dict[str, Any] = {
        "system": system, "checkpoint": checkpoint, "tokens": tokens, "sequences": len(losses),
        **dict.fromkeys(names), "status": status, "note": note,
    }  # fmt: skip
    if len(losses):
        row["loss"] = float(np.mean(losses))
        row |= dict(zip(("perplexity", "low", "high"), _exponentials(losses), strict=True))
        if compared is not None and len(compared):
            ratios = _exponentials(losses - compared)
            row |= dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
    return row


def _exponentials(losses: np.ndarray) -> tuple[float, ...]:
    """exp of the mean, and of the ends of its interval."""
    return tuple(map(math.exp, mean_interval(losses)))
