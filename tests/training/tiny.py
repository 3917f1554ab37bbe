"""A tiny model, its data, and a run of it: `python -m tests.training.tiny RUN_DIR OPTIONS`."""

import dataclasses
import errno
import json
import os
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsex_jax.config import DataConfig, ModelConfig, OptimizerConfig, StageConfig, TrainConfig
from sparsex_jax.parallel import distributed
from sparsex_jax.training import checkpoints, loop, train

VOCAB = 32
CONFIG = TrainConfig(
    model=ModelConfig(vocab_size=VOCAB, model_dim=8, ngrams=(2, 3)),
    stages=(
        StageConfig(steps=9, length=16, batch_size=4, top_k=2),
        StageConfig(steps=12, length=32, batch_size=2),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    checkpoint_every=4,
    log_every=5,
    seed=3,
)


class TinyModel(nnx.Module):
    """Predicts the next token from this one and the last, through one hidden layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            rngs.params.normal((config.vocab_size, config.model_dim)), axis_names=("vocab", "model")
        )
        self.layers = nnx.List(
            nnx.Linear(config.model_dim, config.model_dim, rngs=rngs) for _ in range(2)
        )
        self.temperature = nnx.Param(jnp.zeros(()))

    def loss(self, tokens, targets, weights, segment_ids=None, top_k=None, implementation=None):
        """Sums of weighted nats and of weights."""
        x = self.embedding[...][tokens]
        x = x + jnp.roll(x, 1, axis=1) * (top_k or 1)
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        logits = x @ self.embedding[...].T * jnp.exp(self.temperature[...])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.sum(nll * weights), jnp.sum(weights)


@dataclasses.dataclass
class MakeBatch(grain.transforms.RandomMap):
    """A random batch with weights that differ much from row to row."""

    batch_size: int
    length: int

    def random_map(self, element, rng):
        """Element is the index of the batch."""
        tokens = rng.integers(0, VOCAB, (self.batch_size, self.length + 1), dtype=np.int32)
        weights = rng.random((self.batch_size, self.length), dtype=np.float32)
        weights *= np.arange(1, self.batch_size + 1, dtype=np.float32)[:, None]
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def make_dataset(
    data: DataConfig, stage: StageConfig, *, seed: int, process_index: int, process_count: int
):
    """An endless dataset of random batches."""
    rows = stage.batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return (
        grain.MapDataset.range(1 << 20)
        .seed(seed)
        .random_map(MakeBatch(stage.batch_size, stage.length))
        .map(lambda batch: {name: value[mine] for name, value in batch.items()})
        .repeat()
    )


def run(run_dir, config=CONFIG, tokenizer_fingerprint="tiny", **options):
    """`train` with the tiny model."""
    return train(
        config,
        run_dir,
        model_class=TinyModel,
        make_dataset=make_dataset,
        tokenizer_fingerprint=tokenizer_fingerprint,
        **options,
    )


def read(run_dir, step=None):
    """Arrays of a checkpoint of a run, of the last one where no step is given."""
    manager = checkpoints.RunCheckpoints(run_dir / "checkpoints", keep=None)
    try:
        step = manager.latest if step is None else step
        return manager.restore(step, manager.contents(step)[1])
    finally:
        manager.close()


def with_batch_size(batch_size: int | None) -> TrainConfig:
    """The config with another batch size in all stages."""
    if batch_size is None:
        return CONFIG
    stages = [dataclasses.replace(stage, batch_size=batch_size) for stage in CONFIG.stages]
    return dataclasses.replace(CONFIG, stages=tuple(stages))


def fail_writing(step: int, how: str) -> None:
    """Makes a process of several fail when it writes the checkpoint of a step."""
    write_part = checkpoints.manifest.write_part

    def fail(folder, part):
        if folder.name.startswith(f"{step}."):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        write_part(folder, part)

    checkpoints.manifest.write_part = fail


def main() -> None:
    """Options, as JSON: "slow" (seconds a batch takes), "process" (fields of DistributedConfig),
    "batch_size" (of all stages), "model_dim", "fault" (a step, and what happens to this process
    when it has written its part of that checkpoint: "killed" or "full"), "gathers" (whether arrays
    may be) and fields of the config.
    """
    options = json.loads(sys.argv[2])
    slow, process = options.pop("slow", 0), options.pop("process", {})
    config = with_batch_size(options.pop("batch_size", None))
    model = dataclasses.replace(config.model, model_dim=options.pop("model_dim", 8))
    if "fault" in options:
        fail_writing(*options.pop("fault"))
    if not options.pop("gathers", True):
        loop.fetch = None
    config = dataclasses.replace(config, model=model, **options)

    def make_slow_dataset(*arguments, **options):
        dataset = make_dataset(*arguments, **options).map(lambda batch: time.sleep(slow) or batch)
        # One batch after the other: many threads together would not be slow.
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0))

    with distributed.processes(distributed.DistributedConfig(**process)):
        result = train(
            config,
            sys.argv[1],
            model_class=TinyModel,
            make_dataset=make_slow_dataset,
            tokenizer_fingerprint="tiny",
        )
    print(result.status, result.step, result.message)


if __name__ == "__main__":
    main()
