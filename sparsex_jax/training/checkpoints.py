"""Checkpoints: of a run, to go on from, and of a model alone, to ship."""

import dataclasses
import functools
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

import sparsex_jax
from sparsex_jax import errors, manifest
from sparsex_jax.config import AttentionConfig, BaselineConfig, ConfigError, ModelConfig
from sparsex_jax.parallel import distributed
from sparsex_jax.training.errors import CheckpointError


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    return {
        "sparsex": sparsex_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "orbax-checkpoint": ocp.__version__,
    }


def to_json(config: Any) -> dict:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(saved: Any, wanted: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """The fields (dotted name, value in saved, value in wanted) in which two JSON values differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return [
            found
            for key in dict.fromkeys((*saved, *wanted))
            for found in differences(
                saved.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
        ]
    if isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        return [
            found
            for index, (one, other) in enumerate(zip(saved, wanted, strict=True))
            for found in differences(one, other, f"{name}[{index}]")
        ]
    return [] if saved == wanted else [(name, saved, wanted)]


def describe(found: list[tuple[str, Any, Any]], limit: int = 6) -> str:
    """Differences in words."""
    text = ", ".join(f"{name} is {a!r} there and {b!r} here" for name, a, b in found[:limit])
    return text + (f" and {len(found) - limit} more" if len(found) > limit else "")


writing = functools.partial(errors.writing, CheckpointError)
reading = functools.partial(errors.reading, CheckpointError)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what orbax logs, at length, before it raises it, and for reading on purpose."""
    return "orbax" not in record.pathname or not (
        record.exc_info or "read only" in record.getMessage()
    )


class _Manager(ocp.CheckpointManager):
    """orbax's, which does not look for requests to stop: `StopRequest` does.

    Its own look, from a thread and at a step that is past, would set back the counter by which
    JAX finds the step that all processes stop at.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


PARAMS = "params/"  # before the names of parameters, in checkpoints of runs
# What orbax adds to the name of a checkpoint that is not complete.
TEMPORARY = ".orbax-checkpoint-tmp"


class RunCheckpoints:
    """The checkpoints of a run: asynchronous, atomic, the last `keep` of them.

    Of several processes each writes the shards that it holds, into one directory, and reads those
    that it is to hold; all of them have to make the same calls. A checkpoint that is not complete
    has a temporary name, is never read, and is removed when the run goes on. A complete one has a
    manifest of its files, which is checked before it is read.

    Args:
      directory: made if missing.
      keep: how many stay; None is for reading only, also beside a process that trains.
    """

    def __init__(self, directory: Path, keep: int | None):
        self._directory = directory
        self._saving: int | None = None
        self._error: BaseException | None = None  # of writing in the background
        logging.getLogger("absl").addFilter(_is_news)
        with writing(str(directory), "Choose a run directory that can be written to."):
            if keep is not None and jax.process_index() == 0:
                # orbax would do this in a thread that a process that ends early leaves behind.
                for unfinished in directory.glob(f"*{TEMPORARY}*"):
                    shutil.rmtree(unfinished)
            self._manager = _Manager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    read_only=True, save_interval_steps=0, create=False
                )
                if keep is None
                else ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._seal, barrier_sync_fn=self._meet
                    ),
                ),
                item_handlers={
                    "arrays": ocp.PyTreeCheckpointHandler(),
                    "metadata": ocp.JsonCheckpointHandler(),
                },
            )

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: Mapping[str, jax.Array], metadata: dict) -> None:
        """Starts to write a checkpoint; an error of the one before is raised here.

        Args:
          step: its name.
          arrays: by name. This process's shards of them are on its host when this returns, so
            that they may be given away.
          metadata: JSON.
        """
        self.wait()
        self._saving = step
        with self._guard(step), distributed.waiting_for(f"the checkpoint of step {step}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(dict(arrays)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,
            )

    def _unfinished(self) -> Path:
        """The folder that is being written."""
        (folder,) = self._directory.glob(f"{self._saving}{TEMPORARY}*")
        return folder

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, in the background; sums up what this one has written."""
        if (error := sys.exception()) is not None:
            # orbax would wait on its way out for those that wait for what failed here.
            self._error = error
            return
        if "async_write_complete" in key:
            folder = self._unfinished()
            own = folder / "arrays" / f"ocdbt.process_{jax.process_index()}"
            manifest.write_part(folder, own)
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _seal(self) -> None:
        """Writes the manifest; called in the background, of process 0, before the folder gets its
        final name.
        """
        manifest.write(self._unfinished())

    def check(self) -> None:
        """Raises CheckpointError if writing failed in the background."""
        with self._guard():
            self._manager.check_for_errors()
            if self._error is not None:
                raise self._error

    def wait(self) -> None:
        """Blocks until the last checkpoint is complete."""
        with self._guard(), distributed.waiting_for(f"the checkpoint of step {self._saving}"):
            self._manager.wait_until_finished()

    def _guard(self, step: int | None = None):
        good = [n for n in self._manager.all_steps() if (self._directory / str(n)).is_dir()]
        intact = f"The one of step {max(good)} is intact" if good else "There is none before it"
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        return writing(
            f"{what} in {self._directory}",
            f"{intact}: free some space and run the same command again.",
        )

    def contents(self, step: int) -> tuple[dict, dict[str, jax.ShapeDtypeStruct]]:
        """Metadata of a checkpoint, and the shapes of its arrays; checks its files.

        Of several processes each checks its share of the files, and none goes on before all have.

        Raises:
          CheckpointError: they are not whole.
        """
        path = self._directory / str(step)
        with self._reading(step), distributed.waiting_for(f"the files of {path}"):
            manifest.verify(path, jax.process_index(), jax.process_count())
            distributed.of_process_0("verified", "")
            args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
            metadata = self._manager.restore(step, args=args)["metadata"]
            arrays = self._manager.item_metadata(step)["arrays"]
            return metadata, {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype)
                for name, value in arrays.tree.items()
            }

    def restore(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Arrays of a checkpoint that `contents` has checked.

        Args:
          step: its name.
          like: those wanted, with their shapes. One with a sharding is read as a jax.Array that
            lies so, by each process what it is to hold; one without as a NumPy array.

        Raises:
          CheckpointError: they cannot be read.
        """
        path = self._directory / str(step)
        with self._reading(step), distributed.waiting_for(f"the arrays of {path}"):
            args = ocp.args.PyTreeRestore(
                dict(like),
                restore_args=ocp.checkpoint_utils.construct_restore_args(dict(like)),
                partial_restore=True,
            )
            return self._manager.restore(step, args=ocp.args.Composite(arrays=args))["arrays"]

    def _reading(self, step: int) -> AbstractContextManager[None]:
        return reading(self._directory / str(step), self._way_out(step))

    def _way_out(self, step: int) -> str:
        before = [name for name in self._manager.all_steps() if name < step]
        then = f"go on from step {max(before)}" if before else "start again from the beginning"
        return f"delete it to {then}"

    def close(self) -> None:
        """Waits for what is being written and ends the background threads."""
        try:
            with self._guard():
                self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_is_news)


def check_arrays(path: Path, arrays: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the arrays have the names and shapes of `like`."""
    found = differences(
        {name: list(np.shape(value)) for name, value in arrays.items()},
        {name: list(np.shape(value)) for name, value in like.items()},
    )
    if found:
        raise CheckpointError(
            f"{path} does not hold the arrays of this model: {describe(found)}: use the version of"
            " sparsex that wrote it, or another directory"
        )


def check_model(path: Path, saved: dict, wanted: ModelConfig) -> None:
    """Raises CheckpointError where a checkpoint's model config (as JSON) is another one."""
    found = differences(saved, to_json(wanted))
    if found:
        raise CheckpointError(
            f"{path} holds another model: {describe(found)}: use its config, or another directory"
        )


def model_config(path: Path, saved: dict, written_by: dict[str, str]) -> ModelConfig:
    """The model config of a checkpoint from JSON; raises CheckpointError where it is not known."""
    try:
        parts = {name: tuple(x) for name, x in saved.items() if isinstance(x, list)} | {
            "attention": AttentionConfig(**saved["attention"]),
            "baseline": BaselineConfig(**saved.get("baseline", {})),
        }
        return ModelConfig(**{**saved, **parts})
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} has a config that this version of sparsex does not know ({error}): use version"
            f" {written_by['sparsex']}"
        ) from error


def check_tokenizer(path: Path, saved: str | None, wanted: str | None) -> None:
    """Raises CheckpointError where a checkpoint was made with another tokenizer."""
    if saved is not None and wanted is not None and saved != wanted:
        raise CheckpointError(
            f"{path} was trained with the tokenizer {saved}, the one in use is {wanted}: use the"
            " tokenizer that it was trained with, or another checkpoint"
        )
