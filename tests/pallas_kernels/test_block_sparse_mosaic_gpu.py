"""block_sparse_attention on Hopper GPUs: interpreted or on a GPU (make test-gpu), and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_sparse_attention import block_sparse_attention, mosaic_gpu
from pallas_kernels.csr import BlockCSR
from tests.pallas_kernels.accuracy import assert_accurate, assert_same_bits
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret
from tests.pallas_kernels.test_block_sparse_attention import (
    bigbird,
    one_block,
    random_cotangents,
    random_selection,
    results_and_gradients,
)

# A kernel that hangs holds the main thread, where a signal would not reach it.
pytestmark = pytest.mark.timeout(300, method="thread")

SIZE = 64
NAMES = ("out", "lse", "q", "k", "v", "values")

attend = functools.partial(block_sparse_attention, block_size=SIZE, implementation="mosaic_gpu")


def make(pattern, batch, tokens, num_keys, heads, groups, dim, count, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    blocks = pattern(rng, batch, tokens, heads, -(-num_keys // size), count)
    q = jnp.asarray(rng.normal(size=(batch, tokens, heads * groups, dim)) * 2, jnp.bfloat16)
    k, v = jnp.asarray(rng.normal(size=(2, batch, num_keys, heads, dim)), jnp.bfloat16)
    return q, k, v, blocks


def run(operands, implementation="mosaic_gpu", dtype=jnp.bfloat16, size=SIZE):
    q, k, v, blocks = operands
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    out_bar, lse_bar = random_cotangents(operands[0], np.random.default_rng(1))
    cotangents = out_bar.astype(dtype), lse_bar
    found = results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
    return jax.tree.map(np.asarray, found)


def assert_right(operands, size=SIZE):
    found = run(operands, size=size)
    plain = run(operands, "xla", size=size)
    assert_accurate(NAMES, found, plain, run(operands, "reference", jnp.float32, size))
    return found


class TestSmall:
    """With few thread blocks, so that blocks are shared by them and rings go round."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        cut_small(monkeypatch, mosaic_gpu, programs=3)

    @pytest.mark.parametrize(
        "case",
        [
            (random_selection, 2, 21, 200, 2, 3, 64, 2),  # padded groups, incomplete block
            pytest.param((random_selection, 1, 19, 192, 1, 16, 128, 3), marks=pytest.mark.long),
            (one_block, 1, 70, 128, 1, 8, 64, 1),  # one block, shared by all thread blocks
            pytest.param((bigbird, 1, 24, 320, 1, 8, 64, 0), marks=pytest.mark.long),
        ],
    )
    def test_against_reference(self, hopper, case):
        assert_right(make(*case))

    def test_blocks_of_32(self, hopper):
        assert_right(make(random_selection, 1, 40, 136, 1, 8, 128, 3, size=32), size=32)

    @pytest.mark.long
    def test_chunks_of_queries_and_entries(self, hopper, monkeypatch):
        operands = make(random_selection, 1, 16, 192, 1, 8, 64, 2)
        monkeypatch.setattr(mosaic_gpu, "_MIN_ENTRIES", 1)
        monkeypatch.setattr(mosaic_gpu, "_ENTRIES_PER_BLOCK", {"forward": 2, "query_gradient": 1})
        monkeypatch.setattr(mosaic_gpu, "_MAX_ENTRIES", 30)
        assert_right(operands)

    @pytest.mark.long
    def test_twice(self, hopper):
        operands = make(random_selection, 1, 40, 128, 1, 8, 64, 2)
        assert_same_bits(run(operands), run(operands))

    def test_later_tokens_do_not_matter_bit_for_bit(self, hopper):
        q, k, v, blocks = make(random_selection, 1, 40, 256, 1, 8, 64, 3)
        cut, index = 17, blocks.indices.reshape(1, 40, 1, 3)
        rng = np.random.default_rng(5)
        other = jnp.asarray(rng.permuted(np.arange(4).repeat(30)).reshape(1, 40, 1, 3) // 2 * 2)
        other = other.at[..., 1].set(1).at[..., 2].set(3)
        changed = BlockCSR.from_selection(
            jnp.concatenate([index[:, :cut], other[:, cut:]], axis=1),
            jnp.concatenate([blocks.values.reshape(index.shape)[:, :cut], other[:, cut:] * 1.0], 1),
            blocks.num_columns,
        )
        before = jax.jit(attend)(q, k, v, blocks)
        after = jax.jit(attend)(q.at[:, cut:].multiply(-2), k, v, changed)
        assert_same_bits([x[:, :cut] for x in before], [x[:, :cut] for x in after])
        assert np.any(np.asarray(before[0][:, cut:]) != np.asarray(after[0][:, cut:]))

    def test_what_nobody_selected_may_be_nan(self, hopper):
        q, k, v, blocks = make(random_selection, 1, 30, 256, 1, 8, 64, 2)
        blocks = dataclasses.replace(
            blocks, indices=jnp.where(blocks.indices == 2, -1, blocks.indices)
        )
        blind = jnp.all(blocks.indices.reshape(30, 2) < 0, axis=1)
        assert np.any(blind)
        clean = run((q, k, v, blocks))
        q = jnp.where(blind[None, :, None, None], jnp.nan, q)
        k, v = (x.at[:, 128:192].set(jnp.nan) for x in (k, v))
        assert_same_bits(run((q, k, v, blocks)), clean)

    @pytest.mark.long
    def test_vmap(self, hopper):
        operands = [make(random_selection, 1, 20, 128, 1, 8, 64, 2, seed) for seed in range(2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *operands)
        found = jax.jit(jax.vmap(attend))(*stacked)
        for n, each in enumerate(operands):
            expected = jax.jit(attend)(*each)
            assert_same_bits(jax.tree.map(lambda x, n=n: x[n], found), expected)

    def test_no_races(self, capfd):
        with interpret(detect_races=True):
            run(make(random_selection, 1, 40, 192, 1, 8, 64, 2))
        assert "RACE" not in capfd.readouterr().out


@pytest.mark.gpu
class TestLarge:
    """With what only a GPU has: time and memory."""

    @pytest.mark.parametrize(
        ("groups", "dim", "size"), [(8, 128, 64), (16, 64, 64), (4, 128, 64), (8, 128, 32)]
    )
    def test_accurate_and_deterministic(self, groups, dim, size):
        operands = make(random_selection, 1, 4096, 4096, 2, groups, dim, 16, size=size)
        first = assert_right(operands, size)
        for _ in range(10):
            assert_same_bits(run(operands, size=size), first)

    def test_a_block_that_everybody_selects(self):
        assert_right(make(one_block, 1, 8192, 256, 1, 8, 128, 1))


def abstract_operands(tokens, dim, groups=8, heads=2, count=16, size=SIZE):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    keys = shape(tokens, heads, dim)
    entries = shape(heads, tokens * count, dtype=jnp.int32)
    blocks = BlockCSR(
        shape(heads, tokens + 1, dtype=jnp.int32), entries,
        shape(heads, tokens * count, dtype=jnp.float32), tokens // size, count,
    )  # fmt: skip
    return shape(tokens, heads * groups, dim), keys, keys, blocks


def forward_and_backward(q, k, v, blocks, size=SIZE):
    def f(q, k, v, values):
        return attend(q, k, v, dataclasses.replace(blocks, values=values), block_size=size)

    out, vjp = jax.vjp(f, q, k, v, blocks.values)
    return out, vjp(out)


class TestCompiled:
    """With the compilers for H100 and H200."""

    @pytest.mark.parametrize(
        ("target", "dim", "groups", "size"),
        [
            ("h200", 128, 8, 64),
            pytest.param("h200", 64, 16, 64, marks=pytest.mark.long),
            pytest.param("h100", 128, 16, 64, marks=pytest.mark.long),
            pytest.param("h200", 128, 8, 32, marks=pytest.mark.long),
        ],
    )
    def test_keeps_to_registers(self, target, dim, groups, size):
        operands = abstract_operands(2**17, dim, groups, size=size)
        compilation = compile_for(
            target, functools.partial(forward_and_backward, size=size), *operands
        )
        assert len(compilation.kernels) == 4
        for kernel in compilation.kernels:
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
            assert not kernel.notes

    def test_over_8_devices(self):
        heads = P(None, None, "device")

        def sharded(q, k, v, blocks):
            patterns = jax.tree.map(lambda _: P(None, "device"), blocks)
            return jax.shard_map(attend, in_specs=(heads, heads, heads, patterns), out_specs=heads)(
                q, k, v, blocks
            )

        operands = abstract_operands(2**15, 128, heads=8)
        assert compile_for("h200", sharded, *operands, devices=8).kernels

    @pytest.mark.long
    def test_memory_of_a_million_tokens(self):
        q, *rest = abstract_operands(2**20, 128)
        compilation = compile_for("h200", attend, q, *rest)
        assert compilation.temporary_bytes < 1.5 * q.size * 2
