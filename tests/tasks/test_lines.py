"""Lines made by gathers are those made one by one."""

import re
import uuid

import numpy as np
import pytest

from sparsex_jax.tasks import words
from sparsex_jax.tasks.lines import encode_uuids, needle_lines
from sparsex_jax.tasks.phrases import Phrases
from sparsex_jax.tasks.ragged import Ragged, gather


def test_rows_are_gathered():
    tables = [Ragged.of([np.array(x) for x in rows]) for rows in ([[1], [2, 3], []], [[7, 8], [9]])]
    found = gather([(tables[0], np.array([1, 2, 0, 1])), (tables[1], np.array([1, 0, 0, 1]))])
    assert found.tokens.tolist() == [2, 3, 9, 7, 8, 1, 7, 8, 2, 3, 9]
    assert found.begin.tolist() == [0, 3, 5, 8, 11]


def test_uuids_are_encoded_as_by_the_tokenizer(tokenizer):
    rng = np.random.default_rng(0)
    special = [bytes.fromhex(x) for x in ("ab" * 16, "ff" * 16, "00" * 16, "0a" * 16, "a0" * 16)]
    data = b"".join(special) + rng.bytes(16 * 3000)
    found = encode_uuids(data, tokenizer)
    assert len(found.begin) == len(special) + 3000 + 1
    for number in range(len(found.begin) - 1):
        text = str(uuid.UUID(bytes=data[16 * number : 16 * number + 16], version=4))
        row = found.tokens[found.begin[number] : found.begin[number + 1]]
        np.testing.assert_array_equal(row, tokenizer.encode(f" {text}"))


@pytest.mark.parametrize(("key", "value"), [("words", "numbers"), ("uuids", "uuids")])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_lines_are_those_of_phrases(key, value, split, tokenizer):
    phrases, count = Phrases(tokenizer), 100_000
    taken = set()
    if key == "words":
        taken = {"-".join(words.draw_pair(np.random.default_rng(0), split))}
    rng = np.random.default_rng(1)
    tokens = needle_lines(count, key, value, rng, tokenizer, split, taken)
    assert tokens.dtype == np.int32 and count - 90 < len(tokens) <= count
    text = tokenizer.decode(tokens)
    form = rf"One of the special magic {value} for (\S+) is: (\S+)\."
    found = [re.fullmatch(form, line).groups() for line in text.split("\n")[:-1]]
    keys = [name for name, _ in found]
    assert len(set(keys)) == len(keys) > 1000 and not set(keys) & taken
    if key == "words":
        assert all(words.split_of(*name.split("-")) == split for name in keys)
        assert all(10**6 <= int(number) < 10**7 for _, number in found)
    expected = [phrases.needle(value, *pair) for pair in found]
    np.testing.assert_array_equal(tokens, np.concatenate(expected))
    again = needle_lines(count, key, value, np.random.default_rng(1), tokenizer, split, taken)
    np.testing.assert_array_equal(tokens, again)


def test_pairs_are_those_of_their_split():
    rng = np.random.default_rng(0)
    numbers = {split: words.pairs(split) for split in ("train", "held_out")}
    both = np.sort(np.concatenate(list(numbers.values())))
    np.testing.assert_array_equal(both, np.arange(len(words.ADJECTIVES) * len(words.NOUNS)))
    for split, found in numbers.items():
        for number in rng.choice(found, 300):
            pair = (
                words.ADJECTIVES[number // len(words.NOUNS)],
                words.NOUNS[number % len(words.NOUNS)],
            )
            assert words.split_of(*pair) == split and words.pair_number(*pair) == number


def test_keys_that_run_out_are_told(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "pairs", lambda split: np.arange(5, dtype=np.int32))
    with pytest.raises(ValueError, match="not enough keys"):
        needle_lines(1000, "words", "numbers", np.random.default_rng(0), tokenizer, "train", set())
    with pytest.raises(ValueError, match="make no lines"):
        needle_lines(99, "uuids", "words", np.random.default_rng(0), tokenizer, "train", set())
