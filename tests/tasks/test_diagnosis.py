"""Why an answer is wrong: where it goes wrong, and what each finding is called."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.cache.explain import Attended
from sparsex_jax.tasks import diagnosis, make_sample


def draw(task, tokenizer, haystack):
    rng = np.random.default_rng(0)
    return make_sample(task, 640, rng=rng, tokenizer=tokenizer, haystack=haystack)


@pytest.mark.parametrize("task", ["single_2", "multiquery", "vt"])
def test_the_first_error_and_the_token_to_be_copied(task, tokenizer, haystack):
    sample = draw(task, tokenizer, haystack)
    copied = np.flatnonzero(sample.sources >= 0)
    for wrong in range(copied[-1] + 1):
        generated = sample.answer.copy()
        generated[wrong] += 1
        right, place = diagnosis.first_error(sample, generated)
        assert right == wrong
        following = copied[copied >= wrong][0]
        assert sample.prompt[place] == sample.answer[following]
        assert any(begin <= place < end for begin, end in sample.lines)
    right, place = diagnosis.first_error(sample, [-1, -1])
    assert (right, place) == (0, sample.sources[copied[0]])


@pytest.mark.parametrize(
    ("selected", "weight", "expected"),
    [
        (False, 0.9, "not_selected"), (True, 0.4, "not_attended"), (True, 0.6, "not_copied"),
    ],
)  # fmt: skip
def test_names(selected, weight, expected, tokenizer, haystack, monkeypatch):
    sample, seen = draw("single_2", tokenizer, haystack), []

    class Engine:
        def prefill(self, tokens):
            seen.append(tokens)
            return self

    def explain(model, cache, tokens, place, span):
        np.testing.assert_array_equal(tokens, [sample.prompt[-1], *sample.answer[:3]])
        assert place == sample.sources[3] and sample.lines == (span,)
        return Attended(jnp.bool_(selected), jnp.float32(weight))

    monkeypatch.setattr(diagnosis, "explain", explain)
    generated = sample.answer.copy()
    generated[3:] = -1
    assert diagnosis.diagnose(None, Engine(), sample, generated) == expected
    np.testing.assert_array_equal(seen, [sample.prompt[None, :-1]])
