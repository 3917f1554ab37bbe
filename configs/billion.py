"""A model of a billion parameters, on long source text.

    sparsex train configs/billion.py --run-dir runs/billion

Hardware: eight TPU v5e chips (v5e:2x4), a sequence of 16K tokens on each.
Hours: not known; it has not been trained. Its last stage was compiled for v5e:2x4 (`sparsex plan
configs/billion.py --target v5e:2x4`): 11.95 of 15.75 GiB a chip, results/tpu-v5e/plan-billion.json.
The first stage was not compiled.
Result: none; the learning rate and the numbers of steps are guesses.
"""

from sparsex_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

MIX = (("text", 0.9), ("needle", 0.1))

config = TrainConfig(
    model=ModelConfig(
        vocab_size=4096,  # of the tokenizer that comes with the package
        model_dim=2048,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=5376,
        layers="llllls" * 4,
        attention=AttentionConfig(window=512, block_size=64, top_k=16),
        remat="layer",
    ),
    # Every remote block is selected up to 4K tokens; then few of many.
    stages=(
        StageConfig(steps=100_000, length=4096, batch_size=32, top_k=64, mix=MIX),
        StageConfig(steps=10_000, length=16384, batch_size=8, mix=MIX),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, weight_decay=0.1),
    data=DataConfig(text_weight=1.0),
    checkpoint_every=1000,
)
