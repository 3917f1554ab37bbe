"""The baselines' attention against a plain softmax over a mask; random blocks; causality."""

import dataclasses

import jax
import numpy as np
import pytest

from sparsex_jax.baselines import baseline_attention, make_pattern, random_blocks
from sparsex_jax.config import AttentionConfig, BaselineConfig, ConfigError, ModelConfig
from sparsex_jax.rotary import apply_rotary
from tests.modules.test_transformer import ATTENTION

KINDS = ("d", "f", "b")
SIZE = ATTENTION.block_size
CONFIG = ModelConfig(
    layers="dfb", attention=ATTENTION,
    baseline=BaselineConfig(window=16, global_tokens=8, random_blocks=2),
)  # fmt: skip
PATTERNS = {kind: make_pattern(CONFIG, number) for number, kind in enumerate(KINDS)}
PATTERNS |= {
    f"{kind}, window": dataclasses.replace(pattern, rope="window")
    for kind, pattern in PATTERNS.items()
}


def mask_of(pattern, starts):
    """bool [T, T], query by query, from the words of the docs; starts: of each query's document."""
    tokens = len(starts)
    mask = np.zeros((tokens, tokens), bool)
    for t, start in enumerate(starts):
        if pattern.kind == "dense":
            mask[t, start : t + 1] = True
            continue
        local = max(start, SIZE * ((t - pattern.window + 1) // SIZE))
        mask[t, local : t + 1] = True
        mask[t, start : min(start + pattern.global_tokens, local)] = True
        if pattern.kind == "bigbird":
            for block in np.asarray(random_blocks(np.int32([t]), np.int32([start]), pattern))[0]:
                if block >= 0:
                    assert not mask[t, block * SIZE : (block + 1) * SIZE].any()
                    mask[t, block * SIZE : (block + 1) * SIZE] = True
    return mask


def expected(q, k, v, pattern, starts):
    mask, positions = mask_of(pattern, starts), np.arange(len(starts))
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, groups, axis=2) for x in (k, v))

    def product(q, k):
        return np.einsum("bthd,bnhd->bhtn", *(np.asarray(x, np.float64) for x in (q, k)))

    turned, plain = product(*(apply_rotary(x, positions, 1e4) for x in (q, k))), product(q, k)
    local = np.maximum(starts, SIZE * ((positions - pattern.window + 1) // SIZE))
    near = positions >= local[:, None]
    logits = np.where(near | (pattern.rope == "all"), turned, plain) / np.sqrt(q.shape[-1])
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhtn,bnhd->bthd", weights / weights.sum(-1, keepdims=True), v)


def draw(tokens, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, tokens, 4, 8), (2, tokens, 2, 8), (2, tokens, 2, 8))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("kind", "tokens"), [(kind, 123) for kind in PATTERNS] + [("d", 7), ("f", 16), ("b", 16)]
)
def test_equals_a_softmax_over_the_pattern(kind, tokens):
    q, k, v = draw(tokens)
    pattern = PATTERNS[kind]
    starts = np.zeros(tokens, int)
    assert not np.triu(mask_of(pattern, starts), 1).any()
    out = baseline_attention(q, k, v, pattern=pattern)
    np.testing.assert_allclose(out, expected(q, k, v, pattern, starts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "d, window"])
def test_packed_documents_see_their_own(kind):
    q, k, v = draw(160)
    segment_ids = np.broadcast_to(np.repeat([4, 2, 9], [16, 104, 40]), (2, 160)).astype(np.int32)
    starts = np.repeat([0, 16, 120], [16, 104, 40])
    pattern = PATTERNS[kind]
    mask = mask_of(pattern, starts)
    out = baseline_attention(q, k, v, pattern=pattern, segment_ids=segment_ids)
    np.testing.assert_allclose(out, expected(q, k, v, pattern, starts), rtol=1e-4, atol=1e-5)
    alone = mask_of(pattern, [0] * 104)
    np.testing.assert_array_equal(mask[16:120, 16:120], alone)
    with pytest.raises(ValueError, match="multiple of block_size=8"):
        baseline_attention(q, k, v, pattern=pattern, segment_ids=np.roll(segment_ids, 1, axis=1))


