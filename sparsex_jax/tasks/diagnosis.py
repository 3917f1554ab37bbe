"""Why a needle was missed: not selected, selected but not attended to, attended but not copied."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from sparsex_jax.cache import Cache, Engine
from sparsex_jax.cache.explain import explain
from sparsex_jax.modules.transformer import Transformer
from sparsex_jax.tasks.evaluation import Diagnosis
from sparsex_jax.tasks.needle import Sample

_ATTENDED = 0.5  # share of a softmax, times its gate


def first_error(sample: Sample, generated: Sequence[int]) -> tuple[int, int]:
    """Where a wrong answer goes wrong.

    Args:
      sample: the question.
      generated: tokens; -1 after the end.

    Returns:
      How many tokens are as in the right answer, and the place in the prompt of the next token that
      had to be copied, at or after the wrong one (the last one copied, where none follows).
    """
    right = count_right(generated, sample.answer)
    copied = np.flatnonzero(sample.sources >= 0)
    following = copied[copied >= right]
    return right, int(sample.sources[following[0] if len(following) else copied[-1]])


def count_right(generated: Iterable[int], wanted: Iterable[int]) -> int:
    """How many tokens are the wanted ones before the first that is not."""
    pairs = zip(generated, wanted, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def diagnose(
    model: Transformer, engine: Engine, sample: Sample, generated: Sequence[int]
) -> Diagnosis:
    """Why a wrong answer went wrong, by what the token before its first wrong one attends to.

    Args:
      model: that answered.
      engine: of the model, for one sequence, in the tier "device"; it reads the text again.
      sample: the question.
      generated: tokens of the answer.
    """
    right, place = first_error(sample, generated)
    cache = engine.prefill(sample.prompt[None, :-1])
    tokens = np.concatenate((sample.prompt[-1:], sample.answer[:right]))
    span = next(span for span in sample.lines if span[0] <= place < span[1])
    return why_missed(model, cache, tokens, place, span)


def why_missed(
    model: Transformer, cache: Cache, tokens: np.ndarray, place: int, span: tuple[int, int]
) -> Diagnosis:
    """Why a token was not copied, by what the one before attends to.

    "not_selected": in no layer can a head attend to the token that had to be copied;
    "not_attended": no head gives the line, or whatever it stands in, more than half of a softmax,
    times the gate of what is selected;
    "not_copied": one does.

    Args:
      model: that answered.
      cache: of the context, as in `explain`.
      tokens: int [Q], behind the context, up to the one before.
      place: of the token that had to be copied.
      span: begin and end of what it stands in.
    """
    attended = explain(model, cache, tokens, place, span)
    if not attended.selected:
        return "not_selected"
    return "not_copied" if attended.weight > _ATTENDED else "not_attended"
