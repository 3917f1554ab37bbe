"""Checkpoints: of a run, to go on from, and of a model alone, to ship."""

import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import sparsex_jax
from sparsex_jax.config import AttentionConfig, ConfigError, ModelConfig
from sparsex_jax.training.errors import CheckpointError, first_line, is_disk_full
from sparsex_jax.training.parameters import split_model


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


@contextmanager
def _writing(what: str, way_out: str) -> Iterator[None]:
    """Turns errors of writing into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    # orbax and tensorstore have no common type for what can go wrong with files.
    except Exception as error:
        reason = "no space left on the device" if is_disk_full(error) else first_line(error)
        raise CheckpointError(f"{what} could not be written: {reason}. {way_out}") from error


@contextmanager
def _reading(path: Path, way_out: str) -> Iterator[None]:
    """Turns errors of reading into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, files are missing or damaged ({first_line(error)}): {way_out}"
        ) from error


def _is_news(record: logging.LogRecord) -> bool:
    """False for what orbax logs, at length, before it raises it, and for reading on purpose."""
    return "orbax" not in record.pathname or not (
        record.exc_info or "read only" in record.getMessage()
    )


class RunCheckpoints:
    """The checkpoints of a run: asynchronous, atomic, the last `keep` of them.

    A checkpoint that is not complete has a temporary name, is never read, and is removed when the
    run goes on.

    Args:
      directory: made if missing.
      keep: how many stay; None is for reading only, also beside a process that trains.
    """

    def __init__(self, directory: Path, keep: int | None):
        self._directory = directory
        logging.getLogger("absl").addFilter(_is_news)
        with _writing(str(directory), "Choose a run directory that can be written to."):
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    read_only=True, save_interval_steps=0, create=False
                )
                if keep is None
                else ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
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
        with self._guard(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(dict(arrays)),
                    metadata=ocp.args.JsonSave({**metadata, "crc32": crc32(arrays)}),
                ),
                force=True,
            )

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
        return _writing(
            f"{what} in {self._directory}",
            f"{intact}: free some space and run the same command again.",
        )

    def metadata(self, step: int) -> dict:
        """Metadata of a checkpoint; raises CheckpointError where it cannot be read."""
        with _reading(self._directory / str(step), self._way_out(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
            )
            return restored["metadata"]

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Arrays of a checkpoint; raises CheckpointError where they cannot be read."""
        path = self._directory / str(step)
        with _reading(path, self._way_out(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore())
            )
            arrays = restored["arrays"]
            if crc32(arrays) != self.metadata(step)["crc32"]:
                raise CheckpointError(f"{path} is damaged: {self._way_out(step)}")
        return arrays

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
        return ModelConfig(**{**saved, "attention": AttentionConfig(**saved["attention"])})
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


def save_model(
    directory: str | os.PathLike,
    params: nnx.Module | Mapping[str, Any],
    config: ModelConfig,
    tokenizer_fingerprint: str | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Writes a model alone: model.json and a few files of arrays; replaces the directory.

    Args:
      directory: what to write.
      params: a model, or its parameters by dotted name.
      config: of the model.
      tokenizer_fingerprint: of the tokenizer that it was trained with.
      dtype: of matrices; vectors and scalars stay float32.

    Raises:
      CheckpointError: the directory cannot be written; what was there before is intact.
    """
    path = Path(directory)
    if isinstance(params, nnx.Module):
        params = split_model(params)[1]
    arrays = {
        name: np.asarray(value, dtype=jnp.dtype(dtype) if np.ndim(value) >= 2 else np.float32)
        for name, value in params.items()
    }
    description = {
        "config": to_json(config),
        "tokenizer": tokenizer_fingerprint,
        "dtype": dtype,
        "crc32": crc32(arrays),
        "versions": versions(),
    }
    fresh = path.absolute().with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(f"the model in {path}", "Choose a directory with space that can be written to."):
        try:
            if path.exists() and not (path / "model.json").exists() and os.listdir(path):
                raise CheckpointError(
                    f"{path} holds something that is not a model: choose a new directory"
                )
            fresh.mkdir(parents=True)
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(fresh / "arrays", arrays)
            (fresh / "model.json").write_text(json.dumps(description, indent=1) + "\n")
            if path.exists():
                old = fresh.with_suffix(".old")
                path.rename(old)
                fresh.rename(path)
                shutil.rmtree(old)
            else:
                fresh.rename(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def load_model(
    directory: str | os.PathLike,
    dtype: Literal["bfloat16", "float32"] | None = None,
    *,
    tokenizer_fingerprint: str | None = None,
    config: ModelConfig | None = None,
    compute_dtype: Literal["bfloat16", "float32"] | None = None,
    model_class: Callable[..., nnx.Module] | None = None,
) -> tuple[ModelConfig, nnx.Module]:
    """Reads what `save_model` wrote.

    Args:
      directory: the model's.
      dtype: of the parameters; None takes them as they were saved.
      tokenizer_fingerprint: of the tokenizer in use, to be compared.
      config: what the model must be, if it must be something.
      compute_dtype: of the arithmetic; None takes the saved config's.
      model_class: None takes `Transformer`.

    Returns:
      The config, with `compute_dtype`, and the model.

    Raises:
      CheckpointError: missing, damaged, of another model or with another tokenizer.
    """
    if model_class is None:
        from sparsex_jax.modules.transformer import Transformer

        model_class = Transformer
    path = Path(directory)
    if not (path / "model.json").is_file():
        state = "is no model (it has no model.json)" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {state}: give a directory that `sparsex train` or"
                              " `save_model` wrote")  # fmt: skip
    with _reading(path, "copy it again from where it came"):
        description = json.loads((path / "model.json").read_text())
        saved = description["config"]
        check_tokenizer(path, description["tokenizer"], tokenizer_fingerprint)
        if config is not None:
            check_model(path, saved, config)
        config = model_config(path, saved, description["versions"])
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path.absolute() / "arrays")
        if crc32(arrays) != description["crc32"]:
            raise CheckpointError(f"{path} is damaged: copy it again from where it came")
    if compute_dtype is not None:
        config = dataclasses.replace(config, dtype=compute_dtype)
    skeleton, params = split_model(model_class(config, rngs=nnx.Rngs(0)))
    check_arrays(path, arrays, params)
    return config, skeleton.build({
        name: jnp.asarray(value, dtype=dtype) for name, value in arrays.items()
    })  # fmt: skip


def crc32(arrays: Mapping[str, np.ndarray]) -> int:
    """One checksum over all arrays in the order of their names."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), total)
    return total
