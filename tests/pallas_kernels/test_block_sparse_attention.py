"""block_sparse_attention: the portable path against the plain one, causality, poison, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import block_sparse_attention, xla
from pallas_kernels.csr import BlockCSR


def random_selection(rng, batch, tokens, heads, num_blocks, count):
    """Distinct random blocks a row, some rows with fewer or none."""
    index = rng.random((batch, tokens, heads, num_blocks)).argsort(-1)[..., :count]
    missing = np.arange(index.shape[-1]) >= rng.integers(0, count + 2, (batch, tokens, heads, 1))
    index = rng.permuted(np.where(missing, -1, index), axis=-1)
    score = np.where(index < 0, -np.inf, rng.normal(size=index.shape))
    return BlockCSR.from_selection(
        jnp.asarray(index, jnp.int32), jnp.asarray(score, jnp.float32), num_blocks
    )


def one_block(rng, batch, tokens, heads, num_blocks, count):
    index = np.full((batch, tokens, heads, 1), num_blocks - 1)
    return BlockCSR.from_selection(jnp.asarray(index, jnp.int32), None, num_blocks)


def bigbird(rng, batch, tokens, heads, num_blocks, count):
    """A window, one global column, random blocks and a last row that sees everything."""
    shape = (batch, heads, tokens, num_blocks)
    diagonal = np.arange(tokens)[:, None] * num_blocks // tokens - np.arange(num_blocks)
    mask = (np.abs(diagonal) <= 1) | (rng.random(shape) < 0.2)
    mask[..., 0], mask[..., -1, :] = True, True
    return BlockCSR.from_mask(mask, rng.normal(size=shape).astype(np.float32))


def nothing(rng, batch, tokens, heads, num_blocks, count):
    index = np.full((batch, tokens, heads, count), -1)
    return BlockCSR.from_selection(jnp.asarray(index, jnp.int32), None, num_blocks)


CASES = {
    # name: pattern, (B, T, N, Hkv, G, D, S, K)
    "random": (random_selection, (2, 37, 64, 2, 2, 8, 8, 3)),
    "incomplete last block": (random_selection, (1, 21, 30, 2, 4, 16, 8, 3)),
    "one block": (one_block, (1, 45, 20, 1, 1, 8, 4, 1)),
    "bigbird": (bigbird, (2, 24, 23, 1, 2, 8, 4, 2)),
    "nothing": (nothing, (1, 9, 16, 2, 1, 8, 8, 2)),
    "decode": (random_selection, (2, 1, 48, 2, 2, 8, 8, 4)),
}


def make(name, dtype=np.float32, seed=0):
    pattern, (batch, tokens, num_keys, heads, groups, dim, size, count) = CASES[name]
    rng = np.random.default_rng(seed)
    blocks = pattern(rng, batch, tokens, heads, -(-num_keys // size), count)
    q = rng.normal(size=(batch, tokens, heads * groups, dim)) * 2
    k, v = rng.normal(size=(2, batch, num_keys, heads, dim))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return q, k, v, blocks, size


@pytest.fixture
def small_steps(monkeypatch):
    """Several chunks of queries, several steps a chunk, tiles that overflow."""
    monkeypatch.setattr(xla, "_MIN_PARTIALS", 1)
    monkeypatch.setattr(xla, "_LOGITS_PER_STEP", {"cpu": 512})
    monkeypatch.setattr(xla, "_MIN_TILE_ROWS", 2)
    monkeypatch.setattr(xla, "_MAX_TILE_ROWS", 4)


def results_and_gradients(operands, size, cotangents, implementation):
    q, k, v, blocks = operands

    def attend(q, k, v, values):
        pattern = dataclasses.replace(blocks, values=values)
        out, lse = block_sparse_attention(
            q, k, v, pattern, block_size=size, scale=0.3, implementation=implementation
        )
        return out, jnp.where(lse > -jnp.inf, lse, 0)

    @jax.jit
    def run(q, k, v, values, cotangents):
        results, pullback = jax.vjp(attend, q, k, v, values)
        return results, pullback(cotangents)

    return run(q, k, v, blocks.values, cotangents)


def random_cotangents(q, rng, dtype=None):
    out = jnp.asarray(rng.normal(size=q.shape), q.dtype)
    return out, jnp.asarray(rng.normal(size=q.shape[:3]), dtype or jnp.float32)


def assert_same(got, expected, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, small_steps):
    q, k, v, blocks, size = make(name)
    cotangents = random_cotangents(q, np.random.default_rng(1))
    got, expected = (
        results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
        for implementation in ("xla", "reference")
    )
    assert_same(got, expected, 1e-5)


def test_one_chunk_and_one_step():
    q, k, v, blocks, size = make("random")
    cotangents = random_cotangents(q, np.random.default_rng(1))
    got, expected = (
        results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
        for implementation in ("xla", "reference")
    )
    assert_same(got, expected, 1e-5)


def test_bfloat16():
    q, k, v, blocks, size = make("random", jnp.bfloat16)
    cotangents = random_cotangents(q, np.random.default_rng(1))
    got, expected = (
        results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
        for implementation in ("xla", "reference")
    )
    assert_same(got, expected, 2e-2)


def test_empty_rows_and_removed_entries():
    q, k, v, blocks, size = make("random")
    values = np.array(blocks.values)
    values[:, :, : 3 * 5] = -np.inf  # the first five rows
    blocks = dataclasses.replace(blocks, values=jnp.asarray(values))
    out, lse = block_sparse_attention(q, k, v, blocks, block_size=size, implementation="xla")
    np.testing.assert_array_equal(out[:, :5], 0)
    np.testing.assert_array_equal(lse[:, :5], -np.inf)
    cotangents = random_cotangents(q, np.random.default_rng(1))
    _, gradients = results_and_gradients((q, k, v, blocks), size, cotangents, "xla")
    np.testing.assert_array_equal(gradients[0][:, :5], 0)
    np.testing.assert_array_equal(gradients[3][:, :, : 3 * 5], 0)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize("tokens,num_keys", [(0, 16), (3, 0)])
def test_no_queries_or_no_keys(tokens, num_keys):
    q, k = jnp.ones((1, tokens, 2, 8)), jnp.ones((1, num_keys, 1, 8))
    blocks = BlockCSR.from_mask(np.zeros((tokens, num_keys // 8), bool))
    out, lse = block_sparse_attention(q, k, k, blocks, block_size=8, implementation="xla")
    np.testing.assert_array_equal(out, np.zeros(q.shape))
    np.testing.assert_array_equal(lse, np.full(q.shape[:3], -np.inf))


def test_all_blocks_equal_dense_attention():
    q, k, v, _, size = make("random")
    blocks = BlockCSR.from_mask(np.ones((37, 8), bool), batch=2, num_kv_heads=2)
    out, lse = block_sparse_attention(q, k, v, blocks, block_size=size, implementation="xla")
    grouped = np.asarray(q, np.float64).reshape(2, 37, 2, 2, 8)
    logits = np.einsum("bthgd,bnhd->bthgn", grouped, np.asarray(k, np.float64)) / np.sqrt(8)
    total = np.exp(logits).sum(-1)
    dense = np.einsum("bthgn,bnhd->bthgd", np.exp(logits), np.asarray(v, np.float64))
    dense /= total[..., None]
    np.testing.assert_allclose(out, dense.reshape(out.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, np.log(total).reshape(lse.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["random", "bigbird"])
def test_gradients_by_finite_differences(name, small_steps):
    with jax.enable_x64(True):
        q, k, v, blocks, size = make(name, np.float64)
        values = jnp.asarray(np.where(np.isfinite(blocks.values), blocks.values, -np.inf))
        rng = np.random.default_rng(2)
        cotangents = random_cotangents(q, rng, jnp.float64)

        @jax.jit
        def loss(q, k, v, values):
            out, lse = block_sparse_attention(
                q, k, v, dataclasses.replace(blocks, values=values), block_size=size,
                implementation="xla",
            )  # fmt: skip
            lse = jnp.where(lse > -jnp.inf, lse, 0)
            return jnp.sum(out * cotangents[0]) + jnp.sum(lse * cotangents[1])

        operands = (q, k, v, values)
        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*operands)
        for place, (x, gradient) in enumerate(zip(operands, gradients, strict=True)):
            direction = rng.normal(size=x.shape)

            def moved(step, place=place, x=x, direction=direction):
                return loss(*operands[:place], x + step * direction, *operands[place + 1 :])

            numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_later_tokens_do_not_matter_bit_for_bit(seed, dtype, monkeypatch):
    """Tiles of the default size, crowded blocks, one chunk and step (even seeds) or several."""
    if seed % 2:
        monkeypatch.setattr(xla, "_LOGITS_PER_STEP", {"cpu": 4096})
        monkeypatch.setattr(xla, "_MIN_PARTIALS", 1)
    rng = np.random.default_rng(seed)
    tokens, num_blocks, count = 150, 10, 3
    q = rng.normal(size=(1, tokens, 4, 16))
    k, v = (jnp.asarray(rng.normal(size=(1, num_blocks * 8, 2, 16)), dtype) for _ in "kv")

    def selection(rng, tokens, skew):
        noise = rng.random((1, tokens, 2, num_blocks)) + skew * np.arange(num_blocks)
        index = noise.argsort(-1)[..., :count]
        return np.where(rng.random(index.shape) < 0.1, -1, index)

    @jax.jit
    def attend(q, index, score):
        blocks = BlockCSR.from_selection(index, score, num_blocks)
        return block_sparse_attention(
            q.astype(dtype), k, v, blocks, block_size=8, implementation="xla"
        )

    index, score = selection(rng, tokens, 0), rng.normal(size=(1, tokens, 2, count))
    before = attend(q, index, score)
    for t, skew in ((1, 0), (40, 0.1), (111, -1), (149, 0)):
        later = tokens - t
        changed = [x.copy() for x in (q, index, score)]
        changed[0][:, t:] = rng.normal(size=q[:, t:].shape)
        changed[1][:, t:] = selection(rng, later, skew)
        changed[2][:, t:] = rng.normal(size=score[:, t:].shape)
        after = attend(*changed)
        for a, b in zip(before, after, strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_array_equal(a[:, :t], b[:, :t])
            assert np.any(a[:, t:] != b[:, t:])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_blocks_that_nobody_selected_do_not_leak(implementation, small_steps):
    q, k, v, blocks, size = make("random")
    indices = np.where(blocks.indices == 0, -1, blocks.indices)
    indices = np.where(indices == 5, -1, indices)
    values = np.where(indices < 0, -np.inf, blocks.values)
    blocks = dataclasses.replace(blocks, indices=jnp.asarray(indices), values=jnp.asarray(values))
    cotangents = random_cotangents(q, np.random.default_rng(1))
    clean = results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
    poison = np.zeros((1, k.shape[1], 1, 1), np.float32)
    poison[:, :size] = poison[:, 5 * size : 6 * size] = np.nan
    dirty = results_and_gradients(
        (q, k + poison, v + poison, blocks), size, cotangents, implementation
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


def test_transformations():
    """vmap over the pattern and the operands, under checkpoint, jit and grad."""
    q, k, v, blocks, size = make("random")

    def loss(q, k, v, blocks, implementation):
        blocks = jax.tree.map(lambda x: x[None], blocks)
        out, lse = block_sparse_attention(
            q[None], k[None], v[None], blocks, block_size=size, implementation=implementation
        )
        return jnp.sum(out**2) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0) ** 2)

    def gradients(implementation):
        checkpointed = jax.checkpoint(loss, static_argnums=4)
        gradient = jax.grad(checkpointed, (0, 1, 2, 3), allow_int=True)
        return jax.jit(jax.vmap(lambda *operands: gradient(*operands, implementation)))(
            q, k, v, blocks
        )

    got, expected = gradients("xla"), gradients("reference")
    assert_same(got[:3], expected[:3], 1e-5)
    assert_same(got[3].values, expected[3].values, 1e-5)
    assert got[3].indices.dtype == jax.dtypes.float0


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.long), True])
def test_memory_is_linear(backward):
    def temporary(tokens):
        def shape(*sizes, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(sizes, dtype)

        def forward(q, k, v, index, score):
            blocks = BlockCSR.from_selection(index, score, tokens // 64)
            return block_sparse_attention(q, k, v, blocks, block_size=64, implementation="xla")

        def pullback(q, k, v, index, score, *cotangents):
            return jax.vjp(lambda *x: forward(*x[:3], index, x[3]), q, k, v, score)[1](cotangents)

        q, k = shape(1, tokens, 2, 64), shape(1, tokens, 1, 64)
        selection = [shape(1, tokens, 1, 16, dtype=dtype) for dtype in (jnp.int32, jnp.float32)]
        if backward:
            lse = shape(1, tokens, 2, dtype=jnp.float32)
            lowered = jax.jit(pullback).lower(q, k, k, *selection, q, lse)
        else:
            lowered = jax.jit(forward).lower(q, k, k, *selection)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, middle, large = map(temporary, (2**15, 2**16, 2**17))
    assert middle <= 2.1 * small
    assert large <= 2.1 * middle


def test_bad_inputs():
    q, k, v, blocks, size = make("random")

    def attend(q=q, k=k, v=v, blocks=blocks, size=size, **options):
        return block_sparse_attention(q, k, v, blocks, block_size=size, **options)

    replace = dataclasses.replace
    for error, match, call in (
        (ValueError, "k has shape", lambda: attend(k=k[..., :3])),
        (ValueError, "Hq=3 must be a multiple", lambda: attend(q=q[:, :, :3])),
        (TypeError, "bfloat16", lambda: attend(q=q.astype(jnp.bfloat16))),
        (ValueError, "blocks.indptr has shape", lambda: attend(q=q[:, 1:])),
        (ValueError, "num_columns=8 must be the 16 blocks", lambda: attend(size=4)),
        (ValueError, "block_size=0", lambda: attend(size=0)),
        (
            TypeError,
            "blocks.indices is float32",
            lambda: attend(blocks=replace(blocks, indices=blocks.values)),
        ),
        (
            TypeError,
            "blocks.values is int32",
            lambda: attend(blocks=replace(blocks, values=blocks.indices)),
        ),
        (ValueError, "implementation='cuda'", lambda: attend(implementation="cuda")),
    ):
        with pytest.raises(error, match=match):
            call()
