"""A small model for single needles in long source text, quick to train.

    sparsex train configs/nano.py --run-dir runs/nano

Hardware: one H200, seven minutes (406M tokens).
Result: docs/log.md, "the nano model"; 98 to 100 of 100 single needles right at 16K and at 128K
tokens, by free generation.
"""

from sparsex_jax.config import (
    AttentionConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

MIX = (("needle", 0.9), ("single_3", 0.05), ("text", 0.05))

config = TrainConfig(
    model=ModelConfig(
        vocab_size=4096,
        model_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=768,
        layers="llls",
        attention=AttentionConfig(window=128, block_size=64, top_k=16),
    ),
    # Every remote block is selected up to 4K tokens; then few of many.
    stages=(
        StageConfig(steps=2000, length=1024, batch_size=64, top_k=16, needles=(1, 8), mix=MIX),
        StageConfig(steps=600, length=2048, batch_size=32, top_k=32, needles=(1, 16), mix=MIX),
        StageConfig(steps=800, length=4096, batch_size=16, top_k=64, needles=(1, 24), mix=MIX),
        StageConfig(steps=1800, length=16384, batch_size=4, top_k=16, needles=(1, 48), mix=MIX),
        StageConfig(steps=1000, length=32768, batch_size=2, top_k=16, needles=(1, 64), mix=MIX),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
    checkpoint_every=1000,
    log_every=50,
)
