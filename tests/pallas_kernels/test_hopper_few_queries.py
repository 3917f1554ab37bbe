"""Attention of few queries on Hopper GPUs: interpreted, on a GPU (make test-gpu), and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention import mosaic_gpu as block_kernels
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention
from tests.pallas_kernels.accuracy import assert_accurate, assert_same_bits
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret
from tests.pallas_kernels.test_range_attention import operands, ragged

# A kernel that hangs holds the main thread, where a signal would not reach it.
pytestmark = pytest.mark.timeout(300, method="thread")

NAMES = ("out", "lse")


def assert_right(attend, q, k, v, *others):
    """Results are right to rounding."""
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    found, plain, right = (
        jax.jit(functools.partial(attend, implementation))(*arrays, *others)
        for implementation, arrays in (
            ("mosaic_gpu", (q, k, v)),
            ("xla", (q, k, v)),
            ("reference", wide),
        )
    )
    assert_accurate(NAMES, found, plain, right)
    return found


def attend_ranges(implementation, q, k, v, start, end, bias=None):
    return range_attention(q, k, v, start, end, bias, implementation=implementation)


def attend_blocks(implementation, q, k, v, blocks, size=64):
    return block_sparse_attention(
        q, k, v, blocks, block_size=size, scale=0.2, implementation=implementation
    )


class TestRanges:
    @pytest.mark.parametrize(
        ("batch", "tokens", "keys", "kv_heads", "groups", "dim"),
        [(2, 1, 200, 2, 4, 64), (1, 3, 141, 1, 16, 128), (1, 1, 70, 1, 1, 256)],
    )
    @pytest.mark.parametrize("biased", [False, True])
    def test_ranges(self, hopper, batch, tokens, keys, kv_heads, groups, dim, biased):
        q, k, v, bias = operands(0, batch, tokens, keys, kv_heads, groups, dim, jnp.bfloat16)
        start, end = ragged(1, batch, tokens, keys)
        assert_right(attend_ranges, q, k, v, start, end, bias if biased else None)

    def test_no_keys(self, hopper):
        q, k, v, bias = operands(0, 1, 2, 80, 1, 2, 64, jnp.bfloat16)
        run = jax.jit(functools.partial(attend_ranges, "mosaic_gpu"))
        for start, end, given in (
            ([70, 70], [70, 20], bias),
            ([0, 0], [80, 80], jnp.full_like(bias, -jnp.inf)),
        ):
            out, lse = run(q, k, v, np.array(start), np.array(end), given)
            np.testing.assert_array_equal(out, 0)
            np.testing.assert_array_equal(lse, -np.inf)

    @pytest.mark.parametrize("biased", [False, True])
    def test_unseen_keys_may_be_nan(self, hopper, biased):
        q, k, v, bias = operands(0, 1, 1, 150, 1, 4, 64, jnp.bfloat16)
        start, end = np.array([37]), np.array([91])
        place = np.arange(150)
        unseen = (place < 37) | (place >= 91)
        if biased:
            unseen |= np.asarray(bias[0, :, 0]) == -np.inf
        run = jax.jit(functools.partial(attend_ranges, "mosaic_gpu"))
        others = start, end, bias if biased else None
        clean = run(q, k, v, *others)
        poisoned = (jnp.where(unseen[None, :, None, None], jnp.nan, x) for x in (k, v))
        assert_same_bits(run(q, *poisoned, *others), clean)

    def test_no_races(self, capfd):
        q, k, v, bias = operands(0, 1, 1, 100, 2, 2, 64, jnp.bfloat16)
        run = jax.jit(functools.partial(attend_ranges, "mosaic_gpu"))
        with interpret(detect_races=True):
            jax.block_until_ready(run(q, k, v, np.array([3]), np.array([95]), bias))
        assert "RACE" not in capfd.readouterr().out


class TestBlocks:
    def make(self, batch, tokens, keys, kv_heads, groups, dim, size=64):
        """Some entries are missing, some removed, and a row has none."""
        q, k, v, _ = operands(2, batch, tokens, keys, kv_heads, groups, dim, jnp.bfloat16)
        rng = np.random.default_rng(3)
        mask = rng.random((batch, kv_heads, tokens, -(-keys // size))) < 0.6
        mask[0, 0, 0] = False
        values = rng.normal(size=mask.shape).astype(np.float32)
        values[rng.random(mask.shape) < 0.2] = -np.inf
        return q, k, v, BlockCSR.from_mask(mask, values)

    @pytest.mark.parametrize(
        "shape",
        [
            (2, 3, 200, 2, 4, 64),
            (1, 2, 128, 1, 16, 128),
            (1, 4, 190, 1, 8, 64),
            (1, 2, 110, 1, 8, 64, 32),
        ],
    )
    def test_blocks(self, hopper, shape):
        attend = functools.partial(attend_blocks, size=shape[6] if len(shape) > 6 else 64)
        out, lse = assert_right(attend, *self.make(*shape))
        assert np.all(np.asarray(lse[0, 0, 0]) == -np.inf)
        assert np.all(np.asarray(out[0, 0, 0]) == 0)

    @pytest.mark.long
    def test_gradients(self, hopper, monkeypatch):
        """They are those of the kernels for many queries."""
        cut_small(monkeypatch, block_kernels, programs=2)
        q, k, v, blocks = self.make(2, 2, 128, 1, 8, 64)
        bar = jnp.asarray(np.random.default_rng(4).normal(size=q.shape), q.dtype)

        def gradients(implementation, q, k, v, blocks, bar):
            out, vjp = jax.vjp(lambda *x: attend_blocks(implementation, *x, blocks)[0], q, k, v)
            return out, vjp(bar.astype(out.dtype))

        found, plain = (
            jax.jit(functools.partial(gradients, name))(q, k, v, blocks, bar)
            for name in ("mosaic_gpu", "xla")
        )
        right = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)), blocks, bar)
        assert_accurate(("out", "q", "k", "v"), found, plain, right)

    def test_vmap(self, hopper):
        q, k, v, blocks = self.make(2, 1, 128, 1, 8, 64)
        whole = jax.jit(functools.partial(attend_blocks, "mosaic_gpu"))(q, k, v, blocks)
        one = functools.partial(attend_blocks, "mosaic_gpu")
        stacked = jax.tree.map(lambda x: x[:, None], (q, k, v, blocks))
        mapped = jax.jit(jax.vmap(one))(*stacked)
        assert_same_bits(jax.tree.map(lambda x: x[:, 0], mapped), whole)


@pytest.mark.parametrize("dim", [64, 128])
def test_one_token_keeps_to_registers(dim):
    """A window and blocks of a long cache, which is not copied."""
    q = jax.ShapeDtypeStruct((1, 1, 16, dim), jnp.bfloat16)
    near, far = (jax.ShapeDtypeStruct((1, n, 2, dim), jnp.bfloat16) for n in (640, 2**20))
    numbers = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.int32)
    scores = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.float32)
    bounds = jax.ShapeDtypeStruct((1,), jnp.int32)

    def attend(q, near_k, near_v, start, end, k, v, index, score):
        blocks = BlockCSR.from_selection(index, score, k.shape[1] // 64)
        return (
            attend_ranges("mosaic_gpu", q, near_k, near_v, start, end),
            attend_blocks("mosaic_gpu", q, k, v, blocks),
        )

    compilation = compile_for(
        "h200", attend, q, near, near, bounds, bounds, far, far, numbers, scores
    )
    assert [kernel.spill_store_bytes for kernel in compilation.kernels] == [0, 0]
    assert compilation.temporary_bytes < 2**20
