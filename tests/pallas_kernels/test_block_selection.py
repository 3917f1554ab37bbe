"""select_blocks: the portable path against the plain one, ties and limits, and what leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_selection import gradients, select_blocks, xla

IMPLEMENTATIONS = ("reference", "xla")


def make(rng, batch=2, tokens=13, num_blocks=9, heads=2, dim=4, levels=None):
    u, c = (
        rng.normal(size=(batch, tokens, heads, dim)),
        rng.normal(size=(batch, num_blocks, heads, dim)),
    )
    if levels:
        u, c = np.round(u * levels) / levels, np.round(c * levels) / levels
    limit = rng.integers(-1, num_blocks + 2, size=(batch, tokens))
    start = rng.integers(-2, max(num_blocks, 1), size=(batch, tokens))
    return u.astype(np.float32), c.astype(np.float32), limit, start


def by_hand(u, c, limit, start, count):
    """Python's stable sort, one query at a time."""
    batch, tokens, heads, _ = u.shape
    index = np.full((batch, tokens, heads, count), -1, np.int32)
    score = np.full((batch, tokens, heads, count), -np.inf, np.float32)
    for b, t, h in np.ndindex(batch, tokens, heads):
        blocks = range(max(start[b, t], 0), min(limit[b, t], c.shape[1]))
        scores = {n: np.float32(u[b, t, h].astype(np.float64) @ c[b, n, h]) for n in blocks}
        best = sorted(blocks, key=lambda n: -scores[n])[:count]
        index[b, t, h, : len(best)] = best
        score[b, t, h, : len(best)] = [scores[n] for n in best]
    return index, score


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(xla, "_FLOATS_PER_CHUNK", 1)
    monkeypatch.setattr(xla, "_MIN_ROWS", 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_blocks", [0, 2, 9])
@pytest.mark.parametrize("levels", [None, 1])
def test_selection(implementation, num_blocks, levels, small_chunks):
    rng = np.random.default_rng(num_blocks)
    u, c, limit, start = make(rng, num_blocks=num_blocks, levels=levels)
    index, score = select_blocks(
        jnp.asarray(u), jnp.asarray(c), limit, 4, start=start, implementation=implementation
    )
    expected_index, expected_score = by_hand(u, c, limit, start, 4)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(score, expected_score, rtol=1e-5, atol=1e-6)
    assert index.dtype == jnp.int32
    assert score.dtype == jnp.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_zero_ties_with_zero(implementation):
    u, c = jnp.ones((1, 1, 1, 1)), jnp.asarray([-1.0, -0.0, 0.0, -0.0]).reshape(1, 4, 1, 1)
    index, _ = select_blocks(u, c, np.array([4]), 3, implementation=implementation)
    np.testing.assert_array_equal(index[0, 0, 0], [1, 2, 3])


@pytest.mark.parametrize("tokens,count", [(0, 3), (3, 0)])
def test_nothing_to_select(tokens, count):
    u, c, limit, _ = make(np.random.default_rng(0), tokens=tokens)
    index, score = select_blocks(jnp.asarray(u), jnp.asarray(c), limit, count)
    assert index.shape == score.shape == (2, tokens, 2, count)


def test_limit_is_shared_by_the_batch():
    u, c, limit, _ = make(np.random.default_rng(0))
    shared = select_blocks(jnp.asarray(u), jnp.asarray(c), limit[0], 3)
    full = select_blocks(jnp.asarray(u), jnp.asarray(c), np.stack([limit[0]] * 2), 3)
    for a, b in zip(shared, full, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_blocks", [2, 9])
def test_gradients(num_blocks, small_chunks):
    rng = np.random.default_rng(3)
    u, c, limit, start = make(rng, num_blocks=num_blocks)
    cotangent = rng.normal(size=(*u.shape[:3], 4)).astype(np.float32)

    def gradients(implementation):
        def score(u, c):
            return select_blocks(u, c, limit, 4, start=start, implementation=implementation)[1]

        return jax.jit(lambda u, c: jax.vjp(score, u, c)[1](jnp.asarray(cotangent)))(u, c)

    expected = jax.vjp(lambda u, c: jnp.einsum("bthd,bnhd->bthn", u, c), u, c)[1]
    index = by_hand(u, c, limit, start, 4)[0]
    dense = np.zeros((*u.shape[:3], num_blocks), np.float32)
    for place in zip(*np.nonzero(index >= 0), strict=True):
        dense[*place[:3], index[place]] = cotangent[place]
    for got in (gradients("xla"), gradients("reference")):
        for a, b in zip(got, expected(jnp.asarray(dense)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entries", [7, 2**20])
def test_gradients_by_sorted_entries(entries, monkeypatch):
    monkeypatch.setattr(gradients, "_MAX_ENTRIES", entries)
    rng = np.random.default_rng(3)
    u, c = (rng.standard_normal((2, n, 3, 8)).astype(np.float32) for n in (150, 40))
    index = rng.permuted(np.tile(np.arange(40, dtype=np.int32), (900, 1)), axis=1)[:, :6]
    index[:, 0] = np.where(np.any(index == 5, axis=1), index[:, 0], 5)  # for all: many tiles
    index[(index == 7) | (rng.random(index.shape) < 0.2)] = -1
    index = index.reshape(2, 150, 3, 6)
    c[:, 7] = np.nan
    residuals = tuple(map(jnp.asarray, (u, c, index)))
    cotangents = None, jnp.asarray(rng.standard_normal(index.shape), jnp.float32)
    found, expected = (
        jax.jit(lambda *x, f=f: f(6, x, cotangents)[:2])(*residuals)
        for f in (gradients.select_bwd, xla.select_bwd)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)
    assert not np.any(np.asarray(found[1][:, 7]))


def test_gradients_scatter_to_distinct_places(small_chunks, monkeypatch):
    # 13 tokens in chunks of 5: the last chunk is padded.
    u, c, limit, start = make(np.random.default_rng(3))
    seen, places = [], xla._places
    monkeypatch.setattr(xla, "_places", lambda *x: seen.append(places(*x)) or seen[-1])

    def score(u, c):
        return select_blocks(u, c, limit, 4, start=start, implementation="xla")[1]

    with jax.disable_jit():
        out, pull = jax.vjp(score, jnp.asarray(u), jnp.asarray(c))
        pull(jnp.ones_like(out))
    rows = np.concatenate([np.asarray(x).reshape(-1, 4) for x in seen])
    assert len(rows) == 3 * 2 * 5 * 2 and rows.min() >= 0
    assert all(len(set(row)) == 4 for row in rows.tolist())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_beyond_the_limit_do_not_leak(implementation):
    rng = np.random.default_rng(4)
    u, c, _, _ = make(rng)
    limit, poisoned = np.arange(13) // 3, c.copy()
    poisoned[:, 4:] = np.nan

    def score(u, c):
        return select_blocks(u, c, limit, 3, implementation=implementation)[1]

    cotangent = jnp.asarray(rng.normal(size=(2, 13, 2, 3)).astype(np.float32))
    clean, clean_vjp = jax.vjp(score, u, c)
    dirty, dirty_vjp = jax.vjp(score, u, poisoned)
    np.testing.assert_array_equal(clean, dirty)
    for a, b in zip(clean_vjp(cotangent), dirty_vjp(cotangent), strict=True):
        np.testing.assert_array_equal(a, b)


def test_later_queries_do_not_matter_bit_for_bit(small_chunks):
    rng = np.random.default_rng(5)
    u, c, limit, _ = make(rng, dim=16)
    select = jax.jit(lambda u, limit: select_blocks(u, c, limit, 4, implementation="xla"))
    before = select(u, jnp.asarray(limit))
    for t in (1, 6, 12):
        changed, moved = u.copy(), limit.copy()
        changed[:, t:], moved[:, t:] = rng.normal(size=u[:, t:].shape), 9
        after = select(changed, jnp.asarray(moved))
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[:, :t], np.asarray(b)[:, :t])


def test_bfloat16_and_transformations():
    rng = np.random.default_rng(6)
    u, c, limit, _ = make(rng, levels=2)

    @jax.checkpoint
    def total(u, c):
        index, score = select_blocks(u[None], c[None], limit[0], 3, implementation="xla")
        return jnp.sum(jnp.where(index >= 0, score, 0) ** 2)

    exact = jax.vmap(jax.grad(total, (0, 1)))(u, c)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        got = jax.jit(jax.vmap(jax.grad(total, (0, 1))))(u.astype(dtype), c.astype(dtype))
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == dtype
            scale = np.abs(b).max()
            np.testing.assert_allclose(np.asarray(a, np.float32) / scale, b / scale, atol=tolerance)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear(backward):
    def temporary(tokens):
        u = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.bfloat16)
        c = jax.ShapeDtypeStruct((1, tokens // 64, 1, 64), jnp.bfloat16)
        limit = jax.ShapeDtypeStruct((tokens,), jnp.int32)

        def forward(u, c, limit):
            return select_blocks(u, c, limit, 16, implementation="xla")

        def pullback(u, c, limit, score_bar):
            return jax.vjp(lambda u, c: forward(u, c, limit)[1], u, c)[1](score_bar)

        score = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        lowered = (
            jax.jit(pullback).lower(u, c, limit, score)
            if backward
            else jax.jit(forward).lower(u, c, limit)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, middle, large = map(temporary, (2**15, 2**16, 2**17))
    assert middle <= 2.1 * small
    assert large <= 2.1 * middle


def test_bad_inputs():
    u, c, limit, _ = map(jnp.asarray, make(np.random.default_rng(0)))
    select = functools.partial(select_blocks, limit=limit, count=3)
    for error, match, call in (
        (ValueError, "u has shape", lambda: select(u[0], c)),
        (ValueError, "c has shape", lambda: select(u, c[..., :3])),
        (TypeError, "bfloat16", lambda: select(u, c.astype(jnp.bfloat16))),
        (ValueError, "limit has shape", lambda: select_blocks(u, c, limit[:, :3], 3)),
        (TypeError, "limit is float32", lambda: select_blocks(u, c, limit * 1.0, 3)),
        (ValueError, "count=-1", lambda: select_blocks(u, c, limit, -1)),
        (ValueError, "implementation='mosaic'", lambda: select(u, c, implementation="mosaic")),
    ):
        with pytest.raises(error, match=match):
            call()
