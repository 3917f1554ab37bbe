r"""A language model of source text, to compare attention by perplexity.

    S=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")    # any large folder
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text-dense --model.layers lldl
    sparsex eval perplexity --haystack $S --held-out --sequences 200 \
        --checkpoints runs/text-dense/model runs/text/model

Hardware: meant for one H200. Not trained yet: model and rates are those of configs/needle.py.
"""

from sparsex_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

MIX = (("text", 1.0),)

config = TrainConfig(
    model=ModelConfig(
        vocab_size=4096,
        model_dim=320,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=960,
        layers="llsl",
        attention=AttentionConfig(window=128, block_size=32, top_k=64, score_dim=128),
        selection_loss=0.1,
    ),
    # Up to 2K tokens every remote block is selected.
    stages=(
        StageConfig(steps=1500, length=2048, batch_size=32, top_k=64, mix=MIX),
        StageConfig(steps=2500, length=4096, batch_size=16, top_k=64, mix=MIX),
        StageConfig(steps=4000, length=32768, batch_size=2, top_k=64, mix=MIX),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
    data=DataConfig(workers=4),
    checkpoint_every=1000,
    log_every=50,
)
