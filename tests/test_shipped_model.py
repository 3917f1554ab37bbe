"""The model that comes with the package."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from sparsex_jax.cache import Engine
from sparsex_jax.cache.explain import attention_of_answer
from sparsex_jax.commands.arguments import SHIPPED_MODEL
from sparsex_jax.commands.model import load, open_haystack
from sparsex_jax.tasks import make_haystack_with_needles

PROJECT = Path(__file__).parents[1]
LINE = {"numbers": 40, "uuids": 64}  # tokens of a needle, at most


def test_size():
    files = [path for path in SHIPPED_MODEL.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 << 20


def test_config_is_the_presets():
    preset = runpy.run_path(str(PROJECT / "configs" / "needle.py"))["config"]
    assert load(SHIPPED_MODEL)[0].config.attention == preset.model.attention


@pytest.mark.usefixtures("optimized")
def test_finds_needles_and_attends_to_them():
    model, tokenizer, _ = load(SHIPPED_MODEL)
    haystack = open_haystack(None, tokenizer)[0].tokens(100_000, seed=0)
    context = make_haystack_with_needles(
        8192, np.linspace(0, 100, 10).tolist(), rng=np.random.default_rng(0),
        tokenizer=tokenizer, haystack=haystack,
    )  # fmt: skip
    engine = Engine(model, 8192)
    cache = engine.prefill(context.tokens[None])
    found = attended = 0
    for needle in context.needles:
        answer = engine.answer(cache, needle.prompt[None], context.answer_room, tokenizer.stop_ids)
        found += needle.value in tokenizer.decode(answer[0][answer[0] >= 0])
        place = np.argmax(attention_of_answer(model, cache, needle.prompt, answer[0]))
        attended += needle.position <= place < needle.position + LINE[needle.kind]
    assert found >= 9
    assert attended >= 9
