"""Definitions and descriptions of functions in C sources, prepared by scripts/prepare_linux.py.

    python scripts/prepare_linux.py linux-source-6.1.tar.xz --out linux-6.1
    sparsex train configs/linux.py --data.code linux-6.1 --run-dir runs/linux
    sparsex eval code --data linux-6.1 --checkpoint runs/linux/model --lengths 500K 1M 8M

Hardware: one H200 (1.2B tokens). As it stands it was not trained in full: what led to it are short
trainings of variants, docs/log.md, "what the models of Linux get wrong". As at d948367 it took 11
minutes and is the model of results/h200/lm.json.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig

TOP_K = 32  # in training as when asked; more entries are combined by XLA, which takes longer
MIX = (("definitions", 0.5), ("descriptions", 0.25), ("text", 0.15), ("retrieval", 0.1))


def about_code(stage: StageConfig, steps: int) -> StageConfig:
    """The stage with these texts; where the last tokens alone count, these hold the questions."""
    loss_tokens = stage.loss_tokens and stage.length // 4
    return dataclasses.replace(stage, steps=steps, mix=MIX, loss_tokens=loss_tokens, top_k=TOP_K)


needle = load_preset(Path(__file__).with_name("needle.py"))
stages = tuple(map(about_code, needle.stages, (1400, 500, 700, 2500, 9000)))
longest = dataclasses.replace(
    stages[-1], length=1 << 17, steps=2200, batch_size=1, questions=128, loss_tokens=12288
)
config = dataclasses.replace(
    needle,
    model=dataclasses.replace(
        needle.model,
        vocab_size=8192,
        qk_scale=True,
        # With a window of 128 tokens a model of text was worse than a dense one (docs/log.md).
        attention=dataclasses.replace(
            needle.model.attention, window=512, top_k=TOP_K, near_reach=32768, recency=True
        ),
    ),
    stages=(*stages, longest),
    optimizer=dataclasses.replace(needle.optimizer, method="muon", final_fraction=0.01),
    data=dataclasses.replace(needle.data, text_weight=0.03),
)