@pytest.mark.parametrize("kind", PATTERNS)
def test_queries_of_the_last_tokens_get_what_they_get_among_all(kind):
    q, k, v = draw(120)
    segment_ids = np.broadcast_to(np.repeat([4, 2, 9], [16, 64, 40]), (2, 120)).astype(np.int32)
    for ids in (None, segment_ids):
        whole = baseline_attention(q, k, v, pattern=PATTERNS[kind], segment_ids=ids)
        last = baseline_attention(q[:, 69:], k, v, pattern=PATTERNS[kind], segment_ids=ids)
        np.testing.assert_allclose(last, whole[:, 69:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "d, window"])
def test_causality_is_strict(kind):
    attend = jax.jit(lambda *x: baseline_attention(*x, pattern=PATTERNS[kind]))
    first, other = draw(120), draw(120, seed=1)
    whole = attend(*first)
    for changed in (1, 40, 64, 119):
        mixed = [
            np.concatenate((a[:, :changed], b[:, changed:]), axis=1)
            for a, b in zip(first, other, strict=True)
        ]
        np.testing.assert_array_equal(whole[:, :changed], attend(*mixed)[:, :changed])


def test_random_blocks_are_different_remote_complete_and_shared_by_a_block():
    pattern = dataclasses.replace(PATTERNS["b"], random_blocks=3)
    positions = np.arange(400, dtype=np.int32)
    index = np.asarray(jax.jit(random_blocks, static_argnums=2)(positions, 0, pattern))
    assert index.shape == (400, 3)
    by_block = index.reshape(-1, SIZE, 3)
    assert (by_block == by_block[:, :1]).all()
    for block, chosen in enumerate(by_block[:, 0]):
        # between the global block and the window of two blocks
        allowed = max(0, block - 2 - 1)
        found = chosen[chosen >= 0]
        assert len(set(found)) == len(found) == min(3, allowed)
        assert ((found >= 1) & (found < 1 + allowed)).all()
        assert (chosen[len(chosen) - len(found) :] >= 0).all()


def test_random_blocks_depend_on_seed_and_layer_and_are_spread_evenly():
    positions = np.arange(0, 8 * 40_000, 8, dtype=np.int32)
    base = PATTERNS["b"]
    draws = [
        np.asarray(random_blocks(positions, 0, dataclasses.replace(base, **change)))
        for change in ({}, {"layer": 7}, {"random_seed": 1})
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (draws[one][100:] == draws[other][100:]).mean() < 0.01
    share = (draws[0][1000:] - 1) / (positions[1000:] // 8 - 3)[:, None]
    counts = np.histogram(share, bins=10, range=(0, 1))[0]
    np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.005)
    seeds = (dataclasses.replace(base, random_seed=seed) for seed in range(300))
    eighth = np.int32([7 * SIZE])
    few = [tuple(sorted(np.asarray(random_blocks(eighth, 0, seed))[0])) for seed in seeds]
    # of four blocks two: six sets, each as likely as the others
    counts = [few.count(pair) for pair in set(few)]
    assert len(counts) == 6 and min(counts) > 25 and max(counts) < 80


def test_windows_give_as_many_keys_as_a_sparse_layer_selects():
    attention = AttentionConfig(window=128, block_size=64, top_k=16)
    config = ModelConfig(layers="dfb", attention=attention)
    keys = 128 + 16 * 64
    assert config.baseline_window("f") + 128 == keys
    assert config.baseline_window("b") + 128 + 3 * 64 == keys
    assert make_pattern(config, 2).window == config.baseline_window("b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 100}, "baseline.window=100 of longformer layers must be a positive multiple"),
        ({"global_tokens": 100}, "baseline.global_tokens=100 of longformer"),
    ],
)
def test_bad_patterns(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(layers="f", baseline=BaselineConfig(**fields))
    ModelConfig(layers="s", baseline=BaselineConfig(**fields))
    with pytest.raises(ConfigError, match="random_blocks=0 must be positive"):
        BaselineConfig(random_blocks=0)
    with pytest.raises(ConfigError, match="baseline.window=-192 of bigbird"):
        ModelConfig(layers="b", attention=AttentionConfig(window=64, top_k=1))
