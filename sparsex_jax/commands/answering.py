"""What evaluations have in common: answers within a limit of time, their log, and why some lack."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax.benchmarks.results import check_same_run, provenance
from sparsex_jax.cache import Cache, CacheMemoryError, Engine
from sparsex_jax.errors import first_line, is_memory_full
from sparsex_jax.tasks.answer_log import AnswerLog

_STRETCH = 32  # chunks that are read between two looks at the clock
_PROOF = 5.0  # seconds of reading from which the rest is foretold


class TooSlow(Exception):
    """A sample takes, or would take, longer than allowed.

    Attributes:
      seconds: that it would take, at least.
    """

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


def why_missing(error: Exception) -> dict[str, Any]:
    """Status and note of a row without numbers; raises the error if it is not of time or memory."""
    if isinstance(error, TooSlow):
        return {"status": "too_slow", "note": str(error), "seconds": error.seconds}
    if isinstance(error, CacheMemoryError):
        return {"status": "out_of_memory", "note": str(error)}
    if is_memory_full(error):
        return {"status": "out_of_memory", "note": first_line(error)}
    raise error


def open_log(path: Path, benchmark: str, config: dict[str, Any], *, resume: bool) -> AnswerLog:
    """The log of the answers that a results file rests on, beside it.

    Args:
      path: of the results file.
      benchmark: its name.
      config: of the run, which a resumed one must have, too.
      resume: keeps what is there.

    Raises:
      ConfigError: what is there is of another run, or no log.
    """
    path = path.with_suffix(".answers.jsonl")
    run = {"benchmark": benchmark, "config": config, **provenance()}

    def check(saved: dict[str, Any]) -> None:
        check_same_run(saved, benchmark, config, path)

    return AnswerLog(path, run, check if resume else None)


def generate_within(
    engine: Engine,
    prompts: np.ndarray,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    limit: float,
) -> np.ndarray:
    """`Engine.generate`, given up as soon as reading turns out to take too long.

    Args:
      engine: with a batch of B sequences.
      prompts: int32 [B, P].
      max_new_tokens: as in `Engine.generate`.
      stop_tokens: likewise.
      limit: seconds of a sample, a B-th of the batch's.

    Returns:
      int32 [B, max_new_tokens].

    Raises:
      TooSlow: a sample would take longer.
    """
    context = (prompts.shape[1] - 1) // engine.chunk * engine.chunk
    cache = prefill_within(engine, prompts[:, :context], limit, prompts.shape[1])
    return engine.answer(cache, prompts[:, context:], max_new_tokens, stop_tokens)


def prefill_within(
    engine: Engine, tokens: np.ndarray, limit: float, length: int | None = None
) -> Cache:
    """`Engine.prefill`, given up as soon as it turns out to take too long.

    No token costs less than the ones before it, so the time of the rest is foretold from below.
    The first stretch, which compiles, does not count.

    Args:
      engine: with a batch of B sequences.
      tokens: int32 [B, P].
      limit: seconds of a sample, a B-th of the batch's.
      length: tokens of a sample; None for P.

    Raises:
      TooSlow: a sample would take longer.
    """
    context, share = tokens.shape[1], engine.batch_size
    length, stretch = length or context, _STRETCH * engine.chunk
    cache = engine.empty()
    began = time.perf_counter()
    for end in range(stretch, context + stretch, stretch):
        end = min(end, context)
        cache = engine.prefill(tokens[:, cache.length : end], cache=cache)
        if end == context:
            break
        cache.block_until_ready()
        spent = time.perf_counter() - began
        if end == stretch:
            compiled = spent
            continue
        read = end - stretch
        foretold = (spent - compiled) / read * length / share
        if foretold > limit and (spent - compiled > _PROOF or spent / share > limit):
            raise TooSlow(
                f"a sample of {length} tokens takes at least {foretold:.0f} s, more than the"
                f" {limit:g} s allowed: {read} tokens were read in {spent - compiled:.1f} s"
                f" (batches of {share})",
                foretold,
            )
    return cache
