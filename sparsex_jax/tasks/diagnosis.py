"""Why a needle was missed: not selected, selected but not attended to, attended but not copied."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sparsex_jax.cache import Engine
from sparsex_jax.cache.explain import explain
from sparsex_jax.modules.transformer import Transformer
from sparsex_jax.tasks.evaluation import Diagnosis
from sparsex_jax.tasks.needle import Sample

_ATTENDED = 0.5  # share of a softmax


def first_error(sample: Sample, generated: Sequence[int]) -> tuple[int, int]:
    """Where a wrong answer goes wrong.

    Args:
      sample: the question.
      generated: tokens; -1 after the end.

    Returns:
      How many tokens are as in the right answer, and the place in the prompt of the next token that
      had to be copied, at or after the wrong one (the last one copied, where none follows).
    """
    right = 0
    for token, wanted in zip(generated, sample.answer, strict=False):
        if token != wanted:
            break
        right += 1
    copied = np.flatnonzero(sample.sources >= 0)
    following = copied[copied >= right]
    return right, int(sample.sources[following[0] if len(following) else copied[-1]])


def diagnose(
    model: Transformer, engine: Engine, sample: Sample, generated: Sequence[int]
) -> Diagnosis:
    """Why a wrong answer went wrong, by what the token before its first wrong one attends to.

    "not_selected": in no layer can a head attend to the token that had to be copied;
    "not_attended": no head gives the needle's line more than half of a softmax;
    "not_copied": one does.

    Args:
      model: that answered.
      engine: of the model, for one sequence, in the tier "device"; it reads the text again.
      sample: the question.
      generated: tokens of the answer.
    """
    right, place = first_error(sample, generated)
    tokens = np.concatenate((sample.prompt, sample.answer[:right]))
    cache = engine.prefill(tokens[None, :-1])
    spans = [span for span in sample.lines if span[0] <= place < span[1]]
    begin, end = (jnp.int32(x) for x in spans[0])
    attended = explain(
        model, cache.layers, jnp.int32(tokens[-1]), jnp.int32(place), (begin, end),
        jnp.int32(len(tokens) - 1),
    )  # fmt: skip
    if not attended.selected:
        return "not_selected"
    return "not_copied" if attended.weight > _ATTENDED else "not_attended"
