"""Needle tasks (RULER), retrieval in code, their scoring, and training data made of them."""

from sparsex_jax.tasks.corpus import Corpus
from sparsex_jax.tasks.data import SOURCES, make_dataset, open_text, tokenizer_of
from sparsex_jax.tasks.evaluation import (
    Answer,
    Evaluation,
    decode_answer,
    evaluate,
    make_row,
    summarize,
    wilson_interval,
)
from sparsex_jax.tasks.needle import (
    TASKS,
    HiddenNeedle,
    NeedleContext,
    Sample,
    TaskSpec,
    make_haystack_with_needles,
    make_sample,
    score,
    smallest_length,
)
from sparsex_jax.tasks.tokenizer import Tokenizer, load

__all__ = [
    "SOURCES",
    "TASKS",
    "Answer",
    "Corpus",
    "Evaluation",
    "HiddenNeedle",
    "NeedleContext",
    "Sample",
    "TaskSpec",
    "Tokenizer",
    "decode_answer",
    "evaluate",
    "load",
    "make_dataset",
    "make_haystack_with_needles",
    "make_row",
    "make_sample",
    "open_text",
    "score",
    "smallest_length",
    "summarize",
    "tokenizer_of",
    "wilson_interval",
]
