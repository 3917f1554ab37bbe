"""Training texts about code: their length, what is asked, and what is marked."""

import itertools
import re

import numpy as np
import pytest

from sparsex_jax.config import ConfigError, DataConfig, StageConfig
from sparsex_jax.tasks import make_dataset, tokenizer_of
from sparsex_jax.tasks.code.practice import LEAST_LENGTH, SOURCES, CodePractice
from sparsex_jax.tasks.code.wording import BODY

STAGE = StageConfig(steps=1, length=LEAST_LENGTH, batch_size=1, questions=8)


def texts(source, prepared, count, tokens=LEAST_LENGTH):
    practice = CodePractice(STAGE, prepared.split("train"), prepared.tokenizer)
    for seed in range(count):
        found, is_answer = practice(source, tokens, np.random.default_rng(seed))
        assert len(found) == len(is_answer) == tokens and found.dtype == np.int32
        yield found, is_answer


def runs(is_answer):
    """Begins and ends of runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_answer, [False]])))
    return edges.reshape(-1, 2)


@pytest.mark.parametrize("tokens", [LEAST_LENGTH, 4096])
def test_answers_are_the_definitions(prepared, tokens):
    asked = 0
    for found, is_answer in texts("definitions", prepared, 40, tokens):
        spans = runs(is_answer)
        if not len(spans):  # both scales in one stretch
            continue
        for begin, end in spans:
            before = prepared.tokenizer.decode(found[:begin])
            context, name = re.fullmatch(r"(.*)\ndefine: (\w+)\(", before, re.DOTALL).groups()
            answer = prepared.tokenizer.decode(found[begin:end])
            assert f"{name}({answer}" in context
            body = prepared.tokenizer.decode(found[end - 1 - BODY : end - 1])
            assert answer.endswith("{" + body) and found[end - 1] == prepared.tokenizer.end_id
            asked += 1
    assert asked > 60


def test_what_is_described_has_no_comment(prepared):
    asked = 0
    for found, is_answer in texts("descriptions", prepared, 40):
        spans = runs(is_answer)
        context, *_ = prepared.tokenizer.decode(found).split("\ndescribe: ")
        for begin, end in spans:
            answer = prepared.tokenizer.decode(found[begin:end])
            assert answer in context and answer.endswith(")\n{")
            before = prepared.tokenizer.decode(found[:begin])
            described = before.rpartition("\ndescribe: ")[2]
            assert "FUNCTION() twice" in described
            # Text in front may have the function once more.
            assert not context[: context.rindex(answer)].endswith("*/\n")
            asked += 1
    assert asked > 60


def count_alike(practice, alike):
    """Of 150 choices of three functions, how many begin, end or go on alike."""
    functions, names = practice.split.functions, practice.split.names
    counts = {"begin": 0, "end": 0, "body": 0}
    for seed in range(150):
        chosen = practice._choose("definitions", 3, alike, np.random.default_rng(seed))
        parts = [names[functions["name"][i]].split("_") for i in chosen]
        counts["begin"] += len({first for first, *_ in parts}) == 1
        counts["end"] += len({last for *_, last in parts}) == 1
        begins = functions["body"][chosen]
        counts["body"] += len({tuple(practice.split.tokens[i : i + 4]) for i in begins}) == 1
    return counts.values()


def test_functions_that_are_alike_are_neighbours_by_one_of_three_orders(prepared):
    practice = CodePractice(STAGE, prepared.split("train"), prepared.tokenizer)
    assert min(count_alike(practice, True)) > 25  # of 50 that are neighbours by it
    assert max(count_alike(practice, False)) < 25


def test_stretches_are_few_or_many(prepared):
    practice = CodePractice(STAGE, prepared.split("train"), prepared.tokenizer)
    counts = [
        len(practice._draw("definitions", 6144, np.random.default_rng(seed))[0])
        for seed in range(200)
    ]
    assert 30 < counts.count(1) < 100 and 10 < sum(count > 6 for count in counts) < 100


def test_some_questions_stand_behind_text(prepared):
    behind = whole = 0
    for found, is_answer in texts("definitions", prepared, 150, 4096):
        ends = runs(is_answer)
        for (_, end), (begin, _) in itertools.pairwise(ends):
            before = prepared.tokenizer.decode(found[end:begin])
            behind += not before.startswith("\ndefine: ")
            assert before.count("\ndefine: ") == 1
            whole += 1
    assert 0.03 < behind / whole < 0.2


@pytest.mark.parametrize("source", SOURCES)
def test_some_questions_are_about_text_just_before(prepared, source):
    split = prepared.split("train")
    practice, rng = CodePractice(STAGE, split, prepared.tokenizer), np.random.default_rng(0)
    names, made = split.functions["name"], 0
    for _ in range(100):
        inside = rng.choice(len(names), 12, replace=False)
        here = practice._here(source, inside, rng)
        if here is None:
            continue
        made += 1
        i, tokens = here
        text, name = prepared.tokenizer.decode(tokens), split.names[names[i]]
        assert 128 < len(tokens) <= 512
        answer = prepared.tokenizer.decode(
            practice.wording.answer(SOURCES[source], split.functions[i])
        )
        assert text.count(answer) == 1
        assert (f"{name}() - " in text) == (
            source == "definitions" and split.functions["doc"][i] >= 0
        )
        assert names[i] not in names[inside]
    assert made > 10


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_texts_hold_such_questions(prepared, monkeypatch, share):
    monkeypatch.setattr("sparsex_jax.tasks.code.practice._HERE", share)
    monkeypatch.setattr("sparsex_jax.tasks.code.practice._APART", 0.0)
    behind = 0
    for found, is_answer in texts("definitions", prepared, 40, 4096):
        for (_, end), (begin, behind_answer) in itertools.pairwise(runs(is_answer)):
            text, _, name = prepared.tokenizer.decode(found[end:begin]).rpartition("\ndefine: ")
            answer = prepared.tokenizer.decode(found[begin:behind_answer])
            assert bool(text) == (f"{name}{answer}" in text)
            behind += bool(text)
    assert (behind > 20) == (share > 0)


def test_stretches_are_apart_and_some_are_around_calls(prepared):
    split = prepared.split("train")
    practice = CodePractice(STAGE, split, prepared.tokenizer)
    several = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        spans, chosen = practice._draw("definitions", 3072, rng)
        spans.sort()
        several += len(spans) > 1
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(spans))
        for i in chosen:
            begin, end = split.functions["name_begin"][i], split.functions["body"][i]
            assert any(first <= begin and end <= last for first, last in spans)
        calls = practice._calls_of(chosen, rng)
        assert len(calls) == len(chosen)
        for place, i in zip(calls, chosen, strict=True):
            text = prepared.tokenizer.decode(split.tokens[place : place + 24])
            assert text.lstrip().startswith(split.names[split.functions["name"][i]] + "(")
            assert place != split.functions["name_begin"][i]
    assert several > 5


def test_batches_of_both_sources_and_text(folder, prepared):
    mix = (*((name, 1.0) for name in SOURCES), ("text", 1.0), ("retrieval", 1.0))
    stage = StageConfig(steps=1, length=1024, batch_size=8, mix=mix)
    data = DataConfig(code=str(folder))
    assert tokenizer_of(data).fingerprint == prepared.tokenizer.fingerprint
    batch = next(iter(make_dataset(data, stage, seed=0)))
    again = next(iter(make_dataset(data, stage, seed=0)))
    for name in ("tokens", "targets", "weights"):
        assert batch[name].shape == (8, 1024)
        np.testing.assert_array_equal(batch[name], again[name])
    assert batch["tokens"].max() < prepared.tokenizer.vocab_size


def test_what_cannot_be_made_is_refused(folder, tmp_path):
    def make(length=1024, **data):
        stage = StageConfig(steps=1, length=length, batch_size=1, mix=(("definitions", 1.0),))
        return make_dataset(DataConfig(**data), stage, seed=0)

    with pytest.raises(ValueError, match="use --data.code FOLDER"):
        make()
    with pytest.raises(ValueError, match="length=512 .* 'definitions': use at least 1024"):
        make(512, code=str(folder))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        make(code=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="both name the text"):
        make(code="a", haystack="b")
