"""Checkpoints: of a run, to go on from, and of a model alone, to ship."""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

import sparsex_jax
from sparsex_jax import errors, manifest
from sparsex_jax.config import AttentionConfig, BaselineConfig, ConfigError, ModelConfig
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


# What orbax adds to the name of a checkpoint that is not complete.
TEMPORARY = ".orbax-checkpoint-tmp"


class RunCheckpoints:
    """The checkpoints of a run: asynchronous, atomic, the last `keep` of them.

    A checkpoint that is not complete has a temporary name, is never read, and is removed when the
    run goes on. A complete one has a manifest of its files, which is checked before it is read.

    Args:
      directory: made if missing.
      keep: how many stay; None is for reading only, also beside a process that trains.
    """

    def __init__(self, directory: Path, keep: int | None):
        self._directory = directory
        self._saving: int | None = None
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
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                ),
                item_names=("arrays", "metadata"),
            )

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, arrays: Mapping[str, np.ndarray], metadata: dict) -> None:
        """Starts to write a checkpoint; an error of the one before is raised here.

        Args:
          step: its name.
          arrays: NumPy arrays that nobody changes any more.
          metadata: JSON.
        """
        self.wait()
        self._saving = step
        with self._guard(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(dict(arrays)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
                force=True,
            )

    def _seal(self) -> None:
        """Writes the manifest; called in the background before the folder gets its final name."""
        (folder,) = self._directory.glob(f"{self._saving}{TEMPORARY}*")
        manifest.write(folder)

    def check(self) -> None:
        """Raises CheckpointError if writing failed in the background."""
        with self._guard():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until the last checkpoint is complete."""
        with self._guard():
            self._manager.wait_until_finished()

    def _guard(self, step: int | None = None):
        good = [n for n in self._manager.all_steps() if (self._directory / str(n)).is_dir()]
        intact = f"The one of step {max(good)} is intact" if good else "There is none before it"
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        return writing(
            f"{what} in {self._directory}",
            f"{intact}: free some space and run the same command again.",
        )

    def restore(self, step: int) -> tuple[dict, dict[str, np.ndarray]]:
        """Metadata and arrays of a checkpoint; raises CheckpointError where they are not whole."""
        path = self._directory / str(step)
        with reading(path, self._way_out(step)):
            manifest.verify(path)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    metadata=ocp.args.JsonRestore(), arrays=ocp.args.PyTreeRestore()
                ),
            )
            return restored["metadata"], restored["arrays"]

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
        parts = {
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
