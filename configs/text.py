r"""A language model of source text, to compare attention by perplexity.

    S=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")    # any large folder
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text
    sparsex train configs/text.py --data.haystack $S --run-dir runs/text-dense --model.layers lldl
    sparsex eval perplexity --haystack $S --held-out --sequences 200 \
        --checkpoints runs/text-dense/model runs/text/model

Hardware: meant for one H200. 6.5M parameters, 315M tokens. Attention is the default one.
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
        # As many query heads for a KV head as a tile of the kernels has rows for a token.
        num_heads=8,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=960,
        conv_width=4,
        layers="llsl",
        attention=AttentionConfig(),
        selection_loss=0.1,
    ),
    stages=(
        StageConfig(steps=800, length=2048, batch_size=32, mix=MIX),
        StageConfig(steps=1200, length=8192, batch_size=8, mix=MIX),
        StageConfig(steps=2800, length=32768, batch_size=2, mix=MIX),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
    data=DataConfig(workers=4),
    checkpoint_every=1000,
    log_every=50,
)
