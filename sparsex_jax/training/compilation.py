"""Compiled steps of the stages: while one stage trains, those of the next are compiled."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from sparsex_jax.config import StageConfig
from sparsex_jax.training.step import TrainState

Batch = dict[str, jax.Array] | dict[str, jax.ShapeDtypeStruct]
_MOST = 4  # steps that are compiled at the same time
_CORES = 4  # for each of them


class StepCompiler:
    """Compiles steps and keeps them.

    Several at a time where there are cores for it; one after the other where several processes
    train, which may have to agree on what they compile.

    Args:
      make: a stage -> its step, as `make_step` builds it.
      state: shapes and shardings of the training state.
    """

    def __init__(self, make: Callable[[StageConfig], jax.stages.Wrapped], state: TrainState):
        self._make, self._state = make, state
        self._steps: dict[tuple, Future[jax.stages.Compiled]] = {}
        threads = 1
        if jax.process_count() == 1:
            threads = max(1, min(_MOST, (os.cpu_count() or 1) // _CORES))
        self._threads = ThreadPoolExecutor(threads, "compile")

    def prepare(self, stage: StageConfig, batch: Batch) -> Future[jax.stages.Compiled]:
        """Has a stage's step for batches of these shapes compiled in the background, if new."""
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in batch.items()
        }
        sizes = tuple(sorted((name, x.shape, x.dtype) for name, x in shapes.items()))
        key = stage.top_k, stage.loss_tokens, sizes
        if key not in self._steps:
            self._steps[key] = self._threads.submit(self._compile, stage, shapes)
        return self._steps[key]

    def prepare_stages(
        self, stages: Sequence[StageConfig], accumulation: int, batch: dict[str, jax.Array]
    ) -> None:
        """The same for stages whose batches differ from this one in their sizes only."""
        for stage in stages:
            shape = accumulation, stage.batch_size // accumulation, stage.length
            like = {
                name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
                for name, x in batch.items()
            }
            self.prepare(stage, like)

    def _compile(self, stage: StageConfig, batch: Batch) -> jax.stages.Compiled:
        return self._make(stage).lower(self._state, batch).compile()

    def close(self) -> None:
        """Ends the threads, after the steps that they are compiling."""
        self._threads.shutdown(cancel_futures=True)
