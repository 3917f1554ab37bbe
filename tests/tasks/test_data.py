"""Training batches: weights, order, resuming, splitting over processes, bad configs."""

import json
import re

import numpy as np
import pytest

from sparsex_jax.config import DataConfig, StageConfig
from sparsex_jax.tasks import TASKS, make_dataset, words

ANSWER = re.compile(
    r"What is the special magic (\w+) for (\S+) mentioned in the provided text\? The special magic"
    r" \1 for \2 mentioned in the provided text is (\S+)\.\n"
)


def dataset(folder, *, seed=0, text_weight=0.25, process=(0, 1), **stage):
    stage = {"steps": 1, "length": 1024, "batch_size": 4, **stage}
    data = DataConfig(haystack=str(folder), text_weight=text_weight)
    return make_dataset(
        data, StageConfig(**stage), seed=seed, process_index=process[0], process_count=process[1]
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_shapes_and_shift(folder):
    batch = next(iter(dataset(folder)))
    assert batch["tokens"].shape == batch["targets"].shape == batch["weights"].shape == (4, 1024)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_needles_just_before_the_question_are_common(folder, tokenizer):
    late = 0
    for batch in take(iter(dataset(folder, length=4096, needles=(1, 1), questions=1)), 8):
        for tokens in batch["tokens"]:
            before, question = tokenizer.decode(tokens).split("What is the special magic")
            late += len(before.rsplit("One of the special magic", 1)[1]) < 256 * 3
            assert question
    assert 4 < late < 16  # of 32; uniform depths alone would give two


def test_weights_mark_exactly_the_answers(folder, tokenizer):
    needles, questions, kinds = [], [], set()
    for batch in take(iter(dataset(folder, needles=(2, 8), questions=6)), 8):
        for tokens, targets, weights in zip(*batch.values(), strict=True):
            assert set(np.unique(weights)) == {np.float32(0.25), np.float32(1)}
            text = tokenizer.decode([tokens[0], *targets])
            answered = ANSWER.findall(text)
            hidden = re.findall(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.\n", text)
            assert set(answered) <= set(hidden)
            assert len({key for _, key, _ in hidden}) == len(hidden)
            marked = tokenizer.decode(targets[weights == 1])
            assert marked == "".join(f" {value}.\n" for _, _, value in answered)
            assert all(words.split_of(*key.split("-")) == "train" for _, key, _ in hidden)
            needles.append(len(hidden))
            questions.append(len(answered))
            kinds |= {kind for kind, _, _ in hidden}
    assert min(needles) >= 1
    assert 6 <= max(needles) <= 8
    assert min(questions) == 1
    assert 4 <= max(questions) <= 6
    assert kinds == {"number", "uuid", "word"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_trained_on(task, folder, tokenizer):
    batch = next(iter(dataset(folder, mix=((task, 1.0),))))
    for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
        marked = np.flatnonzero(weights == 1)
        np.testing.assert_array_equal(marked, np.arange(marked[0], 1024))
        answer = tokenizer.decode(targets[marked])
        rest = tokenizer.decode(targets[: marked[0]])
        values = re.findall(r"[A-Za-z0-9-]{5,}", answer)
        assert len(values) == TASKS[task].values * TASKS[task].queries
        assert all(value in rest for value in values)
        assert answer.endswith("\n")


def test_only_the_last_tokens_count(folder):
    mix = (("text", 0.5), ("needle", 0.5))
    batches = [next(iter(dataset(folder, mix=mix, **more))) for more in ({}, {"loss_tokens": 300})]
    whole, last = batches
    np.testing.assert_array_equal(last["tokens"], whole["tokens"])
    np.testing.assert_array_equal(last["weights"][:, -300:], whole["weights"][:, -300:])
    assert not last["weights"][:, :-300].any()
    assert whole["weights"].all()


def test_text_counts_fully_and_sources_mix(folder):
    batch = next(iter(dataset(folder, mix=(("text", 1.0),))))
    np.testing.assert_array_equal(batch["weights"], 1)
    mixed = take(iter(dataset(folder, mix=(("text", 1.0), ("needle", 1.0)))), 8)
    plain = np.concatenate([batch["weights"].min(axis=1) == 1 for batch in mixed])
    assert 4 < plain.sum() < 28


def test_resumes_exactly(folder):
    whole = take(iter(dataset(folder)), 6)
    iterator = iter(dataset(folder))
    first = take(iterator, 2)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(dataset(folder))
    resumed.set_state(state)
    assert_equal(whole, first + take(resumed, 4))
    assert not np.array_equal(whole[0]["tokens"], next(iter(dataset(folder, seed=1)))["tokens"])


def test_processes_share_the_global_batch(folder):
    whole = take(iter(dataset(folder)), 2)
    parts = [take(iter(dataset(folder, process=(index, 2))), 2) for index in range(2)]
    for step in range(2):
        joined = np.concatenate([part[step]["tokens"] for part in parts])
        np.testing.assert_array_equal(joined, whole[step]["tokens"])


def test_bad_configs(folder, tmp_path):
    with pytest.raises(ValueError, match="mix: 'nope' is no source: use text, needle"):
        dataset(folder, mix=(("nope", 1.0),))
    with pytest.raises(ValueError, match="length=100 cannot hold a needle .* use at least"):
        dataset(folder, length=100)
    with pytest.raises(ValueError, match="task='vt'.*use at least"):
        dataset(folder, length=500, mix=(("vt", 1.0),))
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        dataset(folder, process=(0, 3))
    with pytest.raises(FileNotFoundError, match="haystack="):
        dataset(tmp_path / "missing")


def test_the_shortest_length_fits_every_sample(folder):
    with pytest.raises(ValueError) as error:
        dataset(folder, length=1)
    least = int(re.search(r"use at least (\d+)", str(error.value))[1])
    for batch in take(iter(dataset(folder, length=least, needles=(1, 16))), 20):
        assert batch["tokens"].shape == (4, least)
