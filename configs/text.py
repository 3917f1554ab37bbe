r"""A language model of source text, to compare attention by perplexity.

    S=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")    # any large folder
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text-dense --model.layers lldl
    sparsex eval perplexity --haystack $S --held-out --sequences 200 \
        --checkpoints runs/text-dense/model runs/text/model

Hardware: meant for one H200. 6.5M parameters, 315M tokens; the default attention. What is not said
here is as in configs/needle.py.
"""

import dataclasses
from pathlib import Path

from sparsex_jax.commands.train import load_preset
from sparsex_jax.config import AttentionConfig, StageConfig

MIX = (("text", 1.0),)

needle = load_preset(Path(__file__).with_name("needle.py"))
config = dataclasses.replace(
    needle,
    model=dataclasses.replace(
        needle.model,
        # Kernels on Hopper GPUs pad the query heads of a KV head to 8 where blocks are selected.
        num_heads=8,
        num_kv_heads=1,
        head_dim=64,
        attention=AttentionConfig(),
    ),
    stages=(
        StageConfig(steps=800, length=2048, batch_size=32, mix=MIX),
        StageConfig(steps=1200, length=8192, batch_size=8, mix=MIX),
        StageConfig(steps=2800, length=32768, batch_size=2, mix=MIX),
    ),
)
