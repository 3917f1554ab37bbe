"""Models and text for the commands that ask questions."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from sparsex_jax.commands.arguments import SHIPPED_MODEL
from sparsex_jax.config import ModelConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.tasks import Corpus, Tokenizer
from sparsex_jax.tasks import load as load_tokenizer
from sparsex_jax.training import CheckpointError, load_model, model_crc32
from sparsex_jax.training.checkpoints import to_json
from sparsex_jax.training.models import own_tokenizer

LARGEST_BATCH = 16


def on_cpu() -> bool:
    """Whether JAX computes on the CPU, where bfloat16 is slower than float32."""
    return jax.default_backend() == "cpu"


def chunk_size() -> int:
    """Tokens that a prefill reads at a time: what keeps this device busy."""
    return 2048 if on_cpu() else 4096


def fitting_batch_size(length: int, samples: int) -> int:
    """Prompts of a length that are read at the same time, if nobody says how many."""
    tokens = 1 << (16 if on_cpu() else 19)
    return max(1, min(LARGEST_BATCH, samples, tokens // length))


def load(
    checkpoint: Path,
    tokenizer: Tokenizer | None = None,
    attention_changes: Mapping[str, Any] | None = None,
) -> tuple[Transformer, Tokenizer, str]:
    """A model in the type that suits the device, its tokenizer, and the model in words.

    Args:
      checkpoint: directory of the model.
      tokenizer: that it must have been trained with; None means its own or, if it has none, the one
        in the package.
      attention_changes: as in `load_model`.

    Raises:
      CheckpointError: missing, damaged, or made with another tokenizer.
      ConfigError: as `load_model`.
    """
    if checkpoint == SHIPPED_MODEL and not checkpoint.exists():
        raise CheckpointError(
            "this copy of sparsex comes without its model: give --checkpoint DIR, made by"
            " `sparsex train configs/needle.py`"
        )
    tokenizer = tokenizer or load_tokenizer(own_tokenizer(checkpoint))
    dtype: Literal["bfloat16", "float32"] = "float32" if on_cpu() else "bfloat16"
    config, model = load_model(
        checkpoint, dtype, compute_dtype=dtype, tokenizer_fingerprint=tokenizer.fingerprint,
        attention_changes=attention_changes,
    )  # fmt: skip
    assert isinstance(model, Transformer)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    attention = config.attention
    attends = ""
    if "s" in config.layers:
        attends = f"{attention.top_k} blocks of {attention.block_size} a query, "
    description = (
        f"{name_of(checkpoint)}, {parameters / 1e6:.1f}M parameters, layers {config.layers},"
        f" window {attention.window}, {attends}{config.dtype} on {jax.default_backend()}"
    )
    return model, tokenizer, description


def name_of(checkpoint: Path) -> str:
    """A name for people and results files, the same on every machine for the shipped model."""
    return "needle (shipped)" if checkpoint == SHIPPED_MODEL else str(checkpoint)


def fingerprint(checkpoint: Path, model: Transformer, tokenizer: Tokenizer) -> dict[str, object]:
    """What decides the numbers in a cache, by names that a message can use."""
    return {
        "model": to_json(model.config),
        "weights": model_crc32(checkpoint),
        "tokenizer": tokenizer.fingerprint,
    }


def describe_run(
    checkpoint: Path, model: ModelConfig, haystack: str, seed: int
) -> dict[str, object]:
    """What decides the outcome of a command that asks questions, for its results file."""
    return {
        "checkpoint": name_of(checkpoint),
        "model": to_json(model),
        "haystack": haystack,
        "chunk": chunk_size(),
        "seed": seed,
    }


def open_haystack(
    folder: Path | None, tokenizer: Tokenizer, *, held_out: bool = False
) -> tuple[Corpus, str]:
    """Text to hide needles in, which is not read yet, and where it comes from in words.

    Args:
      folder: of text files; None takes the held-out split of the standard library's sources.
      tokenizer: of the model.
      held_out: of the folder, too, only the files that training on it leaves out.

    Raises:
      FileNotFoundError: the folder cannot be read.
      ValueError: it holds no file.
    """
    held_out = held_out or folder is None
    corpus = Corpus(folder, tokenizer=tokenizer, split="held_out" if held_out else None)
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"source files of Python {version}'s standard library"
    if folder is not None:
        name = f"files in {folder}"
    return corpus, f"{len(corpus.files)} {name}{', the held-out split' if held_out else ''}"
