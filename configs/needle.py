"""The needle model that comes with the package: all of RULER's needle tasks in long source text.

    sparsex train configs/needle.py --run-dir runs/needle
    sparsex train configs/needle.py --run-dir runs/dense --model.layers lldl    # a baseline

Hardware: one H200, 17 minutes, three of them compilation (2.1B tokens; 3.4M a second at 32K).
Result: results/h200/needle-*.json, and the README's table. What led to it: docs/log.md, "learning
to select", "which model finds needles", "blocks of 32 and three times the questions", "several
values of a key", "the needle model from scratch" and "the needle model that is shipped".
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
    ("retrieval", 0.25),
    ("values", 0.2),
    ("crowd", 0.35),
    ("chains", 0.1),
    ("vt", 0.05),
    ("text", 0.05),
)

config = TrainConfig(
    model=ModelConfig(
        vocab_size=4096,
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
    # In long texts the last tokens alone count: 99 % of the answers are among them.
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
            loss_tokens=6144,
            mix=MIX,
        ),
        StageConfig(
            steps=26000,
            length=32768,
            batch_size=2,
            top_k=16,
            needles=(1, 64),
            questions=144,
            loss_tokens=12288,
            mix=MIX,
        ),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=300),
    data=DataConfig(workers=4),
    checkpoint_every=1000,
    log_every=50,
)
