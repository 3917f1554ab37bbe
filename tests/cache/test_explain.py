"""What a token attends to, against weights computed from the whole sequence."""

import dataclasses

import numpy as np
import pytest

from sparsex_jax.baselines import random_blocks
from sparsex_jax.cache import Engine
from sparsex_jax.cache.explain import attention_of_answer, explain, why_unknown
from sparsex_jax.config import BaselineConfig
from sparsex_jax.rotary import apply_rotary
from sparsex_jax.scoring import pool_blocks
from tests.modules.test_transformer import ATTENTION, TINY, make, make_tokens

LENGTH = 101
SIZE = ATTENTION.block_size
LOCAL = SIZE * ((LENGTH - 1 - ATTENTION.window + 1) // SIZE)
LAYERS = {
    "sum": dataclasses.replace(TINY, layers="s"),
    "softmax": dataclasses.replace(
        TINY, layers="s", attention=dataclasses.replace(ATTENTION, fusion="softmax",
                                                        landmarks="off"),
    ),
} | {
    f"{layers}, {rope}": dataclasses.replace(
        TINY, layers=layers,
        baseline=BaselineConfig(rope=rope, window=16, global_tokens=16, random_blocks=2),
    )
    for layers, rope in (("l", "all"), ("d", "all"), ("f", "all"), ("b", "all"), ("b", "window"))
}  # fmt: skip


def heads_of(model, tokens):
    """Each softmax of the last token: a dictionary from position to weight, times its gate."""
    layer = model.blocks[0].attention
    config = layer.attention_config()
    normed = model.blocks[0].attention_norm(model.embed(tokens))
    sides = normed, layer.mix(normed), layer.hash(tokens)
    keys, queries = layer.key_side(*sides), layer.query_side(*sides)
    positions = np.arange(LENGTH)
    turned_q, turned_k = (
        np.asarray(apply_rotary(x, positions, config.rope_base)) for x in (queries.q, keys.k)
    )
    q, k = np.asarray(queries.q), np.asarray(keys.k)
    found = []
    for head in range(TINY.num_heads):
        kv = head // 2
        local = {p: turned_q[0, -1, head] @ turned_k[0, p, kv] for p in range(LOCAL, LENGTH)}
        remote = {}
        kind = model.config.layers
        if kind == "s":
            blocks = np.asarray(pool_blocks(keys.block_inputs, keys.block_logits, config).features)
            scores = blocks[0, : LOCAL // SIZE, kv] @ np.asarray(queries.features)[0, -1, kv]
            chosen = np.argsort(-scores)[: config.top_k]
        elif kind == "b":
            chosen = [0, 1, *np.asarray(random_blocks(positions[-1:], 0, config))[0]]
        else:
            chosen = {"l": [], "d": range(LOCAL // SIZE), "f": range(2)}[kind]
        for block in chosen:
            for p in range(block * SIZE, (block + 1) * SIZE):
                if config.fusion == "sum":
                    remote[p] = q[0, -1, head] @ k[0, p, kv] + np.sqrt(8) * scores[block]
                elif not config.turns_remote:
                    remote[p] = q[0, -1, head] @ k[0, p, kv]
                else:
                    remote[p] = turned_q[0, -1, head] @ turned_k[0, p, kv]
        softmaxes = [(local | remote, 1.0)]
        if config.fusion == "sum" and remote:
            softmaxes = [(local, 1.0), (remote, float(queries.dynamic_gate[0, -1, head]))]
        for logits, gate in softmaxes:
            exponentials = {p: np.exp(x / np.sqrt(8)) for p, x in logits.items()}
            total = sum(exponentials.values())
            found.append({p: gate * x / total for p, x in exponentials.items()})
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_selection_and_weights(name):
    model, tokens = make(LAYERS[name]), make_tokens(1, LENGTH)
    context = 91
    cache = Engine(model, 192, chunk=32).prefill(tokens[:, :context])
    softmaxes = heads_of(model, tokens)
    selected = set().union(*softmaxes)
    for begin in (0, 13, 40, 64, 90):
        span = begin, begin + 6
        found = explain(model, cache, tokens[0, context:], begin + 1, span)
        assert bool(found.selected) == (begin + 1 in selected)
        expected = max(sum(x.get(p, 0) for p in range(*span)) for x in softmaxes)
        np.testing.assert_allclose(found.weight, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["sum", "softmax"])
def test_attention_of_an_answer(name):
    model, tokens = make(LAYERS[name]), make_tokens(1, LENGTH)
    context, question, answer = 91, tokens[0, 91:], np.array([5, 3, -1, 7])
    engine = Engine(model, 256, chunk=96)
    cache = engine.prefill(tokens[:, :context])
    before = engine.answer(cache, [question], 3)
    found = attention_of_answer(model, cache, question, answer[:1])
    expected = np.zeros(LENGTH)
    for softmax in heads_of(model, tokens):
        for place, share in softmax.items():
            expected[place] += share**2
    assert np.count_nonzero(expected[:context]) > SIZE
    np.testing.assert_allclose(found, expected[:context], rtol=1e-3, atol=1e-6)
    later = attention_of_answer(model, cache, np.append(question, answer[0]), answer[1:2])
    np.testing.assert_allclose(
        attention_of_answer(model, cache, question, answer), found + later, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(engine.answer(cache, [question], 3), before)


def test_attention_of_an_answer_needs_all_keys():
    model, tokens = make(LAYERS["sum"]), make_tokens(1, LENGTH)
    cache = Engine(model, 256, chunk=96, tier="host").prefill(tokens)
    with pytest.raises(ValueError, match="no sparse layer in tier='device'"):
        attention_of_answer(model, cache, tokens[0], tokens[0])
    assert why_unknown("device", model.config) is None
    assert "in tier='device' only, not 'host'" in why_unknown("host", model.config)
    local = dataclasses.replace(model.config, layers="ll")
    assert "layers='ll' has no sparse layer" in why_unknown("device", local)
