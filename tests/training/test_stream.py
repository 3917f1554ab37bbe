"""Data streams resume at the exact batch; stops are noticed."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from sparsex_jax.config import DataConfig
from sparsex_jax.training.data import BatchStream, corpus_fingerprint, stage_seed
from sparsex_jax.training.errors import TrainingError
from sparsex_jax.training.stop import StopRequest
from tests.training import tiny

STAGE = tiny.CONFIG.stages[0]


def stream(restored=None, make=tiny.make_dataset, number=0, vocab_size=tiny.VOCAB):
    return BatchStream(make, DataConfig(), STAGE, number, 5, vocab_size, restored)


def assert_same(batch, other):
    for name, value in batch.items():
        np.testing.assert_array_equal(value, other[name])


def test_state_is_after_the_last_batch_drawn():
    whole = stream()
    batches = [whole.next() for _ in range(5)]
    half = stream()
    for batch in batches[:3]:
        assert_same(half.next(), batch)
    assert_same(stream(half.state()).next(), batches[3])
    assert_same(half.next(), batches[3])


def test_seeds_differ_between_stages_and_runs():
    seeds = {stage_seed(seed, number) for seed in range(8) for number in range(8)}
    assert len(seeds) == 64 and all(0 <= seed < 2**31 for seed in seeds)


def test_data_that_end_say_so():
    short = stream(make=lambda *given, **options: tiny.make_dataset(*given, **options)[:2])
    short.next(), short.next()
    with pytest.raises(TrainingError, match=r"stages\[0\] ended after 2 of 9 .* endless"):
        short.next()


def test_batches_of_another_shape_say_so():
    def make(data, stage, **options):
        return tiny.make_dataset(data, dataclasses.replace(stage, length=8), **options)

    with pytest.raises(TrainingError, match=r"tokens .* \(4, 8\), .* = \(4, 16\)"):
        stream(make=make).next()


def test_tokens_beyond_the_vocabulary_say_so():
    with pytest.raises(TrainingError, match="vocab_size=20 allows less"):
        stream(vocab_size=20).next()


def test_fingerprint_is_that_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "file.txt").write_text("the quick brown fox\n" * 20)
    os.utime(second / "file.txt", (1, 1))
    fingerprint = corpus_fingerprint(DataConfig(str(first)))
    assert corpus_fingerprint(DataConfig(str(second))) == fingerprint
    (first / "file.txt").write_text("the quick brown cat\n" * 20)
    assert corpus_fingerprint(DataConfig(str(first))) != fingerprint


@pytest.mark.parametrize("minutes", [-1, float("nan")])
def test_time_limit_that_is_none(minutes, tmp_path):
    with pytest.raises(TrainingError, match=f"max_minutes={minutes} must not be negative"):
        tiny.run(tmp_path / "run", max_minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_a_signal_asks_to_stop_and_a_second_one_acts_as_usual():
    with StopRequest() as stop:
        assert not stop.requested(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested(0) and stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert StopRequest(max_minutes=0).requested(0)
