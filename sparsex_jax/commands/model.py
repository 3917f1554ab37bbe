"""Models and text for the commands that ask questions."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from sparsex_jax.commands.arguments import SHIPPED_MODEL
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import Corpus, Tokenizer
from sparsex_jax.tasks import load as load_tokenizer
from sparsex_jax.training import load_model


def load(checkpoint: Path) -> tuple[Transformer, Tokenizer, str]:
    """A model, its tokenizer, and both in words.

    Raises:
      CheckpointError: missing, damaged, or made with another tokenizer.
    """
    tokenizer = load_tokenizer()
    config, model = load_model(checkpoint, tokenizer_fingerprint=tokenizer.fingerprint)
    assert isinstance(model, Transformer)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    attention = config.attention
    description = (
        f"{name_of(checkpoint)}, {parameters / 1e6:.1f}M parameters, layers {config.layers},"
        f" window {attention.window}, {attention.top_k} blocks of {attention.block_size} a query"
    )
    return model, tokenizer, description


def name_of(checkpoint: Path) -> str:
    """A name for people and results files, the same on every machine for the shipped model."""
    return "nano (shipped)" if checkpoint == SHIPPED_MODEL else str(checkpoint)


def read_haystack(
    folder: Path | None, tokenizer: Tokenizer, count: int | None = None, seed: int = 0
) -> tuple[np.ndarray, str]:
    """Tokens of text to hide needles in, int [N], and where they come from in words.

    Args:
      folder: of text files; None takes those of the standard library kept out of training.
      tokenizer: of the model.
      count: tokens, of files in a random order; a shorter corpus repeats. None takes all.
      seed: decides that order.

    Raises:
      FileNotFoundError: the folder cannot be read.
      ValueError: it holds no text.
    """
    corpus = Corpus(folder, tokenizer=tokenizer, split="held_out" if folder is None else None)
    if folder is not None:
        description = f"{len(corpus.files)} files in {folder}"
    else:
        version = ".".join(map(str, sys.version_info[:3]))
        description = (
            f"{len(corpus.files)} source files of Python {version}'s standard library, never"
            " trained on"
        )
    tokens = corpus.all_tokens() if count is None else corpus.tokens(count, seed)
    return tokens, description
