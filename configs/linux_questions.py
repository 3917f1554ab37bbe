"""The model of configs/linux.py goes on with questions about functions, most by their names.

    sparsex train configs/linux_questions.py --data.code linux-6.1 --run-dir runs/linux_questions
    sparsex eval code --data linux-6.1 --checkpoint runs/linux_questions/model --lengths 500K 1M 8M

An answer has a loss of a few thousandths of a nat a token, which hardly moves a model that learns
text, of a nat or more, at the same time (docs/log.md, "hashes of n-grams").

Hardware: one H200.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset

MIX = (("definitions", 0.75), ("descriptions", 0.15), ("text", 0.05), ("retrieval", 0.05))

linux = load_preset(Path(__file__).with_name("linux.py"))
config = dataclasses.replace(
    linux,
    stages=tuple(dataclasses.replace(stage, steps=4500, mix=MIX) for stage in linux.stages[-2:]),
    optimizer=dataclasses.replace(linux.optimizer, learning_rate=1e-3, warmup_steps=100),
    data=dataclasses.replace(linux.data, text_weight=0.003),
    init_from="runs/linux/model",
)
