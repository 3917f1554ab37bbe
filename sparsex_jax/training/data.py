"""Batches of a stage, resumable at the exact batch."""

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from sparsex_jax.config import DataConfig, StageConfig
from sparsex_jax.training.errors import TrainingError


def stage_seed(seed: int, stage_number: int) -> int:
    """The seed of a stage's data, below 2^31."""
    return int(np.random.SeedSequence([seed, stage_number]).generate_state(1)[0]) >> 1


def corpus_fingerprint(data: DataConfig) -> str:
    """A hash of all tokens that `sparsex_jax.tasks` trains on; raises what its texts raise."""
    from sparsex_jax import tasks

    corpus = tasks.open_text(data, tasks.tokenizer_of(data))
    return hashlib.sha256(corpus.all_tokens()).hexdigest()


def describe_text(data: DataConfig) -> str:
    """Where it comes from, in words."""
    if data.code is not None:
        return f"code={data.code}"
    return f"haystack={data.haystack or 'the standard library'}"


class BatchStream:
    """The batches of one stage: dictionaries of NumPy arrays [B, T], B being this process's share.

    Args:
      make_dataset: (data, stage, *, seed, process_index, process_count) -> endless grain dataset of
        batches, of which each process makes its own rows.
      data: the run's.
      stage: the stage's.
      number: of the stage, from 0.
      seed: of the run.
      vocab_size: tokens are below it.
      restored: what `state()` gave; None starts at the first batch.
      share: (number, shares) of the sequences of each batch that this process makes.
    """

    def __init__(
        self,
        make_dataset: Callable,
        data: DataConfig,
        stage: StageConfig,
        number: int,
        seed: int,
        vocab_size: int,
        restored: dict | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self._stage, self._number, self._vocab_size = stage, number, vocab_size
        self._drawn, self._shares = 0, share[1]
        dataset = make_dataset(
            data, stage, seed=stage_seed(seed, number), process_index=share[0],
            process_count=share[1],
        )  # fmt: skip
        if isinstance(dataset, grain.MapDataset):
            dataset = dataset.to_iter_dataset()
        self._iterator = iter(dataset)
        if restored is not None:
            self._iterator.set_state(_from_json(restored["iterator"]))
            self._drawn = restored["drawn"]

    def next(self) -> dict[str, np.ndarray]:
        """The next batch; raises TrainingError where it does not fit the stage."""
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise TrainingError(
                f"the data of stages[{self._number}] ended after {self._drawn} of"
                f" {self._stage.steps} batches: make_dataset must return an endless dataset"
            ) from None
        self._drawn += 1
        shape = (self._stage.batch_size // self._shares, self._stage.length)
        for name, value in batch.items():
            if value.shape != shape:
                raise TrainingError(
                    f"{name} of a batch of stages[{self._number}] has shape {value.shape},"
                    f" its config says (batch_size / shares, length) = {shape}"
                )
        for name in ("tokens", "targets"):
            low, high = batch[name].min(), batch[name].max()
            if low < 0 or high >= self._vocab_size:
                raise TrainingError(
                    f"{name} hold ids from {low} to {high}, model.vocab_size={self._vocab_size}"
                    " allows less: use the vocab_size of the tokenizer"
                )
        return batch

    def state(self) -> dict:
        """Where the stream stands, as JSON."""
        return {"drawn": self._drawn, "iterator": _to_json(self._iterator.get_state())}

    def close(self) -> None:
        """Ends the threads that prepare batches."""
        self._iterator.close()


def _to_json(value: Any) -> Any:
    """A grain state as JSON; bytes, which some states hold, become {"base64": ...}."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"base64"}:
            return base64.b64decode(value["base64"])
        return {key: _from_json(item) for key, item in value.items()}
    return [_from_json(item) for item in value] if isinstance(value, list) else value
