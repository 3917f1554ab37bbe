"""Chunked prefill and decode against the one-shot forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.cache import Engine, Sampling
from sparsex_jax.cache.layer import empty_layers
from sparsex_jax.cache.model import attending_tokens, extend, tokens_to_go_on
from tests.modules.test_transformer import ATTENTION, TINY, make, make_tokens, predict

CONFIGS = {
    "default": TINY,
    "sparse twice": dataclasses.replace(TINY, layers="sls"),
    "softmax": dataclasses.replace(
        TINY, attention=dataclasses.replace(ATTENTION, fusion="softmax", landmarks="off")
    ),
    "local last": dataclasses.replace(TINY, layers="sll"),  # in which few tokens of a chunk attend
    "no convolution": dataclasses.replace(TINY, conv_width=0, ngrams=()),
}


def few(*names):
    """Names of configs, of which all but these take long."""
    return [x if x in names else pytest.param(x, marks=pytest.mark.long) for x in CONFIGS]


@pytest.mark.parametrize("count", [2, 20])
def test_contexts_shorter_than_what_is_remembered(count):
    model, tokens = make(), make_tokens(1, count)
    remembered = nnx.jit(lambda model: model.prefill(tokens)[1])(model)
    cache = Engine(model, 32, chunk=8).prefill(tokens)
    for found, layer in zip(remembered, cache.layers, strict=True):
        np.testing.assert_allclose(found.history, layer.recent.history, rtol=2e-4, atol=2e-4)
        if found.tokens is not None:
            np.testing.assert_array_equal(found.tokens, layer.recent.tokens)


@pytest.mark.parametrize("name", few("default"))
def test_losses_are_those_of_the_forward_pass(name):
    model, tokens = make(CONFIGS[name]), make_tokens(2, 150)
    logits = np.asarray(predict(model, tokens[:, :-1]), np.float64)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - chosen
    read = []
    found = Engine(model, 160, batch_size=2, chunk=64).losses(tokens, read.append)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    assert found.shape == (2, 149) and read == [64, 128, 149]
    with pytest.raises(ValueError, match=r"shape \(2, 1\): use \[batch_size, 2 or more\]"):
        Engine(model, 160, batch_size=2, chunk=64).losses(tokens[:, :1])


@pytest.mark.parametrize("name", few("default", "local last"))
def test_any_chunking_equals_the_forward_pass(name):
    model, tokens = make(CONFIGS[name]), make_tokens(2, 150)
    expected = predict(model, tokens)
    step = nnx.jit(extend)
    chunkings = ((1,) * 3 + (29,) * 5 + (1,) * 2,)
    if name in ("sparse twice", "local last"):
        chunkings += (150,), (64, 64, 22)
    for chunks in chunkings:
        layers, read = empty_layers(model.config, 150, 2, 150), 0
        for chunk in chunks:
            part = tokens[:, read : read + chunk]
            logits, layers = step(model, layers, part, jnp.int32(read), jnp.int32(chunk))
            read += chunk
            np.testing.assert_allclose(logits, expected[:, read - 1], rtol=2e-4, atol=2e-4)


def test_padding_of_a_chunk_is_forgotten():
    model, tokens = make(), make_tokens(1, 120)
    expected = predict(model, tokens)[:, -1]
    layers, read, step = empty_layers(model.config, 120, 1, 32), 0, nnx.jit(extend)
    for valid in (32, 7, 32, 1, 19, 29):
        chunk = np.full((1, 32), 63, np.int32)
        chunk[:, :valid] = tokens[:, read : read + valid]
        logits, layers = step(model, layers, chunk, jnp.int32(read), jnp.int32(valid))
        read += valid
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


def greedy(model, tokens, count):
    """Greedy continuation by the one-shot forward pass, which sees nothing of what is behind."""
    tokens = np.pad(tokens, ((0, 0), (0, count)))
    for place in range(tokens.shape[1] - count, tokens.shape[1]):
        tokens[:, place] = np.argmax(np.asarray(predict(model, tokens))[:, place - 1], axis=-1)
    return tokens[:, -count:]


def test_generation_equals_the_forward_pass_and_keeps_the_cache():
    model, tokens = make(), make_tokens(2, 100)
    expected = greedy(model, tokens, 6)
    engine = Engine(model, capacity=128, batch_size=2, chunk=32)
    np.testing.assert_array_equal(engine.generate(tokens, 6), expected)
    seen = []
    cache = engine.prefill(tokens[:, :90], seen.append)
    assert seen == [32, 64, 90]
    for _ in range(2):
        np.testing.assert_array_equal(engine.answer(cache, tokens[:, 90:], 6), expected)
    stop = int(expected[0, 2])
    stopped = engine.answer(cache, tokens[:, 90:], 6, stop_tokens=(stop,))
    for row, tokens_of_row in zip(stopped, expected, strict=True):
        ends = np.flatnonzero(tokens_of_row == stop)
        kept = ends[0] + 1 if ends.size else 6
        np.testing.assert_array_equal(row[:kept], tokens_of_row[:kept])
        assert (row[kept:] == -1).all()


def test_one_program_answers_whatever_the_limit():
    engine, tokens = Engine(make(), capacity=128, chunk=32), make_tokens(1, 70)
    cache = engine.prefill(tokens[:, :60])
    longest = engine.answer(cache, tokens[:, 60:], 9)
    for limit in (1, 4):
        found = engine.answer(cache, tokens[:, 60:], limit)
        np.testing.assert_array_equal(found, longest[:, :limit])
    assert engine._answer._cache_size() == 1


def test_chunks_that_others_follow_skip_the_last_layers():
    model, tokens = make(dataclasses.replace(TINY, layers="sl")), make_tokens(1, 110)
    assert attending_tokens(model.config, 48, logits=False, goes_on=True) == [0, 0]
    assert tokens_to_go_on(model.config) == 34 and tokens_to_go_on(TINY) == 0
    expected = greedy(model, tokens, 4)
    engine = Engine(model, capacity=128, chunk=48)
    # Behind the second chunk there are too few tokens to fill a window, or enough.
    for read in (48 + 48 + 5, 48 + 48 + 13, 48 + 48):
        cache = engine.prefill(tokens[:, :read])
        np.testing.assert_array_equal(engine.answer(cache, tokens[:, read:], 4), expected)


@pytest.mark.long
def test_no_step_is_wasted(monkeypatch):
    from sparsex_jax.cache import engine as module

    read = []

    def counted(model, layers, tokens, *rest, **more):
        jax.debug.callback(lambda size=tokens.shape[1]: read.append(size))
        return extend(model, layers, tokens, *rest, **more)

    monkeypatch.setattr(module, "extend", counted)
    engine = Engine(make(), capacity=64, chunk=16)
    cache = engine.prefill(make_tokens(1, 10))
    jax.effects_barrier()
    read.clear()
    answer = engine.answer(cache, make_tokens(1, 2), 5)
    jax.effects_barrier()
    assert sorted(read) == [1] * 4 + [module.SUFFIX_UNIT]
    read.clear()
    engine.answer(cache, make_tokens(1, 2), 5, stop_tokens=[int(answer[0, 0])])
    jax.effects_barrier()
    assert read == [module.SUFFIX_UNIT]


def test_bad_arguments():
    model = make()
    engine = Engine(model, capacity=64, chunk=16)
    with pytest.raises(ValueError, match="65 tokens are more than capacity=64"):
        engine.prefill(make_tokens(1, 65))
    with pytest.raises(ValueError, match="shape"):
        engine.prefill(make_tokens(2, 5))
    with pytest.raises(ValueError, match="suffix has 0 tokens"):
        engine.answer(engine.prefill(make_tokens(1, 5)), make_tokens(1, 0), 1)
    for wrong, message in (
        ([[3, 64]], "tokens hold 64 but must lie within the vocabulary: use 0 to 63"),
        ([[-1, 3]], "tokens hold -1"),
        ([[0.5, 3]], "tokens have dtype float64: use an integer type"),
    ):
        for call in (engine.prefill, lambda x: engine.generate(x, 1)):
            with pytest.raises(ValueError, match=message):
                call(np.array(wrong))
    for call in (engine.generate, lambda *x: engine.answer(engine.prefill(make_tokens(1, 5)), *x)):
        for count in (0, -3):
            with pytest.raises(ValueError, match=f"max_new_tokens={count} must be positive"):
                call(make_tokens(1, 3), count)
    with pytest.raises(ValueError, match="capacity=0 must be positive"):
        Engine(model, capacity=0)
    all_landmarks = dataclasses.replace(ATTENTION, landmarks="all")
    with pytest.raises(ValueError, match="has no cache"):
        Engine(make(dataclasses.replace(TINY, attention=all_landmarks)), capacity=64)


def test_sequences_of_different_lengths_are_as_alone_and_seeds_their_own():
    model = make()
    rows = [make_tokens(1, size, seed=size)[0] for size in (100, 3, 33)]
    engine, alone = Engine(model, 128, batch_size=3, chunk=32), Engine(model, 128, chunk=32)
    sampling, seeds = Sampling(4.0, 0.95), (4, 2**32 - 1, 4)  # at 4 nothing is certain
    drawn = engine.generate(rows, 5, sampling=sampling, seeds=seeds)
    for row, tokens, seed in zip(drawn, rows, seeds, strict=True):
        found = alone.generate([tokens], 5, sampling=sampling, seeds=seed)
        np.testing.assert_array_equal(row, found[0])
    other = alone.generate(rows[:1], 5, sampling=sampling, seeds=5)
    assert not np.array_equal(drawn[:1], other)
    with pytest.raises(ValueError, match="seeds=-1 must be one for each of 3 sequences"):
        engine.generate(rows, 5, seeds=-1)
    with pytest.raises(ValueError, match=r"batch_size=3 sequences: use \[batch_size, tokens\]"):
        engine.generate(rows[:2], 5)


def test_large_chunks_attend_in_parts(monkeypatch):
    from sparsex_jax.cache import layer

    monkeypatch.setattr(layer, "CHUNK", 16)
    model, tokens = make(dataclasses.replace(TINY, layers="sl")), make_tokens(1, 124)
    expected = predict(model, tokens)
    layers, step = empty_layers(model.config, 124, 1, 62), nnx.jit(extend)
    for read in (0, 62):  # four parts, the last of which is not full
        part = tokens[:, read : read + 62]
        logits, layers = step(model, layers, part, jnp.int32(read), jnp.int32(62))
        np.testing.assert_allclose(logits, expected[:, read + 61], rtol=2e-4, atol=2e-4)
