"""Definitions and descriptions of functions in C sources, prepared by scripts/prepare_linux.py.

    python scripts/prepare_linux.py linux-source-6.1.tar.xz --out linux-6.1
    sparsex train configs/linux.py --data.code linux-6.1 --run-dir runs/linux
    sparsex eval code --data linux-6.1 --checkpoint runs/linux/model --lengths 500K 1M 8M

Hardware: meant for one H200, 13 minutes by estimate (2.5B tokens). Not trained as it stands; what
a first form of it learned, and why this one has recency and longer texts: docs/log.md.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig

MIX = (("definitions", 0.4), ("descriptions", 0.2), ("text", 0.3), ("retrieval", 0.1))


def about_code(stage: StageConfig) -> StageConfig:
    """The stage with these texts; where the last tokens alone count, so do all questions."""
    loss_tokens = stage.loss_tokens and stage.length // 4
    return dataclasses.replace(stage, mix=MIX, loss_tokens=loss_tokens)


def longer(length: int, steps: int, top_k: int) -> StageConfig:
    """A stage of one text at a time, whose questions are among the last 12K tokens.

    With up to as many blocks as are selected when the model is asked.
    """
    return dataclasses.replace(
        stages[-1], length=length, steps=steps, batch_size=1, questions=128, loss_tokens=12288,
        top_k=top_k,
    )  # fmt: skip


needle = load_preset(Path(__file__).with_name("needle.py"))
*stages, last = map(about_code, needle.stages)
stages.append(dataclasses.replace(last, steps=14000))
config = dataclasses.replace(
    needle,
    model=dataclasses.replace(
        needle.model,
        vocab_size=8192,
        # With a window of 128 tokens a model of text was worse than a dense one (docs/log.md).
        attention=dataclasses.replace(
            needle.model.attention, window=512, near_reach=32768, recency=True
        ),
    ),
    stages=(*stages, longer(1 << 17, 5000, top_k=32), longer(1 << 19, 800, top_k=64)),
)
