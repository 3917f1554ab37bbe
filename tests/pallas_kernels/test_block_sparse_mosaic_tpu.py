"""block_sparse_attention on TPU: interpreted, and compiled for v5e."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import compile_for, target_mesh
from pallas_kernels.block_sparse_attention import block_sparse_attention, mosaic_tpu
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_tpu import kernels
from pallas_kernels.block_sparse_attention.mosaic_tpu.plan import plan_chunk, window_entries
from pallas_kernels.csr import BlockCSR
from pallas_kernels.tpu import VMEM_BUDGET
from tests.pallas_kernels.accuracy import assert_accurate, assert_same_bits
from tests.pallas_kernels.test_block_sparse_attention import (
    bigbird,
    nothing,
    one_block,
    random_cotangents,
    random_selection,
    results_and_gradients,
)
from tests.pallas_kernels.tpu_interpreter import MODES, TPU, interpret

NAMES = ("out", "lse", "q", "k", "v", "values")


def make(
    pattern, batch, tokens, num_keys, heads, groups, dim, count, size=64, dtype=jnp.bfloat16, seed=0
):
    rng = np.random.default_rng(seed)
    blocks = pattern(rng, batch, tokens, heads, -(-num_keys // size), count)
    q = jnp.asarray(rng.normal(size=(batch, tokens, heads * groups, dim)) * 2, dtype)
    k, v = jnp.asarray(rng.normal(size=(2, batch, num_keys, heads, dim)), dtype)
    return q, k, v, blocks


def run(operands, implementation="mosaic_tpu", dtype=None, size=64):
    q, k, v, blocks = operands
    dtype = dtype or q.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    out_bar, lse_bar = random_cotangents(operands[0], np.random.default_rng(1))
    cotangents = out_bar.astype(dtype), lse_bar
    found = results_and_gradients((q, k, v, blocks), size, cotangents, implementation)
    return jax.tree.map(np.asarray, found)


def assert_right(operands, size=64):
    found = run(operands, size=size)
    plain = run(operands, "xla", size=size)
    assert_accurate(NAMES, found, plain, run(operands, "reference", jnp.float32, size))
    return found


attend = functools.partial(block_sparse_attention, block_size=64, implementation="mosaic_tpu")


def pullback(q, k, v, blocks, *cotangents):
    """Results, and gradients of q, k, v and the values."""

    def f(q, k, v, values):
        return attend(q, k, v, dataclasses.replace(blocks, values=values))

    results, vjp = jax.vjp(f, q, k, v, blocks.values)
    return *results, *vjp(cotangents)


@pytest.fixture
def tpu():
    with interpret():
        yield


@pytest.fixture
def few_rows(monkeypatch):
    """Several windows, chunks of queries and steps of sums, though there are few entries."""
    monkeypatch.setattr(mosaic_tpu.plan, "_WINDOW_ROWS", 128)
    monkeypatch.setattr(mosaic_tpu, "_MIN_ROWS", 256)
    monkeypatch.setattr(mosaic_tpu, "_ROWS_PER_BLOCK", 1)
    monkeypatch.setattr(kernels, "_SUMMANDS", 2)
    monkeypatch.setattr(kernels, "_SUM_ELEMENTS", 2**14)


class TestInterpreted:
    @pytest.mark.parametrize(
        "case",
        {
            "16 heads, blocks of 128": (random_selection, 1, 48, 384, 1, 16, 128, 3, 128),
            "incomplete block, 3 heads": (random_selection, 2, 21, 200, 2, 3, 64, 2),
            "one block": (one_block, 1, 300, 128, 1, 4, 64, 1),
            "bigbird": (bigbird, 1, 48, 320, 1, 8, 64, 0),
            "float32, 1 head, blocks of 80": (
                random_selection,
                1,
                40,
                250,
                1,
                1,
                64,
                3,
                80,
                jnp.float32,
            ),
        }.items(),
        ids=lambda case: case[0],
    )
    def test_against_reference(self, tpu, case):
        assert_right(make(*case[1]), size=case[1][8] if len(case[1]) > 8 else 64)

    def test_nothing(self, tpu):
        q, k, v, blocks = make(nothing, 1, 9, 128, 1, 4, 64, 2)
        bars = random_cotangents(q, np.random.default_rng(1))
        out, lse, *gradients = jax.jit(pullback)(q, k, v, blocks, *bars)
        np.testing.assert_array_equal(lse, -np.inf)
        for x in (out, *gradients):
            np.testing.assert_array_equal(x, 0)

    def test_chunks_and_windows(self, tpu, few_rows):
        assert_right(make(random_selection, 1, 50, 256, 2, 4, 64, 4))

    def test_twice_and_with_nan_that_nobody_selected(self, tpu, few_rows):
        q, k, v, blocks = make(random_selection, 1, 30, 250, 1, 8, 64, 2)
        indices = jnp.where(blocks.indices == 2, -1, blocks.indices)
        values = blocks.values.at[:, :, 2:4].set(-jnp.inf)  # an entry of no value is none
        blocks = dataclasses.replace(blocks, indices=indices, values=values)
        blind = np.all(np.asarray((indices < 0) | (values == -jnp.inf)).reshape(30, 2), axis=1)
        assert blind[1]
        f = jax.jit(pullback)
        bars = random_cotangents(q, np.random.default_rng(1))
        clean = f(q, k, v, blocks, *bars)
        assert_same_bits(f(q, k, v, blocks, *bars), clean)
        poisoned = jnp.where(blind[None, :, None, None], jnp.nan, q)
        k, v = (x.at[:, 128:192].set(jnp.nan) for x in (k, v))
        assert_same_bits(f(poisoned, k, v, blocks, *bars), clean)
        out, lse, q_bar, k_bar, v_bar, values_bar = clean
        for x in (out, q_bar, values_bar.reshape(1, 30, 2)):
            np.testing.assert_array_equal(x[:, blind], 0)
        np.testing.assert_array_equal(lse[:, blind], -np.inf)
        for x in (k_bar, v_bar):
            np.testing.assert_array_equal(x[:, 128:192], 0)
            assert np.all(np.any(np.asarray(x[:, :128]) != 0, axis=(2, 3)))

    def test_later_tokens_do_not_matter_bit_for_bit(self, tpu, few_rows):
        q, k, v, blocks = make(random_selection, 1, 60, 256, 1, 4, 64, 2)
        cut, shape = 27, (1, 60, 1, 2)
        index, score = blocks.indices.reshape(shape), blocks.values.reshape(shape)
        rng = np.random.default_rng(5)
        # They crowd the first blocks, so that the entries of others move to other places.
        other = jnp.asarray(rng.permuted(np.tile([0, 1], (1, 60, 1, 1)), axis=-1), jnp.int32)
        later = jnp.arange(60)[:, None, None] >= cut
        changed = BlockCSR.from_selection(
            jnp.where(later, other, index), jnp.where(later, 1.0, score), blocks.num_columns
        )
        before = jax.jit(attend)(q, k, v, blocks)
        after = jax.jit(attend)(q.at[:, cut:].multiply(-2), k, v, changed)
        assert_same_bits([x[:, :cut] for x in before], [x[:, :cut] for x in after])
        assert np.any(np.asarray(before[0][:, cut:]) != np.asarray(after[0][:, cut:]))

    def test_vmap(self, tpu):
        operands = [make(random_selection, 1, 20, 128, 1, 8, 64, 2, seed=n) for n in range(2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *operands)
        found = jax.jit(jax.vmap(attend))(*stacked)
        for n, each in enumerate(operands):
            expected = jax.jit(attend)(*each)
            assert_same_bits(jax.tree.map(lambda x, n=n: x[n], found), expected)

    def test_parts_of_a_batch(self, tpu, monkeypatch):
        operands = make(random_selection, 4, 10, 128, 2, 4, 64, 2)
        whole = jax.jit(lambda *x: attend(*x))(*operands)
        monkeypatch.setattr(mosaic_tpu, "_MAX_BLOCKS", 8)
        assert_same_bits(jax.jit(lambda *x: attend(*x))(*operands), whole)

    def test_no_races(self, few_rows, capfd):
        operands = make(random_selection, 1, 30, 192, 1, 8, 64, 2)
        found = []
        for mode in MODES:
            with interpret(mode, detect_races=True):
                found.append(run(operands))
        assert "RACE" not in capfd.readouterr().out  # each kernel's state replaces the last one's
        assert_same_bits(*found)


class TestDispatch:
    def test_chosen_on_tpu(self):
        q, k, _, blocks = make(random_selection, 1, 8, 64, 1, 1, 64, 1)
        device = types.SimpleNamespace(platform="cpu", device_kind="cpu")
        for target, name in ((TPU, "mosaic_tpu"), (device, "xla")):
            operands = q, k, k, blocks, 64, 1.0
            chosen, _ = dispatch._choose("block_sparse_attention", target, operands)
            assert chosen.name == name

    def why_not(self, heads, num_keys, dim, size, dtype=jnp.bfloat16):
        blocks = BlockCSR(*[None] * 3, num_columns=-(-num_keys // size), row_capacity=1)
        q = jax.ShapeDtypeStruct((1, 8, heads, dim), dtype)
        k = jax.ShapeDtypeStruct((1, num_keys, 1, dim), dtype)
        return mosaic_tpu.why_not_for(q, k, k, blocks, size, 1.0)

    def test_what_it_takes(self):
        for heads, dim, size in ((1, 64, 16), (7, 128, 128), (16, 64, 512), (64, 128, 64)):
            assert self.why_not(heads, 2**16, dim, size) is None

    @pytest.mark.parametrize(
        ("match", "heads", "num_keys", "dim", "size", "dtype"),
        [
            ("head dimensions of 64 and 128, not 256", 1, 64, 256, 64, jnp.bfloat16),
            ("multiple of 16 keys, not 40", 1, 80, 64, 40, jnp.bfloat16),
            ("float32, not float64", 1, 64, 64, 64, np.float64),
            ("up to 57344 key blocks", 1, 2**22, 64, 64, jnp.bfloat16),
            ("bytes of VMEM", 63, 2**14, 64, 2**11, jnp.bfloat16),
        ],
    )
    def test_what_it_does_not(self, match, heads, num_keys, dim, size, dtype):
        with jax.enable_x64(dtype == np.float64):
            assert match in self.why_not(heads, num_keys, dim, size, dtype)


def compile_on_chips(tokens, dim, groups=4, count=16):
    """Forward and backward, with so many heads on each chip."""
    mesh = target_mesh("v5e:2x4")
    heads, patterns = P(None, None, "device"), P(None, "device")
    num_kv_heads = 2 * mesh.size

    def shape(*sizes, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *sizes), dtype, sharding=NamedSharding(mesh, spec))

    q = shape(tokens, num_kv_heads * groups, dim, spec=heads)
    k = shape(tokens, num_kv_heads, dim, spec=heads)
    lse = shape(tokens, num_kv_heads * groups, spec=heads, dtype=jnp.float32)
    indptr = shape(num_kv_heads, tokens + 1, spec=patterns, dtype=jnp.int32)
    indices, values = (
        shape(num_kv_heads, tokens * count, spec=patterns, dtype=x)
        for x in (jnp.int32, jnp.float32)
    )

    def both(q, k, v, indptr, indices, values, *cotangents):
        # The backward pass has what it needs of the forward pass: kernels are not run twice.
        saved = jax.checkpoint_policies.save_only_these_names("block_sparse_attention")

        @functools.partial(jax.checkpoint, policy=saved)
        def f(q, k, v, values):
            return attend(q, k, v, BlockCSR(indptr, indices, values, tokens // 64, count))

        results, vjp = jax.vjp(f, q, k, v, values)
        return *results, *vjp(cotangents)

    def mapped(*operands):
        specs = (*[heads] * 3, *[patterns] * 3, heads, heads), (*[heads] * 5, patterns)
        return jax.shard_map(both, in_specs=specs[0], out_specs=specs[1])(*operands)

    return compile_for("v5e:2x4", mapped, q, k, k, indptr, indices, values, q, lse)


def compile_kernels(groups, dim, size, columns, dtype=jnp.bfloat16):
    """The kernels alone, on one chunk: without XLA's sorts, which take long to compile."""
    sizes = Sizes(1, 1, groups, dim, columns * size - 5, size, columns, 16, columns * size, 1.0)
    sizes, _ = mosaic_tpu._cut(columns * size, sizes)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    places = 1, 1, sizes.entries
    pattern = [
        jax.ShapeDtypeStruct((1, 1, sizes.chunk + 1), jnp.int32),
        jax.ShapeDtypeStruct(places, jnp.int32),
        jax.ShapeDtypeStruct(places, jnp.float32),
    ]
    first = jax.ShapeDtypeStruct((), jnp.int32)
    chunk = jax.eval_shape(functools.partial(plan_chunk, sizes=sizes), first, *pattern)
    chunk = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), chunk)
    width = window_entries(groups)
    windows = -(-sizes.entries // width)
    q = shape(windows, width, groups * dim)
    numbers = shape(windows, 1, width * groups, dtype=jnp.float32)
    kv = shape(columns, size, 2 * dim)
    kv_bar = shape(columns, size, 2 * dim, dtype=jnp.float32)
    parts = shape(sizes.capacity, sizes.chunk, groups * dim)
    weights = shape(sizes.capacity, sizes.chunk, groups, dtype=jnp.float32)

    def f(q, kv, kv_bar, numbers, chunk, parts, weights):
        return (
            kernels.forward(q, kv, chunk, sizes),
            kernels.backward(q, q, numbers, numbers, kv, kv_bar, chunk, sizes),
            kernels.weighted_sum(parts, weights, dim),
        )

    operands = q, kv, kv_bar, numbers, chunk, parts, weights
    return compile_for("v5e:2x2", f, *operands, devices=1)


class TestCompiled:
    @pytest.mark.parametrize(
        ("groups", "dim", "size", "columns", "dtype"),
        [
            (8, 64, 64, 2**16 - 2**13, jnp.bfloat16),  # as many blocks as SMEM has room for
            (16, 128, 512, 64, jnp.bfloat16),
            (3, 64, 80, 64, jnp.bfloat16),
            (64, 64, 64, 64, jnp.bfloat16),
            (4, 128, 128, 64, jnp.float32),
        ],
    )
    def test_limits(self, groups, dim, size, columns, dtype):
        found = compile_kernels(groups, dim, size, columns, dtype).kernels
        assert len(found) == 3
        assert all(kernel.vmem_bytes <= VMEM_BUDGET for kernel in found)

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("tokens", "dim", "most"),
        [(2**14, 64, 2), (2**14, 128, 2), (2**19, 64, 8), (2**19, 128, 12)],
    )
    def test_fits_a_chip(self, tokens, dim, most):
        compilation = compile_on_chips(tokens, dim)
        memory = compilation.executable.memory_analysis()
        print(f"{tokens} tokens a chip, D={dim}: {memory.peak_memory_in_bytes / 2**30:.2f} GiB")
        assert memory.peak_memory_in_bytes < most * 2**30  # v5e has 15.75 GiB
        names = [
            kernel.name.removeprefix("block_sparse_attention_") for kernel in compilation.kernels
        ]
        assert sorted(names) == ["backward", "forward", "sum", "sum"]
