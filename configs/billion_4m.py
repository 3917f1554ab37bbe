"""The model of configs/billion.py on sequences of 4M tokens, which 256 chips or 8 GPUs share.

    sparsex train configs/billion_4m.py --run-dir runs/billion_4m --init-from runs/billion/model

On 8 H100 add `--model.remat repetition`.

Hardware: 256 TPU v5e chips (v5e:16x16), 16K tokens on each. It was compiled for them (`sparsex plan
configs/billion_4m.py --target v5e:16x16`): 10.35 of 15.75 GiB a chip, 155 TFLOP and 55 GiB sent,
results/tpu-v5e/plan-billion-4m.json. And for 8 H100 of one host, 512K tokens on each (`--target
h100x8 --model.remat repetition`): results/h100-80gb-hbm3/plan-billion-4m.json.
Hours: not known; it has not been trained.
Result: none; the learning rate and the numbers of steps are guesses.
"""

from sparsex_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)

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
    stages=(
        StageConfig(
            steps=2000,
            length=2**22,
            batch_size=1,
            questions=64,
            mix=(("text", 0.9), ("needle", 0.1)),
        ),
    ),
    mesh=MeshConfig(fsdp=1, seq=-1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=200, weight_decay=0.1),
    data=DataConfig(text_weight=1.0, workers=4),
    checkpoint_every=100,
)
