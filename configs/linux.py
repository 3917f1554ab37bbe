"""Definitions and descriptions of functions in C sources, prepared by scripts/prepare_linux.py.

    python scripts/prepare_linux.py linux-source-6.1.tar.xz --out linux-6.1
    sparsex train configs/linux.py --data.code linux-6.1 --run-dir runs/linux
    sparsex eval code --data linux-6.1 --checkpoint runs/linux/model --lengths 500K 1M 8M

Hardware: meant for one H200. Not trained yet: model, stages and rates are those of
configs/needle.py with a larger vocabulary, and nothing is known of the result.
"""

from sparsex_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

MIX = (
    ("definitions", 0.45),
    ("descriptions", 0.2),
    ("text", 0.2),
    ("retrieval", 0.15),
)

config = TrainConfig(
    model=ModelConfig(
        vocab_size=8192,
        model_dim=320,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        mlp_dim=960,
        # Behind the sparse layer a local one sees what was retrieved beside what was answered.
        layers="llsl",
        attention=AttentionConfig(window=128, block_size=32, top_k=64, score_dim=128),
        selection_loss=0.1,
    ),
    # Every remote block is selected up to 2K tokens; then ever fewer of many. More when asked.
    # In long texts the last tokens alone count, as do all questions with their answers.
    stages=(
        StageConfig(steps=1400, length=1024, batch_size=64, top_k=32, needles=(1, 8), mix=MIX),
        StageConfig(steps=500, length=2048, batch_size=32, top_k=64, needles=(1, 16), mix=MIX),
        StageConfig(steps=700, length=4096, batch_size=16, top_k=64, needles=(1, 24), mix=MIX),
        StageConfig(
            steps=3500,
            length=16384,
            batch_size=4,
            top_k=32,
            needles=(1, 48),
            questions=96,
            loss_tokens=6656,
            mix=MIX,
        ),
        StageConfig(
            steps=26000,
            length=32768,
            batch_size=2,
            top_k=16,
            needles=(1, 64),
            questions=144,
            loss_tokens=13312,
            mix=MIX,
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
    data=DataConfig(workers=4),
    checkpoint_every=1000,
    log_every=50,
)
