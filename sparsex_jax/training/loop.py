"""The training loop: stages, checkpoints, resumption, clean stops."""

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from sparsex_jax.config import StageConfig, TrainConfig
from sparsex_jax.parallel import distributed
from sparsex_jax.parallel.mesh import batch_share, check_batch, check_model, make_mesh
from sparsex_jax.training import checkpoints as ckpt
from sparsex_jax.training.agreement import check_same_command, check_shared
from sparsex_jax.training.compilation import StepCompiler
from sparsex_jax.training.data import BatchStream, corpus_fingerprint, describe_text
from sparsex_jax.training.errors import TrainingError
from sparsex_jax.training.metrics import Metrics, Progress
from sparsex_jax.training.models import TOKENIZER, load_parameters, own_tokenizer, save_model
from sparsex_jax.training.optimizer import make_optimizer, make_schedule
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.run_directory import last_complete, lock, prepare
from sparsex_jax.training.step import fetch, first_state, make_step, place_batch, state_like
from sparsex_jax.training.stop import StopRequest

# What a resumed run may have another value of: it changes no parameter but by rounding.
MAY_CHANGE = ("checkpoint_every", "keep", "log_every", "implementation", "mesh")
# Steps that the host may run ahead of the devices: enough to hide its own work, few enough
# that a stop is quick.
STEPS_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      status: "finished", or "interrupted" by a signal or the time limit, saved and resumable.
      step: optimizer steps taken in all.
      loss: the last one logged; None where this call logged none.
      message: a line for the user.
    """

    status: Literal["finished", "interrupted"]
    step: int
    loss: float | None
    message: str


def train(
    config: TrainConfig,
    run_dir: str | os.PathLike,
    *,
    max_minutes: float | None = None,
    model_class: Callable[..., nnx.Module] | None = None,
    make_dataset: Callable | None = None,
    tokenizer_fingerprint: str | None = None,
    data_fingerprint: str | None = None,
) -> TrainResult:
    """Trains a model, or goes on where the run directory stands.

    The directory receives checkpoints/, metrics.jsonl, tensorboard/, tokenizer.json if it is not
    that of the package, and, at the end, model/ (see `save_model`). SIGTERM, SIGINT and the time
    limit end the current step, save and return. On the CPU a run that was interrupted, however
    often, ends with the same bits as one that was not.

    Args:
      config: the run.
      run_dir: its directory, made if missing.
      max_minutes: wall-clock limit in minutes, set-up and compilation included.
      model_class: called as (ModelConfig, rngs=nnx.Rngs); has `.loss`. None takes `Transformer`.
      make_dataset: (DataConfig, StageConfig, *, seed, process_index, process_count) -> endless
        grain dataset of a process's rows of the batches; None takes that of `sparsex_jax.tasks`.
      tokenizer_fingerprint: identifies the tokenizer; None takes that of `sparsex_jax.tasks` along
        with its `make_dataset`.
      data_fingerprint: identifies what the data are made from; None takes the text of
        `sparsex_jax.tasks` along with its `make_dataset`.

    Raises:
      TrainingError: the directory cannot be used or belongs to another config or other data; the
        data do not fit the config; the loss or the state is not finite; max_minutes is negative.
      CheckpointError: a checkpoint cannot be written, or the last one cannot be read.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(max_minutes))
        if model_class is None:
            from sparsex_jax.modules.transformer import Transformer

            model_class = Transformer
        tokenizer = None
        if make_dataset is None:
            from sparsex_jax import tasks

            make_dataset = tasks.make_dataset
            tokenizer = tasks.tokenizer_of(config.data)
            tokenizer_fingerprint = tokenizer_fingerprint or tokenizer.fingerprint
            data_fingerprint = data_fingerprint or corpus_fingerprint(config.data)
        run_dir = prepare(Path(run_dir))
        if jax.process_index() == 0:
            stack.enter_context(lock(run_dir))
            if config.data.code is not None and tokenizer and not own_tokenizer(run_dir):
                tokenizer.save(run_dir / TOKENIZER)
        check_shared(run_dir)
        check_same_command(config, tokenizer_fingerprint, data_fingerprint)
        trainer = Trainer(
            config, run_dir, model_class, make_dataset, tokenizer_fingerprint, data_fingerprint
        )
        stack.callback(trainer.close)
        distributed.resume_from(lambda: last_complete(run_dir / "checkpoints"))
        try:
            return trainer.run(stop)
        except BaseException as error:
            distributed.failed(error)  # before closing, which may wait for the others
            raise


