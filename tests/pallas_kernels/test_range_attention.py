"""range_attention against its reference, and what it promises besides numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.range_attention import range_attention


def operands(seed, batch, tokens, keys, num_kv_heads, groups, dim, dtype=np.float32):
    rng = np.random.default_rng(seed)
    heads = num_kv_heads * groups
    shapes = [(batch, tokens, heads, dim)] + [(batch, keys, num_kv_heads, dim)] * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    bias = rng.normal(size=(batch, keys, num_kv_heads))
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    return q, k, v, jnp.asarray(bias, np.promote_types(np.float32, dtype))


def window(tokens, size, block):
    t = np.arange(tokens)
    return block * np.maximum(0, (t - size + 1) // block), t + 1


def ragged(seed, batch, tokens, keys):
    rng = np.random.default_rng(seed)
    start, end = np.sort(rng.integers(-2, keys + 3, (2, batch, tokens)), axis=-1)
    return start - rng.integers(0, keys + 1, (batch, 1)), end


# Results are rounded where the code says so. A GPU's compiler would keep those of plain JAX in f32
# for the gradients within the same program, which no kernel can.
@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    compiler_options={"xla_allow_excess_precision": False},
)
def _results_and_gradients(implementation, scale, arrays, start, end, out_bar, lse_bar):
    def attend(q, k, v, bias=None):
        return range_attention(
            q, k, v, start, end, bias, scale=scale, implementation=implementation
        )

    (out, lse), vjp = jax.vjp(attend, *arrays)
    # An infinite lse has no gradient: its cotangent must not matter, whatever it is.
    nothing = 0 if implementation == "reference" else jnp.nan
    lse_bar = jnp.where(lse > -jnp.inf, lse_bar, nothing)
    return out, lse, vjp((out_bar.astype(out.dtype), lse_bar.astype(lse.dtype)))


def results_and_gradients(implementation, arrays, start, end, scale=None):
    """out, lse and the gradients of all arrays from random cotangents of both results."""
    rng = np.random.default_rng(1)
    out_bar, lse_bar = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[0].shape[:3])
    out_bar = out_bar.astype(jnp.bfloat16)  # the same numbers for all dtypes
    found = _results_and_gradients(implementation, scale, arrays, start, end, out_bar, lse_bar)
    return jax.tree.map(np.asarray, found)


def assert_same(arrays, start, end, rtol=2e-5, **kwargs):
    out, lse, bars = results_and_gradients("xla", arrays, start, end, **kwargs)
    out_, lse_, bars_ = results_and_gradients("reference", arrays, start, end, **kwargs)
    np.testing.assert_allclose(out, out_, rtol, rtol)
    np.testing.assert_allclose(lse, lse_, rtol, rtol)
    for name, bar, bar_ in zip(("q", "k", "v", "key_bias"), bars, bars_, strict=False):
        np.testing.assert_allclose(bar, bar_, 5 * rtol, 5 * rtol, err_msg=name)
        assert np.any(bar_ != 0), name
    return out, lse


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_window(groups):
    arrays = operands(0, 2, 300, 300, 2, groups, 8)
    assert_same(arrays, *window(300, 64, 16))


def test_prefix_without_bias():
    *arrays, _ = operands(1, 1, 261, 261, 2, 2, 16)
    end = np.arange(261) + 1
    assert_same(arrays, np.zeros_like(end), end, scale=0.3)


@pytest.mark.parametrize(
    ("batch", "tokens", "keys"),
    [(2, 150, 77), (3, 37, 400), (1, 1, 5000), (2, 2, 3), (1, 400, 1), (2, 129, 257)],
)
def test_ragged_ranges_of_each_sequence(batch, tokens, keys):
    start, end = ragged(2, batch, tokens, keys)
    end[:, -1], start[:, -1] = keys + 3, np.minimum(start[:, -1], keys - 1)
    start = np.minimum.accumulate(start[:, ::-1], axis=1)[:, ::-1]
    assert_same(operands(3, batch, tokens, keys, 2, 2, 8), start, end)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_ranges(data):
    batch, tokens, keys = data.draw(st.sampled_from(((2, 20, 33), (1, 140, 130))))
    bounds = st.lists(st.integers(-1, keys + 1), min_size=tokens, max_size=tokens).map(sorted)
    start, end = (np.array([data.draw(bounds) for _ in range(batch)]) for _ in range(2))
    arrays = operands(4, batch, tokens, keys, 1, 2, 4)
    found, expected = (
        jax.tree.leaves(results_and_gradients(name, arrays, start, end))
        for name in ("xla", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, 1e-4, 1e-4)


def test_several_chunks(monkeypatch):
    monkeypatch.setattr("pallas_kernels.range_attention.xla._LOGITS_PER_STEP", 2 * 97 * 2 * 128)
    assert_same(operands(5, 2, 290, 290, 1, 2, 4), *window(290, 48, 16))


def test_vmap_and_checkpoint():
    arrays = operands(5, 2, 40, 40, 1, 2, 4)
    bounds = window(40, 16, 8)

    def loss(q, k, v, bias):
        out, lse = range_attention(q[None], k[None], v[None], *bounds, bias[None])
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0))

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))))(*arrays)
    for b in range(2):
        single = jax.jit(gradient)(*(x[b] for x in arrays))
        for x, y in zip(mapped, single, strict=True):
            np.testing.assert_allclose(x[b], y, 1e-5, 1e-5)


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        arrays = operands(6, 1, 20, 23, 1, 2, 4, np.float64)
        start, end = ragged(7, 1, 20, 23)
        rng = np.random.default_rng(8)
        out_bar, lse_bar = rng.normal(size=(1, 20, 2, 4)), rng.normal(size=(1, 20, 2))

        @jax.jit
        def loss(*arrays):
            out, lse = range_attention(*arrays[:3], start, end, arrays[3], implementation="xla")
            return jnp.sum(out * out_bar) + jnp.sum(jnp.where(lse > -jnp.inf, lse * lse_bar, 0))

        bars = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)
        for i, (x, bar) in enumerate(zip(arrays, bars, strict=True)):
            direction, step = rng.normal(size=x.shape), 1e-5

            def at(sign, i=i, x=x, move=step * direction):
                return float(loss(*arrays[:i], x + sign * move, *arrays[i + 1 :]))

            difference = (at(1) - at(-1)) / (2 * step)
            np.testing.assert_allclose(np.sum(bar * direction), difference, 1e-7)


@jax.jit
def attend(q, k, v, start, end):
    return range_attention(q, k, v, start, end, implementation="xla")


def assert_strictly_causal(attend, dtype, dim, changed_from):
    tokens = 280
    first = operands(9, 1, tokens, tokens, 1, 2, dim, dtype)
    other = operands(10, 1, tokens, tokens, 1, 2, dim, dtype)
    mixed = [
        jnp.where(np.arange(tokens)[:, None, None] < changed_from, x, 100 * y)
        for x, y in zip(first[:3], other[:3], strict=True)
    ]
    bounds = window(tokens, 64, 16)
    # The ranges of later queries are theirs to choose, too.
    later = [np.where(np.arange(tokens) < changed_from, x, tokens) for x in bounds]
    later[0] = np.minimum(later[0], np.maximum(bounds[0], changed_from // 2))
    for x, y in zip(attend(*first[:3], *bounds), attend(*mixed, *later), strict=True):
        x, y = (np.asarray(a[:, :changed_from], np.float32) for a in (x, y))
        np.testing.assert_array_equal(x.view(np.int32), y.view(np.int32))
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("changed_from", [1, 100, 131])
def test_strictly_causal(dtype, changed_from):
    assert_strictly_causal(attend, dtype, 8, changed_from)


def assert_unseen_may_be_nan(implementation, dtype, dim, biased=True):
    tokens, keys = 140, 300
    q, k, v, bias = operands(11, 1, tokens, keys, 2, 2, dim, dtype)
    start = np.where(np.arange(tokens) < 70, 10, 200)
    end = np.where(np.arange(tokens) < 70, 90, 270)
    start[30:40], end[30:40] = 60, 60
    end[40:] = np.maximum(end[40:], 90)
    end[:30] = 50
    start[40:70] = 60
    key = np.arange(keys)
    seen = ((key >= 10) & (key < 50)) | ((key >= 60) & (key < 90)) | ((key >= 200) & (key < 270))
    dead = np.broadcast_to(~seen[None, :, None], bias.shape)
    if biased:
        dead = dead | np.isneginf(bias)
    more = (bias,) if biased else ()
    clean = results_and_gradients(implementation, (q, k, v, *more), start, end)
    k, v = (jnp.where(dead[..., None], jnp.nan, x) for x in (k, v))
    more = [jnp.where(seen[None, :, None], x, jnp.nan) for x in more]
    blind = (start >= end)[None, :, None, None]
    if implementation != "reference":
        q = jnp.where(blind, jnp.nan, q)
    poisoned = results_and_gradients(implementation, (q, k, v, *more), start, end)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.all(poisoned[2][0][:, 30:40] == 0) and np.all(poisoned[2][1][dead] == 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_no_query_sees_may_be_nan(implementation):
    assert_unseen_may_be_nan(implementation, np.float32, 8)


def test_no_keys():
    q, k, v, bias = operands(12, 2, 5, 7, 1, 2, 4)
    for keys, end in ((k, 3), (k[:, :0], 9)):
        out, lse = range_attention(q, keys, keys, [3] * 5, [end] * 5)
        np.testing.assert_array_equal(out, np.zeros(q.shape))
        np.testing.assert_array_equal(lse, np.full((2, 5, 2), -np.inf))
    out, lse = range_attention(q, k, v, [0] * 5, [7] * 5, jnp.full_like(bias, -jnp.inf))
    np.testing.assert_array_equal(out, np.zeros(q.shape))
    np.testing.assert_array_equal(lse, np.full((2, 5, 2), -np.inf))
    empty = np.zeros(0, np.int32)
    for name in ("xla", "reference"):
        out, lse = range_attention(q[:, :0], k, v, empty, empty, implementation=name)
        assert out.shape == (2, 0, 2, 4) and lse.shape == (2, 0, 2)


def dense_bfloat16(q, k, v, start, end):
    key = np.arange(k.shape[1])
    mask = (start[:, None] <= key) & (key < end[:, None])
    scores = jnp.einsum("bthd,bnhd->bhtn", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores / np.sqrt(q.shape[-1]), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(jnp.bfloat16)
    return jnp.einsum("bhtn,bnhd->bthd", weights, v)


def test_bfloat16_error():
    *arrays, _ = operands(13, 1, 200, 200, 2, 1, 32, jnp.bfloat16)
    bounds = window(200, 96, 32)
    out_bar = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.bfloat16)

    def ours(*arrays):
        return attend(*arrays, *bounds)[0]

    def exact(*arrays):
        return range_attention(*arrays, *bounds, implementation="reference")[0]

    def dense(*arrays):
        return dense_bfloat16(*arrays, *bounds)

    def run(function, dtype):
        @jax.jit
        def both(arrays, out_bar):
            out, vjp = jax.vjp(function, *arrays)
            return out, *vjp(out_bar)

        return both([x.astype(dtype) for x in arrays], out_bar.astype(dtype))

    def error(x, y):
        return np.max(np.abs(np.asarray(x, np.float32) - np.asarray(y))) / np.max(np.abs(y))

    found, same_dtype = run(ours, jnp.bfloat16), run(dense, jnp.bfloat16)
    for x, y, right in zip(found, same_dtype, run(exact, jnp.float32), strict=True):
        assert x.dtype == jnp.bfloat16
        assert error(x, right) <= 2 * error(y, right) + 2**-8
    lse, right = (
        range_attention(*arrays, *bounds, implementation=name)[1] for name in ("xla", "reference")
    )
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, right, 1e-4, 1e-4)


def test_memory_grows_linearly():
    def backward(*operands):
        return jax.grad(lambda *x: jnp.sum(attend(*x)[0]), argnums=(0, 1, 2))(*operands)

    def temporary_bytes(function, tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.float32)
        bound = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        compiled = jax.jit(function).lower(x, x, x, bound, bound).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for function in (attend, backward):
        small, middle, large = (temporary_bytes(function, 2**e) for e in (15, 16, 17))
        assert middle <= 2.1 * small and large <= 2.1 * middle
        # 64 arrays of q's size, against 2048 for [T, N] scores.
        assert large <= 64 * 2**17 * 64 * 4


def test_bad_operands():
    q, k, v, bias = operands(14, 2, 4, 6, 1, 2, 8)
    up, down = np.arange(4), np.arange(4)[::-1]
    for start, end, name in ((down, up, "start"), (up, down, "end")):
        for kind in (np.asarray, jnp.asarray):
            with pytest.raises(ValueError, match=f"{name} decreases from token 0 to 1"):
                range_attention(q, k, v, kind(start), kind(end))
    with pytest.raises(ValueError, match=r"end has shape \(6,\)"):
        range_attention(q, k, v, up, np.arange(6))
    with pytest.raises(ValueError, match="key_bias has shape .* axis N must have size 6"):
        range_attention(q, k, v, up, up, bias[:, :5])
    with pytest.raises(TypeError, match="key_bias is int32, but must be floating"):
        range_attention(q, k, v, up, up, jnp.zeros(bias.shape, jnp.int32))
    with pytest.raises(ValueError, match="implementation='flash' is not an implementation"):
        range_attention(q, k, v, up, up, implementation="flash")
