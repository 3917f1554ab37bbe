r"""A language model of source text, to compare attention by perplexity.

    S=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")    # any large folder
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text-dense --model.layers lldl
    sparsex eval perplexity --haystack $S --held-out --sequences 200 \
        --checkpoints runs/text-dense/model runs/text/model

Hardware: meant for one H200. Not trained yet: all but the stages is as in configs/needle.py.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import StageConfig

MIX = (("text", 1.0),)

config = dataclasses.replace(
    load_preset(Path(__file__).with_name("needle.py")),
    # Up to 2K tokens every remote block is selected.
    stages=(
        StageConfig(steps=1500, length=2048, batch_size=32, top_k=64, mix=MIX),
        StageConfig(steps=2500, length=4096, batch_size=16, top_k=64, mix=MIX),
        StageConfig(steps=4000, length=32768, batch_size=2, top_k=64, mix=MIX),
    ),
)