class Trainer:
    """A run: state on the devices, the data stream, and what is written on the way."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        model_class: Callable[..., nnx.Module],
        make_dataset: Callable,
        tokenizer_fingerprint: str | None,
        data_fingerprint: str | None,
    ):
        self.config, self.run_dir = config, run_dir
        self.make_dataset = make_dataset
        self.tokenizer, self.data = tokenizer_fingerprint, data_fingerprint
        self.mesh = make_mesh(config.mesh)
        check_model(config.model, self.mesh)
        for number, stage in enumerate(config.stages):
            check_batch(
                f"stages[{number}]", stage.batch_size, stage.length, config.accumulation,
                config.model, self.mesh,
            )  # fmt: skip
        self.schedule = make_schedule(config.optimizer, config.total_steps)
        self.optimizer = make_optimizer(config.optimizer, config.total_steps)
        self.skeleton, self.initial = split_model(
            model_class(config.model, rngs=nnx.Rngs(config.seed))
        )
        self.state = state_like(self.initial, self.optimizer, self.skeleton, self.mesh)
        self.step = 0
        self.window: list[list[float]] = []  # metrics of steps since the last row
        self.pending: collections.deque = collections.deque()  # (step, two arrays on the device)
        self.loss: float | None = None
        self.compiler = StepCompiler(self._make_step, self.state)
        self.stream: BatchStream | None = None
        self.restored_data: dict | None = None
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None
        self.checkpoints = ckpt.RunCheckpoints(run_dir / "checkpoints", config.keep)
        latest = distributed.of_process_0("latest", json.dumps(self.checkpoints.latest))
        self.saved_step = json.loads(latest)
        # Stages as (first step, step after the last, tokens before it).
        self.bounds = []
        steps = tokens = 0
        for stage in config.stages:
            self.bounds.append((steps, steps + stage.steps, tokens))
            steps += stage.steps
            tokens += stage.steps * stage.batch_size * stage.length
        self.total_tokens = tokens

    def run(self, stop: StopRequest) -> TrainResult:
        """Begins or restores, trains, saves."""
        if self.saved_step is None:
            self._begin()
        else:
            self._restore(self.saved_step)
        total = self.config.total_steps
        if self.step == total:
            self._export()
            return TrainResult(
                "finished", total, None, f"{self.run_dir} is finished: all {total} steps are done"
            )
        if jax.process_index() == 0:
            self.metrics = Metrics(self.run_dir, self.step)
            self.progress = Progress(total, self.total_tokens)
            if self.step:
                self.progress.say(f"resuming {self.run_dir} after step {self.step}")
        self.clock, self.clock_tokens = time.monotonic(), self._tokens(self.step)
        while self.step < total and not stop.requested(self.step):
            if not self._take_step(stop):
                break
            if self.step % self.config.checkpoint_every == 0 or self.step == total:
                self._save()
        if self.step == total:
            self.checkpoints.wait()
            self._export()
            return TrainResult(
                "finished", total, self.loss, f"finished: the model is in {self.run_dir / 'model'}"
            )
        if self.step and self.saved_step != self.step:
            self._save()
        self.checkpoints.wait()
        where = f"and saved after step {self.step} of {total}: to resume"
        if self.step == 0:
            where = "before the first step, nothing is saved: to start"
        return TrainResult(
            "interrupted",
            self.step,
            self.loss,
            f"stopped by {stop.reason} {where}, run the same command again",
        )

    def _stage_number(self, step: int) -> int:
        """Of the stage whose steps, counted from 0, include the given one."""
        return next(n for n, (_, end, _) in enumerate(self.bounds) if step < end)

    def _tokens(self, step: int) -> int:
        """Tokens trained on in the first `step` steps."""
        if step == 0:
            return 0
        number = self._stage_number(step - 1)
        stage, (first, _, before) = self.config.stages[number], self.bounds[number]
        return before + (step - first) * stage.batch_size * stage.length

    def _take_step(self, stop: StopRequest) -> bool:
        """Draws a batch, starts a step on the devices, logs one that is done.

        Returns whether it did: not where a request to stop has ended the compilation of a step.
        """
        number = self._stage_number(self.step)
        stage = self.config.stages[number]
        if self.stream is not None and self.step == self.bounds[number][0]:
            self.stream.close()
            self.stream = None
        begins = self.stream is None
        if self.stream is None:
            self.stream = BatchStream(
                self.make_dataset, self.config.data, stage, number, self.config.seed,
                self.config.model.vocab_size, self.restored_data, batch_share(self.mesh),
            )  # fmt: skip
            self.restored_data = None
        what = f"the batch of step {self.step + 1}"
        with distributed.waiting_for(what), self._timed(what):
            rows = self.stream.next()
        batch = place_batch(rows, self.config.accumulation, self.mesh)
        try:
            with self._timed(f"the step of stage {number} to be compiled"):
                step = self.compiler.prepare(stage, batch).result()
        except jax.errors.JaxRuntimeError:
            # A signal to all processes of a job reaches those of the compiler (ptxas), too.
            if stop.reason is None:
                raise
            return False
        self.state, *results = step(self.state, batch)
        if begins:
            later = self.config.stages[number + 1 :]
            self.compiler.prepare_stages(later, self.config.accumulation, batch)
        self.step += 1
        self.pending.append((self.step, *results))
        self._log(keep=STEPS_AHEAD)
        return True

    def _timed(self, what: str) -> AbstractContextManager:
        """Tells the user what a step waits for long."""
        return nullcontext() if self.progress is None else self.progress.waiting(what)

    def _make_step(self, stage: StageConfig) -> jax.stages.Wrapped:
        return make_step(
            self.skeleton, self.optimizer, self.schedule, stage.top_k, self.mesh,
            self.config.implementation, self.config.mesh.sequence_strategy, stage.loss_tokens,
        )  # fmt: skip

    def _log(self, keep: int) -> None:
        """Fetches metrics of all but the last `keep` steps; writes the rows they complete."""
        while len(self.pending) > keep:
            step, metrics, finite = self.pending.popleft()
            with distributed.waiting_for(f"the result of step {step}"):
                self.window.append(np.asarray(metrics).tolist())
            loss = self.window[-1][0]
            if not (math.isfinite(loss) and finite):
                what = f"the state after step {step} is not finite"
                if not math.isfinite(loss):
                    what = f"the loss of step {step} is {loss}"
                kept = f"the last checkpoint is of step {self.saved_step}"
                raise TrainingError(
                    f"{what}: lower optimizer.learning_rate={self.config.optimizer.learning_rate};"
                    f" {kept if self.saved_step else 'no checkpoint was saved'}"
                )
            ends = step in (end for _, end, _ in self.bounds)
            if step % self.config.log_every == 0 or ends:
                self._write_row(step)
                self.checkpoints.check()

    def _write_row(self, step: int) -> None:
        """Writes the means over the steps since the last row."""
        loss, _, norm = np.mean(np.array(self.window), axis=0).tolist()
        rate = self.window[-1][1]
        self.window, self.loss = [], loss
        now, tokens = time.monotonic(), self._tokens(step)
        seconds = now - self.clock
        row = {
            "step": step,
            "stage": self._stage_number(step - 1),
            "tokens": tokens,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": (tokens - self.clock_tokens) / seconds,
            "seconds": seconds,
        }
        self.clock, self.clock_tokens = now, tokens
        if self.metrics is not None and self.progress is not None:
            self.metrics.write(row)
            self.progress.show(row)

    def _arrays(self) -> dict:
        """The state, or its shapes, as a flat dictionary."""
        moments = jax.tree_util.tree_flatten_with_path(self.state["optimizer"])[0]
        return {
            **{f"{ckpt.PARAMS}{name}": value for name, value in self.state["params"].items()},
            **{f"optimizer/{jax.tree_util.keystr(path)}": value for path, value in moments},
            "step": self.state["step"],
        }

    def _save(self) -> None:
        """Starts to write a checkpoint of the current step."""
        assert self.stream is not None  # a step was taken
        self._log(keep=0)
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpoints.save(
            self.step,
            self._arrays(),
            {
                "config": ckpt.to_json(self.config),
                "tokenizer": self.tokenizer,
                "data_fingerprint": self.data,
                "data": self.stream.state(),
                "window": list(self.window),  # written while steps are added
                "versions": ckpt.versions(),
            },
        )
        self.saved_step = self.step

    def _begin(self) -> None:
        """Takes over the parameters to begin with."""
        params, self.initial = self.initial, {}
        if self.config.init_from is not None:
            params = load_parameters(self.config.init_from, params, self.tokenizer)
        self.state = first_state(params, self.optimizer, self.skeleton, self.mesh)

    def _restore(self, step: int) -> None:
        """Takes over a checkpoint; raises TrainingError or CheckpointError if it does not fit."""
        path = self.run_dir / "checkpoints" / str(step)
        self.initial.clear()
        metadata, shapes = self.checkpoints.contents(step)
        found = [
            difference
            for difference in ckpt.differences(metadata["config"], ckpt.to_json(self.config))
            if difference[0].partition(".")[0] not in MAY_CHANGE
        ]
        if found:
            raise TrainingError(
                f"{self.run_dir} was begun with another config: {ckpt.describe(found)}: use the"
                " config that it was begun with, or another run_dir"
            )
        ckpt.check_tokenizer(path, metadata["tokenizer"], self.tokenizer)
        if metadata["data_fingerprint"] != self.data:
            raise TrainingError(
                f"the text of {describe_text(self.config.data)} has changed since {self.run_dir}"
                " was begun: restore it, or use another run_dir"
            )
        like = self._arrays()
        ckpt.check_arrays(path, shapes, like)
        arrays = self.checkpoints.restore(step, like)
        treedef = jax.tree.structure(self.state["optimizer"])
        self.state = {
            "params": {name: arrays[f"{ckpt.PARAMS}{name}"] for name in self.state["params"]},
            "optimizer": jax.tree.unflatten(
                treedef, [arrays[name] for name in like if name.startswith("optimizer/")]
            ),
            "step": arrays["step"],
        }
        self.step, self.window = step, metadata["window"]
        if step not in (end for _, end, _ in self.bounds):
            self.restored_data = metadata["data"]

    def _export(self) -> None:
        """Writes the model alone, unless it is there; process 0 gathers the parameters for it."""
        path, params = self.run_dir / "model", {}
        if json.loads(distributed.of_process_0("model", json.dumps(path.exists()))):
            return
        for name, value in self.state["params"].items():
            whole = fetch(value)
            if jax.process_index() == 0:
                params[name] = whole
        if jax.process_index() == 0:
            save_model(
                path, params, self.config.model, self.tokenizer,
                tokenizer=own_tokenizer(self.run_dir),
            )  # fmt: skip

    def close(self) -> None:
        """Ends what runs in the background."""
        with ExitStack() as stack:
            for part in (
                self.checkpoints, self.stream, self.compiler, self.metrics, self.progress
            ):  # fmt: skip
                if part is not None:
                    stack.callback(part.close)
