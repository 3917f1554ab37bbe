"""Definitions and descriptions of functions in C sources, prepared by scripts/prepare_linux.py.

    python scripts/prepare_linux.py linux-source-6.1.tar.xz --out linux-6.1
    sparsex train configs/linux.py --data.code linux-6.1 --run-dir runs/linux
    sparsex eval code --data linux-6.1 --checkpoint runs/linux/model --lengths 500K 1M 8M

Hardware: meant for one H200. Not trained yet: all but the vocabulary, the window and what the texts
are made of is as in configs/needle.py, and nothing is known of the result.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig

MIX = (("definitions", 0.4), ("descriptions", 0.2), ("text", 0.3), ("retrieval", 0.1))


def about_code(stage: StageConfig) -> StageConfig:
    """The stage with these texts; where the last tokens alone count, so do all questions."""
    loss_tokens = stage.loss_tokens and stage.length * 13 // 32  # questions take up to 0.4
    return dataclasses.replace(stage, mix=MIX, loss_tokens=loss_tokens)


needle = load_preset(Path(__file__).with_name("needle.py"))
# With a window of 128 tokens a model of text was worse than a dense one (docs/log.md).
attention = dataclasses.replace(needle.model.attention, window=512)
config = dataclasses.replace(
    needle,
    model=dataclasses.replace(needle.model, vocab_size=8192, attention=attention),
    stages=tuple(map(about_code, needle.stages)),
)
