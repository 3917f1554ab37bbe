"""The kernel that combines entries' results on Hopper GPUs: interpreted or on one, and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper as shared
from pallas_kernels import hopper_lanes
from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_sparse_attention import (
    add_up,
    adds_up,
    block_sparse_attention,
    mosaic_gpu,
    value_scales,
)
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu import packing
from pallas_kernels.block_sparse_attention.mosaic_gpu.combination import (
    Added,
    CombineConfig,
    combine_config_for,
    combine_entries,
)
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import (
    Chunk,
    by_token,
    entry_place,
)
from tests.pallas_kernels.accuracy import assert_accurate, assert_same_bits
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret
from tests.pallas_kernels.test_block_sparse_attention import random_selection
from tests.pallas_kernels.test_block_sparse_mosaic_gpu import abstract_operands, make

pytestmark = pytest.mark.timeout(300, method="thread")


def make_sizes(batch, heads, groups, dim, chunk, capacity):
    return Sizes(batch, heads, groups, dim, 64, 64, 1, capacity, chunk, 1.0)


def make_entries(sizes, rng, *, holes=True):
    """Results in f64 by token, and as the kernel gets them: anything where an entry is empty."""
    shape = sizes.batch, sizes.chunk, sizes.heads, sizes.capacity
    filled = rng.random(shape) < 0.7
    filled[:, :2] = False  # tokens without any
    filled[:, 2:4, :, 1:] = False
    if not holes:
        filled[:] = True
    parts = rng.normal(size=(*shape, sizes.groups, sizes.head_dim))
    parts = np.asarray(parts.astype(jnp.bfloat16), np.float64)
    lse, value = rng.normal(size=(*shape, sizes.groups)) * 3, rng.normal(size=shape)
    lse, value = (x.astype(np.float32) for x in (lse, value))

    def placed(x, empty):
        """[B, chunk, Hkv, capacity, ...] -> [entries, ...], each at its place."""
        x = np.where(filled.reshape(*shape, *[1] * (x.ndim - 4)), x, empty)
        x = np.moveaxis(x, 2, 1).reshape(sizes.entries, *x.shape[4:])
        found = np.empty_like(x)
        found[np.asarray(entry_place(np.arange(sizes.entries), sizes))] = x
        return found

    scale = 2.0 ** rng.integers(3, 5, size=sizes.entries).astype(np.float32)
    filled_places = placed(np.ones(shape, bool), False)
    chunk = Chunk(
        None, jnp.asarray(placed(value, -np.inf)), jnp.asarray(filled_places),
        jnp.asarray(np.where(filled_places, scale, 1)), None, None, jnp.zeros(5, jnp.int32), None,
    )  # fmt: skip
    scale = scale[:, None, None]
    total = 2.0**-packing.SHIFT
    sums = jnp.asarray(placed(parts, 0) * total * packing.packing_factor(scale, total))
    words = np.array(packing.pack_pairs(hopper_lanes.plain_narrow(sums)))
    words[~filled_places] = rng.integers(-(2**31), 2**31, size=words[~filled_places].shape)
    operands = jnp.asarray(words), jnp.asarray(placed(lse, np.nan))
    return (parts, lse + value[..., None].astype(np.float64), filled), operands, chunk


def softmax(parts, logits, filled):
    """out [B, chunk, Hq, D] and lse [B, chunk, Hq] in f64."""
    logits = np.where(filled[..., None], logits, -np.inf)
    top = np.max(logits, axis=3, initial=-1e30)
    weights = np.exp(logits - top[:, :, :, None])
    total = weights.sum(axis=3)
    some = np.where(total > 0, total, 1)
    out = np.sum(weights[..., None] * parts, axis=3) / some[..., None]
    lse = np.where(total > 0, top + np.log(some), -np.inf)
    return out.reshape(*out.shape[:2], -1, out.shape[-1]), lse.reshape(*lse.shape[:2], -1)


SMALL = CombineConfig(stages=2, programs=3)


class TestEntries:
    @pytest.mark.parametrize(
        ("shape", "config"),
        [
            ((1, 2, 8, 128, 24, 3), SMALL),
            ((2, 1, 16, 64, 8, 16), dataclasses.replace(SMALL, matrices=2)),
            ((1, 3, 8, 64, 16, 1), dataclasses.replace(SMALL, computing=3)),  # 24 rows a token
            ((1, 1, 16, 64, 8, 64), SMALL),
        ],
    )
    def test_against_a_softmax(self, hopper, shape, config):
        sizes, rng = make_sizes(*shape), np.random.default_rng(0)
        entries, operands, chunk = make_entries(sizes, rng)
        first, tokens = 8, sizes.chunk + 16
        heads = sizes.heads * sizes.groups
        out = jnp.full((sizes.batch, tokens, heads, sizes.head_dim), 7, jnp.bfloat16)
        lse = jnp.full((sizes.batch, sizes.heads, tokens, sizes.groups), 7, jnp.float32)
        chunk = chunk._replace(span=jnp.array([0, 0, first, 0, 0], jnp.int32))

        @jax.jit
        def run(out, lse, chunk):
            return combine_entries(*operands, chunk, (out, lse), sizes, config)

        found = run(out, lse, chunk)
        assert_same_bits(run(out, lse, chunk), found)
        expected = softmax(*entries)
        found = found[0], found[1].swapaxes(1, 2).reshape(found[0].shape[:3])
        for x, y, tolerance in zip(found, expected, (2**-8, 2e-6), strict=True):
            x = np.asarray(x, np.float64)
            np.testing.assert_array_equal(x[:, :first], 7)
            np.testing.assert_array_equal(x[:, first + sizes.chunk :], 7)
            x = x[:, first : first + sizes.chunk]
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
            np.testing.assert_array_equal(x[:, :2], 0 if x.ndim == 4 else -np.inf)

    def test_others_are_added(self, hopper):
        """To two of three KV heads."""
        sizes, rng = make_sizes(2, 2, 8, 64, 8, 3), np.random.default_rng(1)
        entries, operands, chunk = make_entries(sizes, rng)
        chunk = chunk._replace(span=jnp.array([0, 0, 16, 8, 1], jnp.int32))
        rows = [jnp.asarray(rng.normal(size=(2, 24, 24, 64)), jnp.bfloat16) for _ in range(2)]
        gates = [jnp.asarray(rng.random((2, 3, 24, 8)), jnp.float32) for _ in range(2)]
        out = jnp.full((2, 32, 24, 64), 7, jnp.bfloat16)

        @jax.jit
        def run(out, rows, gates):
            added = [Added(rows[0], None), Added(rows[1], gates[1])]
            return combine_entries(
                *operands, chunk, (out, None), sizes, SMALL, gate=gates[0], added=added
            )[0]

        found = np.asarray(run(out, rows, gates), np.float64)
        rows = [np.asarray(x, np.float64)[:, 8:16, 8:] for x in rows]
        gates = [np.asarray(x, np.float64)[:, 1:, 8:16].swapaxes(1, 2) for x in gates]
        gates = [x.reshape(2, 8, 16, 1) for x in gates]
        expected = gates[0] * softmax(*entries)[0] + rows[0] + gates[1] * rows[1]
        np.testing.assert_allclose(found[:, 16:24, 8:], expected, rtol=2**-8, atol=2**-8)
        np.testing.assert_array_equal(np.delete(found, np.s_[16:24], axis=1), 7)
        np.testing.assert_array_equal(found[:, :, :8], 7)

    def test_no_races(self, capfd):
        sizes = make_sizes(1, 2, 8, 64, 32, 3)
        _, operands, chunk = make_entries(sizes, np.random.default_rng(2))
        chunk = chunk._replace(span=jnp.zeros(5, jnp.int32))
        results = jnp.zeros((1, 32, 16, 64), jnp.bfloat16), jnp.zeros((1, 2, 32, 8), jnp.float32)
        with interpret(detect_races=True):
            jax.block_until_ready(
                jax.jit(lambda *x: combine_entries(*operands, chunk, x, sizes, SMALL))(*results)
            )
        assert "RACE" not in capfd.readouterr().out

    def test_places(self):
        sizes = make_sizes(2, 3, 16, 64, 16, 5)
        entry = np.arange(sizes.entries)
        place = np.asarray(entry_place(entry, sizes))
        np.testing.assert_array_equal(np.sort(place), entry)
        by_place = np.empty_like(entry)
        by_place[place] = entry
        natural = entry.reshape(2, 3, 16, 5)
        np.testing.assert_array_equal(by_token(by_place, sizes), np.moveaxis(natural, 1, 2))


def make_branches(q, rng):
    gates = [jnp.asarray(rng.random(q.shape[:3]), jnp.float32) for _ in range(2)]
    return [jnp.asarray(rng.normal(size=q.shape), jnp.bfloat16) for _ in range(2)], gates


def added_up(q, k, v, blocks, branches, gates, implementation):
    """What `add_up` computes, in f32."""
    out, _ = block_sparse_attention(q, k, v, blocks, block_size=64, implementation=implementation)
    out, *branches = (x.astype(jnp.float32) for x in (out, *branches))
    return gates[0][..., None] * out + branches[0] + gates[1][..., None] * branches[1]


class TestAddUp:
    @pytest.mark.parametrize(
        ("case", "heads"),
        [
            ((1, 24, 192, 2, 8, 64, 2), 1),
            pytest.param((1, 24, 192, 2, 8, 64, 2), 2, marks=pytest.mark.long),
            pytest.param((2, 16, 128, 1, 16, 128, 2), 1, marks=pytest.mark.long),
        ],
    )
    def test_a_part_of_the_queries(self, hopper, monkeypatch, case, heads):
        """In several chunks, of whose queries others come before and after; some heads a call."""
        cut_small(monkeypatch, mosaic_gpu, programs=3)
        monkeypatch.setattr(mosaic_gpu, "_MIN_ENTRIES", 1)
        monkeypatch.setattr(mosaic_gpu, "_ENTRIES_PER_BLOCK", {"forward": 6})
        q, k, v, blocks = make(random_selection, *case)
        rng = np.random.default_rng(2)
        branches, gates = make_branches(q, rng)
        around = [(0, 0), (8, 16), (0, 0), (0, 0)]
        whole_q = jnp.pad(q, around, constant_values=np.nan)
        assert adds_up(
            whole_q, k, v, tokens=q.shape[1], capacity=blocks.row_capacity, block_size=64,
            implementation="mosaic_gpu",
        )  # fmt: skip

        @jax.jit
        def run(q, k, v, blocks, first, branches, gates):
            return add_up(
                jnp.full(q.shape, 7, q.dtype), q, k, v, blocks, first,
                heads=heads, gate=gates[0],
                added=[(branches[0], None), (branches[1], gates[1])],
                value_scales=value_scales(v, block_size=64), block_size=64,
            )  # fmt: skip

        found = run(whole_q, k, v, blocks, 8, branches, gates)
        assert_same_bits(run(whole_q, k, v, blocks, 8, branches, gates), found)
        found = np.asarray(found, np.float32)
        np.testing.assert_array_equal(found[:, :8], 7)
        np.testing.assert_array_equal(found[:, -16:], 7)
        plain = added_up(q, k, v, blocks, branches, gates, "xla").astype(jnp.bfloat16)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        right = added_up(*wide, blocks, branches, gates, "reference")
        assert_accurate(["out"], found[:, 8:-16].astype(jnp.bfloat16), plain, right)

    def test_takes(self):
        def takes(q=(1, 64, 16, 128), k=(1, 64, 2, 128), tokens=64, capacity=16):
            q, k = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (q, k))
            return mosaic_gpu.adds_up(q, k, tokens, capacity)

        assert takes() and takes(capacity=32) and takes(q=(1, 64, 32, 128))
        assert not takes(q=(1, 64, 8, 128))  # 4 query heads per KV head would be padded
        assert not takes(tokens=60) and not takes(q=(1, 63, 16, 128))
        assert not takes(capacity=33)  # 8 query heads of 33 entries are more than a copy takes


class TestCompiled:
    @pytest.mark.parametrize(
        ("target", "dim", "groups", "capacity"),
        [("h200", 128, 8, 16), ("h200", 64, 16, 64), ("h100", 128, 16, 1)],
    )
    def test_keeps_to_registers_and_shared_memory(self, target, dim, groups, capacity):
        sizes = make_sizes(1, 2, groups, dim, 4096, capacity)
        config = combine_config_for(sizes)
        shape = jax.ShapeDtypeStruct
        rows = 1, 8192, 2 * groups, dim
        half, wide = jnp.bfloat16, jnp.float32

        def run(words, lse, value, filled, scale, span, rows, sums):
            chunk = Chunk(None, value, filled, scale, None, None, span, None)
            step = functools.partial(combine_entries, words, lse, chunk, sizes=sizes, config=config)
            added = Added(rows, None), Added(rows, sums)
            return (
                step(results=(rows + 1, sums + 1)),
                step(results=(rows + 2, None), gate=sums, added=added),
            )

        entries = sizes.entries
        compilation = compile_for(
            target, run, shape((entries, groups, packing.width(dim)), jnp.int32),
            shape((entries, groups), wide), shape((entries,), wide), shape((entries,), bool),
            shape((entries,), wide), shape((5,), jnp.int32), shape(rows, half),
            shape((1, 2, 8192, groups), wide),
        )  # fmt: skip
        assert len(compilation.kernels) == 2
        for kernel in compilation.kernels:
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
            assert not kernel.notes

    def test_results_are_written_in_place(self):
        """Of a million tokens: nothing but the kernels moves what is as large as the result."""
        q, k, v, blocks = abstract_operands(2**20, 128)
        gates = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)

        def run(q, k, v, blocks, branch, gate):
            added = [(branch, None), (branch, gate)]
            out = jax.lax.empty(q.shape, q.dtype)
            scales = value_scales(v, block_size=64)
            return add_up(
                out, q, k, v, blocks, 0, gate=gate, added=added, value_scales=scales, block_size=64
            )

        compilation = compile_for("h200", run, q, k, v, blocks, q, gates)
        assert compilation.temporary_bytes < q.size * 2
        moves = ("copy(", "fusion(", "copy-start(", "dynamic-update-slice(", "broadcast(")
        for line in compilation.executable.as_text().splitlines():
            result, _, rest = line.partition(" = ")
            whole = rest.startswith(("bf16[1,1048576,16,128]", "bf16[1,262144,64,128]"))
            assert not (whole and any(x in rest for x in moves)), result

    def test_of_more_entries_xla_combines_the_results(self):
        assert combine_config_for(make_sizes(1, 2, 16, 128, 4096, 64)) is not None
        q, k, v, blocks = abstract_operands(4096, 128, count=33)
        attend = functools.partial(
            block_sparse_attention, block_size=64, implementation="mosaic_gpu"
        )
        kernels = compile_for("h200", attend, q, k, v, blocks).kernels
        assert [kernel.name for kernel in kernels] == ["block_sparse_forward_mosaic_gpu_kernel"]

    def test_shared_memory_is_enough(self):
        for dim in (64, 128):
            for capacity in (1, 16, 32):
                config = combine_config_for(make_sizes(1, 2, 8, dim, 4096, capacity))
                assert config is not None and config.stages >= 2
                in_flight = config.computing * config.stages * 64 * packing.width(dim) * 4
                assert 40 * 1024 <= in_flight < shared.SHARED_MEMORY
