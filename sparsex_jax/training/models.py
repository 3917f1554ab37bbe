"""Models alone, without the state of a run: what is shipped."""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from sparsex_jax.config import ModelConfig
from sparsex_jax.training.checkpoints import (
    PARAMS,
    RunCheckpoints,
    check_arrays,
    check_model,
    check_tokenizer,
    model_config,
    reading,
    to_json,
    versions,
    writing,
)
from sparsex_jax.training.errors import CheckpointError
from sparsex_jax.training.parameters import split_model

TOKENIZER = "tokenizer.json"  # of a run or a model that has a tokenizer of its own
_WAY_OUT = "copy it again from where it came, or use the version of sparsex that wrote it"


def save_model(
    directory: str | os.PathLike,
    params: nnx.Module | Mapping[str, Any],
    config: ModelConfig,
    tokenizer_fingerprint: str | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    tokenizer: Path | None = None,
) -> None:
    """Writes a model alone: model.json and a few files of arrays; replaces the directory.

    A process that is killed (SIGKILL) between the two renames of a replacement leaves no model
    under the directory's name, but both beside it: .NAME.PID.old and .NAME.PID.tmp.

    Args:
      directory: what to write.
      params: a model, or its parameters by dotted name.
      config: of the model.
      tokenizer_fingerprint: of the tokenizer that it was trained with.
      dtype: of matrices; vectors and scalars stay float32.
      tokenizer: file to copy to tokenizer.json, where it is not the one of the package.

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
    with writing(f"the model in {path}", "Choose a directory with space that can be written to."):
        try:
            if path.exists() and not (path / "model.json").exists() and os.listdir(path):
                raise CheckpointError(
                    f"{path} holds something that is not a model: choose a new directory"
                )
            fresh.mkdir(parents=True)
            with _checkpointer() as checkpointer:
                checkpointer.save(fresh / "arrays", arrays)
            (fresh / "model.json").write_text(json.dumps(description, indent=1) + "\n")
            if tokenizer is not None:
                shutil.copyfile(tokenizer, fresh / TOKENIZER)
            _replace(path, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def own_tokenizer(directory: str | os.PathLike) -> Path | None:
    """The tokenizer file of a run or a model; None where it has the one of the package."""
    path = Path(directory) / TOKENIZER
    return path if path.is_file() else None


def _replace(path: Path, fresh: Path) -> None:
    """Gives a new directory the name of an old one, which is removed; or leaves the old one."""
    if not path.exists():
        fresh.rename(path)
        return
    old = fresh.with_suffix(".old")
    path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _checkpointer() -> ocp.Checkpointer:
    """Reads and writes arrays, in this process alone where there are several."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def _read_arrays(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays by name.

    Read one by one: of several at once, one that fails leaves the others' threads behind, each with
    a traceback on stderr.
    """
    arrays: dict[str, np.ndarray] = {}
    with _checkpointer() as checkpointer:
        for name in names:
            one = ocp.args.PyTreeRestore({name: 0}, partial_restore=True)
            arrays.update(checkpointer.restore(folder, args=one))
    return arrays


def model_crc32(directory: str | os.PathLike) -> int:
    """Checksum of the arrays of a model, which names its weights; raises CheckpointError."""
    path = Path(directory)
    with reading(path, "copy it again from where it came"):
        return json.loads((path / "model.json").read_text())["crc32"]


def load_model(
    directory: str | os.PathLike,
    dtype: Literal["bfloat16", "float32"] | None = None,
    *,
    tokenizer_fingerprint: str | None = None,
    config: ModelConfig | None = None,
    compute_dtype: Literal["bfloat16", "float32"] | None = None,
    attention_changes: Mapping[str, Any] | None = None,
    model_class: Callable[..., nnx.Module] | None = None,
) -> tuple[ModelConfig, nnx.Module]:
    """Reads what `save_model` wrote.

    Args:
      directory: the model's.
      dtype: of the parameters; None takes them as they were saved.
      tokenizer_fingerprint: of the tokenizer in use, to be compared.
      config: what the model must be, if it must be something.
      compute_dtype: of the arithmetic; None takes the saved config's.
      attention_changes: fields of the attention's config to have instead of the saved ones, which
        no parameter depends on: how blocks are searched, say.
      model_class: None takes `Transformer`.

    Returns:
      The config as the model has it, and the model.

    Raises:
      CheckpointError: missing, damaged, of another model or with another tokenizer.
      ConfigError: `attention_changes` has a value that its rule forbids.
    """
    if model_class is None:
        from sparsex_jax.modules.transformer import Transformer

        model_class = Transformer
    path = Path(directory)
    description = _description(path, tokenizer_fingerprint)
    with reading(path, _WAY_OUT):
        saved = model_config(path, description["config"], description["versions"])
        if config is not None:
            check_model(path, to_json(saved), config)
    config = saved
    if compute_dtype is not None:
        config = dataclasses.replace(config, dtype=compute_dtype)
    if attention_changes:
        attention = dataclasses.replace(config.attention, **attention_changes)
        config = dataclasses.replace(config, attention=attention)
    skeleton, params = split_model(model_class(config, rngs=nnx.Rngs(0)))
    arrays = _checked_arrays(path, description, params)
    return config, skeleton.build({
        name: jnp.asarray(value, dtype=dtype) for name, value in arrays.items()
    })  # fmt: skip


def load_parameters(
    directory: str | os.PathLike,
    like: Mapping[str, jax.Array],
    tokenizer_fingerprint: str | None = None,
) -> dict[str, jax.Array]:
    """The parameters of what `save_model` wrote, by name, in the types of others.

    Args:
      directory: the model's; of its config only the shapes of the parameters matter.
      like: parameters with the same names and shapes.
      tokenizer_fingerprint: of the tokenizer in use, to be compared.

    Raises:
      CheckpointError: missing, damaged, of other shapes or with another tokenizer.
    """
    path = Path(directory)
    arrays = _checked_arrays(path, _description(path, tokenizer_fingerprint), like)
    return {name: jnp.asarray(value, like[name].dtype) for name, value in arrays.items()}


def _description(path: Path, tokenizer_fingerprint: str | None) -> dict[str, Any]:
    """What model.json says; raises CheckpointError unless it fits the tokenizer."""
    if not (path / "model.json").is_file():
        state = "is no model (it has no model.json)" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {state}: give a directory that `sparsex train` or"
                              " `save_model` wrote")  # fmt: skip
    with reading(path, _WAY_OUT):
        description = json.loads((path / "model.json").read_text())
        check_tokenizer(path, description["tokenizer"], tokenizer_fingerprint)
    return description


def _checked_arrays(
    path: Path, description: dict[str, Any], like: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a model, which have the names and shapes of others."""
    with reading(path, _WAY_OUT):
        arrays = _read_arrays(path.absolute() / "arrays", like)
        check_arrays(path, arrays, like)
        if crc32(arrays) != description["crc32"]:
            raise CheckpointError(f"{path} does not match its checksum: {_WAY_OUT}")
    return arrays


def crc32(arrays: Mapping[str, np.ndarray]) -> int:
    """One checksum over all arrays in the order of their names."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), total)
    return total


def export_model(
    run_dir: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> int:
    """Ships the last checkpoint of a run, finished or not.

    Args:
      run_dir: of the run.
      directory: for `save_model`.
      dtype: for `save_model`.

    Returns:
      The step of the checkpoint.

    Raises:
      CheckpointError: the run has no checkpoint, it cannot be read, or the model not be written.
    """
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: give the run_dir of `sparsex train`")
    manager = RunCheckpoints(folder, keep=None)
    try:
        step = manager.latest
        if step is None:
            raise CheckpointError(f"{folder} has no checkpoint: let the run reach its first one")
        metadata, shapes = manager.contents(step)
        params = {name: x for name, x in shapes.items() if name.startswith(PARAMS)}
        params = manager.restore(step, params)
    finally:
        manager.close()
    params = {name.removeprefix(PARAMS): value for name, value in params.items()}
    config = model_config(folder, metadata["config"]["model"], metadata["versions"])
    save_model(directory, params, config, metadata["tokenizer"], dtype, own_tokenizer(run_dir))
    return step
