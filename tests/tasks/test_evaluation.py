"""The harness, with models that always, never or sometimes know the answer."""

import re

import numpy as np
import pytest

from sparsex_jax.tasks import evaluate, make_row, wilson_interval


class Reader:
    """Finds single needles by reading; wrong on every `wrong`-th prompt."""

    def __init__(self, tokenizer, wrong=None):
        self.tokenizer, self.wrong, self.shapes, self.count = tokenizer, wrong, [], 0

    def __call__(self, prompts, max_new_tokens):
        self.shapes.append((prompts.shape, max_new_tokens))
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            key = re.search(r"text\? The special magic \w+ for (\S+) mentioned", text)[1]
            value = re.search(rf"for {re.escape(key)} is: (\S+)\.\n", text)[1]
            self.count += 1
            if self.wrong and self.count % self.wrong == 0:
                value = "nothing"
            answer = self.tokenizer.encode(f" {value}.\nWhat is the next line?")
            yield answer[:max_new_tokens]


@pytest.mark.parametrize("task", ["single_2", "single_3", "multikey_3"])
def test_a_reader_is_always_right(task, tokenizer, haystack):
    model, seen = Reader(tokenizer), []
    result = evaluate(
        model, task, 512, 5, tokenizer=tokenizer, haystack=haystack, batch_size=2,
        depths=[0, 50, 100], on_batch=seen.extend,
    )  # fmt: skip
    assert len(set(model.shapes)) == 1
    assert model.shapes[0][0][1] + model.shapes[0][1] == 512
    assert tuple(seen) == result.answers
    assert [answer.depth for answer in seen] == [0, 50, 100, 0, 50]
    assert [answer.index for answer in seen] == list(range(5))
    assert all(answer.text == answer.references[0] + "." for answer in seen)
    assert result.row == {
        "system": "sparsex", "task": task, "tokens": 512, "samples": 5, "correct": 5,
        "accuracy": 1.0, "low": pytest.approx(0.5655, abs=1e-4), "high": 1.0,
        "seconds": sorted(answer.seconds for answer in seen)[2], "status": "measured",
        "note": None,
    }  # fmt: skip


def test_errors_are_counted_and_batches_change_nothing(tokenizer, haystack):
    options = {"tokenizer": tokenizer, "haystack": haystack, "seed": 7}
    one = evaluate(Reader(tokenizer, wrong=3), "single_2", 512, 6, **options)
    assert one.row["correct"] == 4
    assert [answer.score for answer in one.answers] == [1, 1, 0, 1, 1, 0]
    many = evaluate(Reader(tokenizer), "single_2", 512, 6, batch_size=4, **options)
    assert [a.references for a in many.answers] == [a.references for a in one.answers]


def test_rows_without_a_measurement(tokenizer, haystack):
    row = make_row("dense", "single_2", 1 << 22, [], "out_of_memory", note="9 bytes")
    assert (row["samples"], row["accuracy"], row["status"]) == (0, None, "out_of_memory")
    assert row["note"] == "9 bytes"
    assert make_row("a", "multivalue", 512, [0.5, 0.25])["correct"] == 0.75
    for name in ("samples", "batch_size"):
        counts = {"samples": 1, "batch_size": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            evaluate(Reader(tokenizer), "single_2", 512, tokenizer=tokenizer, haystack=haystack,
                     **counts)  # fmt: skip


def test_wilson_interval():
    np.testing.assert_allclose(wilson_interval(95, 100), (0.88825, 0.97846), atol=1e-5)
    np.testing.assert_allclose(wilson_interval(300, 300), (0.98736, 1.0), atol=1e-5)
    low, high = wilson_interval(0, 10)
    assert low == 0
    np.testing.assert_allclose(high, 0.27753, atol=1e-5)
    with pytest.raises(ValueError, match="correct=3 of samples=2"):
        wilson_interval(3, 2)
