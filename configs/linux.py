"""A model of C sources, prepared by scripts/prepare_linux.py: their text, and questions about it.

    python scripts/prepare_linux.py linux-source-6.1.tar.xz --out linux-6.1
    sparsex train configs/linux.py --data.code linux-6.1 --run-dir runs/linux
    sparsex eval lm --data linux-6.1 --checkpoints runs/linux/model --length 2M

configs/linux_questions.py goes on from it with questions. What led to both: docs/log.md, "hashes of
n-grams" and "what the models of Linux get wrong".

Hardware: one H200.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig

TOP_K = 32  # in training as when asked; more entries are combined by XLA, which takes longer
MIX = (("text", 0.4), ("definitions", 0.3), ("descriptions", 0.2), ("retrieval", 0.1))


def about_code(stage: StageConfig, steps: int) -> StageConfig:
    """The stage with these texts; where the last tokens alone count, these hold the questions."""
    loss_tokens = stage.loss_tokens and stage.length // 4
    return dataclasses.replace(stage, steps=steps, mix=MIX, loss_tokens=loss_tokens, top_k=TOP_K)


needle = load_preset(Path(__file__).with_name("needle.py"))
stages = tuple(map(about_code, needle.stages, (1400, 500, 700, 1500, 4500)))
longest = dataclasses.replace(
    stages[-1], length=1 << 17, steps=1500, batch_size=1, questions=128, loss_tokens=12288
)
config = dataclasses.replace(
    needle,
    model=dataclasses.replace(
        needle.model,
        vocab_size=8192,
        qk_scale=True,
        ngrams=(4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64),
        # With a window of 128 tokens a model of text was worse than a dense one (docs/log.md).
        attention=dataclasses.replace(
            needle.model.attention, window=512, top_k=TOP_K, near_reach=32768, recency=True
        ),
    ),
    stages=(*stages, longest),
    optimizer=dataclasses.replace(needle.optimizer, method="muon", final_fraction=0.01),
)
