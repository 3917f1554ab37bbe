"""Texts to train on: their length, what is asked, what is marked, and their tokens."""

import re

import numpy as np
import pytest

from sparsex_jax.config import DataConfig, StageConfig
from sparsex_jax.tasks import make_dataset, words
from sparsex_jax.tasks.parts import Parts
from sparsex_jax.tasks.phrases import Phrases
from sparsex_jax.tasks.practice import LEAST_LENGTH, Practice

HIDDEN = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.\n")
ASKED = re.compile(
    r"What (?:is|are all) the special magic (\w+?)s? for (.*?) mentioned in the provided text\? The"
    r" special magic \w+ for (.*?) mentioned in the provided text (?:is|are) (.*?)\.\n"
)
CHAIN = re.compile(r"variables are assigned the value (\d+), they are: (.*)\n")


@pytest.fixture
def practice(tokenizer):
    stream = np.tile(tokenizer.encode("Nothing is hidden in this line.\n"), 2000)
    stage = StageConfig(steps=1, length=2048, batch_size=1, needles=(1, 12), questions=6)
    return Practice(stage, tokenizer, stream)


def split_list(text):
    return [item.removeprefix("and ") for item in text.split(", ")]


def samples(make, count, tokens, tokenizer):
    for seed in range(count):
        found, is_answer = make(tokens, np.random.default_rng(seed))
        assert len(found) == len(is_answer) == tokens
        yield tokenizer.decode(found), tokenizer.decode(found[is_answer]), found


@pytest.mark.parametrize("source", ["retrieval", "values", "crowd"])
def test_answers_are_what_is_hidden(source, practice, tokenizer):
    several_keys = several_values = 0
    for text, marked, _ in samples(getattr(practice, source), 60, 2048, tokenizer):
        hidden = {}
        for kind, key, value in HIDDEN.findall(text):
            hidden.setdefault((kind, key), []).append(value)
        asked = ASKED.findall(text)
        assert asked
        for kind, keys, again, answer in asked:
            assert keys == again
            wanted = [hidden[kind + "s", key] for key in split_list(keys)]
            assert sorted(sum(wanted, [])) == sorted(split_list(answer))
            several_keys += len(wanted) > 1
            several_values += len(wanted[0]) > 1
        assert marked == "".join(f" {answer}.\n" for *_, answer in asked)
        pairs = [key.split("-") for _, key in hidden if key.count("-") == 1]
        assert all(words.split_of(*pair) == "train" for pair in pairs)
        if source == "values":
            assert all(len(found) > 1 for found in hidden.values())
    assert (several_keys > 3) == (source != "values")
    assert (several_values > 3) == (source != "crowd")


def test_every_line_of_a_crowd_is_a_needle(practice, tokenizer):
    for text, _, _ in samples(practice.crowd, 20, 2048, tokenizer):
        lines = text.splitlines(keepends=True)
        needles = [line for line in lines if HIDDEN.fullmatch(line)]
        keys = [HIDDEN.fullmatch(line)[2] for line in needles]
        assert len(needles) > 0.5 * len(lines)
        assert len(set(keys)) == len(keys)


def test_many_needles_are_where_the_text_begins_or_ends(practice, tokenizer):
    first = last = 0
    for text, _, _ in samples(practice.values, 60, 2048, tokenizer):
        before, *_, after = HIDDEN.sub("|", text).split("|")
        first += len(before.splitlines()) < 2
        last += after.startswith("What")
    assert first > 5 and last > 5


def test_a_crowds_first_question_is_often_about_its_very_first_or_its_last_lines(
    practice, tokenizer
):
    first = last = 0
    for text, _, _ in samples(practice.crowd, 60, 2048, tokenizer):
        keys = [key for _, key, _ in HIDDEN.findall(text)]
        asked = split_list(ASKED.search(text)[2])[0]
        first += asked == keys[0] and len(HIDDEN.split(text)[0].splitlines()) < 2
        behind = text[text.index(f"for {asked} is") : text.index("What")]
        last += len(tokenizer.encode(behind)) < 256
    assert first > 2 and last > 15


def test_chains_lead_to_their_answers(practice, tokenizer):
    for text, marked, _ in samples(practice.chains, 20, 2048, tokenizer):
        source = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})", text))
        asked = CHAIN.findall(text)
        assert asked
        for value, names in asked:
            for name in names.split():
                assert source[name] == value
                value = name
        assert marked == "".join(f" {names}\n" for _, names in asked)


@pytest.mark.parametrize("source", ["retrieval", "values", "crowd", "chains"])
def test_the_least_length_fits_every_text(source, tokenizer):
    stage = StageConfig(steps=1, length=LEAST_LENGTH, batch_size=1, needles=(1, 64), questions=64)
    practice = Practice(stage, tokenizer, tokenizer.encode("a line\n" * 5000))
    for _ in samples(getattr(practice, source), 150, LEAST_LENGTH, tokenizer):
        pass


@pytest.mark.parametrize("kind", ["numbers", "uuids", "words"])
def test_parts_are_the_tokens_of_phrases(kind, tokenizer):
    parts, phrases, rng = Parts(tokenizer), Phrases(tokenizer), np.random.default_rng(0)
    keys = parts.draw_keys(rng, "words", 20, similar=False)
    values = parts.draw(rng, kind, 20)
    table = parts.table(f"One of the special magic {kind} for", keys, " is:", values, ".\n")
    lines = parts.rows(list(table))
    assert parts.sizes(table).tolist() == [len(line) for line in lines]
    np.testing.assert_array_equal(np.concatenate(lines), parts.tokens(table.ravel()))
    for line in lines:
        _, key, value = HIDDEN.fullmatch(tokenizer.decode(line)).groups()
        np.testing.assert_array_equal(line, phrases.needle(kind, key, value))


def test_similar_keys_share_words(tokenizer):
    rng = np.random.default_rng(0)
    for similar in (False, True):
        keys = Parts(tokenizer).draw_keys(rng, "words", 100, similar)
        assert len(np.unique(keys, axis=0)) == 100
        assert (len(np.unique(keys[:, 0])) < 50) == similar


@pytest.mark.parametrize(("kind", "same"), [("numbers", 2), ("words", 1)])
def test_values_of_a_key_begin_alike(kind, same, tokenizer):
    rng, parts = np.random.default_rng(0), Parts(tokenizer)
    alike = 0
    for _ in range(200):
        values = parts.draw_alike(rng, kind, 4)
        assert len(np.unique(values, axis=0)) == 4
        alike += len(np.unique(values[:, :same], axis=0)) < 4
    assert alike > 150  # of random numbers 50 in 100 have a first digit in common
    assert parts.draw_alike(rng, "uuids", 4).shape == (4, 1)


def test_stages_too_short_are_refused(folder):
    stage = StageConfig(steps=1, length=512, batch_size=1, mix=(("crowd", 1.0),))
    with pytest.raises(ValueError, match="length=512 .* source 'crowd': use at least 1024"):
        make_dataset(DataConfig(haystack=str(folder)), stage, seed=0)
