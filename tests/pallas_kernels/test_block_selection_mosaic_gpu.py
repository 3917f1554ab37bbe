"""select_blocks on Hopper GPUs: interpreted or on a GPU (make test-gpu), and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.block_selection import mosaic_gpu, select_blocks
from pallas_kernels.block_selection.mosaic_gpu import few_queries
from tests.pallas_kernels.accuracy import assert_same_bits
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret

# A kernel that hangs holds the main thread, where a signal would not reach it.
pytestmark = pytest.mark.timeout(300, method="thread")

select = functools.partial(select_blocks, implementation="mosaic_gpu")


def make(seed, batch, tokens, num_blocks, heads, dim, levels=None):
    """Features in bf16; with few levels, of which only two matter, most scores are ties."""
    rng = np.random.default_rng(seed)
    u, c = (rng.normal(size=(batch, n, heads, dim)) for n in (tokens, num_blocks))
    if levels:
        u, c = (np.round(x * levels) * (np.arange(dim) < 2) for x in (u, c))
    limit = rng.integers(-1, num_blocks + 2, (batch, tokens))
    start = rng.integers(-2, num_blocks // 2 + 1, (batch, tokens))
    return jnp.asarray(u, jnp.bfloat16), jnp.asarray(c, jnp.bfloat16), limit, start


def assert_right(u, c, limit, start, count):
    """The same blocks as plain JAX finds, but where scores differ by less than a rounding."""
    index, score = jax.jit(lambda u, c: select(u, c, limit, count, start=start))(u, c)
    wide = (x.astype(jnp.float32) for x in (u, c))
    right_index, right_score = select_blocks(*wide, limit, count, start=start, implementation="xla")
    np.testing.assert_allclose(score, right_score, rtol=1e-5, atol=1e-5)
    differs = np.asarray(index) != np.asarray(right_index)
    finite = np.nan_to_num(np.asarray(right_score), neginf=-1e9)
    near = np.abs(np.diff(finite, axis=-1)) < 1e-4
    near = np.pad(near, [(0, 0)] * 3 + [(0, 1)]) | np.pad(near, [(0, 0)] * 3 + [(1, 0)])
    near[..., -1] = True  # the first that was left out is not known
    assert not np.any(differs & ~near)
    assert np.mean(differs) < 0.01


class TestSmall:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        """Two thread blocks and two stages, so that all take turns."""
        cut_small(monkeypatch, mosaic_gpu, programs=2)

    @pytest.mark.parametrize(
        ("shape", "count"),
        [
            pytest.param((2, 75, 100, 1, 64), 8, marks=pytest.mark.long),
            ((1, 75, 300, 2, 64), 16),
            pytest.param((2, 3, 1100, 2, 64), 16, marks=pytest.mark.long),
            ((1, 1, 30, 1, 128), 64),
        ],
    )
    def test_selection(self, hopper, shape, count):
        assert_right(*make(0, *shape), count)

    # In 1,100 blocks there are ties within groups of 8 and between them, and between steps of 512.
    # With one query, the best of 9 parts of 512 are merged twice.
    @pytest.mark.parametrize(
        ("tokens", "blocks", "count"),
        [
            (70, 200, 1),
            (70, 1100, 5),
            (70, 1100, 16),
            pytest.param(70, 200, 24, marks=pytest.mark.long),
            (1, 4200, 60),
        ],
    )
    def test_ties_take_the_lower_index(self, hopper, monkeypatch, tokens, blocks, count):
        monkeypatch.setattr(few_queries, "_CANDIDATES", 512)
        u, c, limit, start = make(1, 1, tokens, blocks, 1, 128, levels=1)
        index, score = jax.jit(lambda u, c: select(u, c, limit, count, start=start))(u, c)
        expected = select_blocks(u, c, limit, count, start=start, implementation="xla")
        np.testing.assert_array_equal(index, expected[0])
        np.testing.assert_array_equal(score, expected[1])

    @pytest.mark.long
    def test_few_blocks_that_begin_and_end_within_groups(self, hopper):
        u, c, _, _ = make(8, 1, 64, 1030, 1, 64)
        start = np.arange(64) * 16 + np.arange(64) % 8
        limit = start + np.arange(64) % 23 - 1  # none for some, more than K for others
        c = c.at[:, :5].set(jnp.nan).at[:, 1027:].set(jnp.nan)
        start, limit = np.maximum(start, 5), np.minimum(limit, 1027)
        index, score = jax.jit(lambda u, c: select(u, c, limit, 16, start=start))(u, c)
        wide = jnp.nan_to_num(c.astype(jnp.float32))
        expected = select_blocks(u.astype(jnp.float32), wide, limit, 16, start=start)
        np.testing.assert_array_equal(index, expected[0])
        np.testing.assert_allclose(score, expected[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rising", [True, pytest.param(False, marks=pytest.mark.long)])
    def test_scores_in_order(self, hopper, rising):
        """Each step is better than all before, or none is; in bf16 there are ties from 256 on."""
        u = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
        c = jnp.arange(1100.0)[:: 1 if rising else -1, None, None].astype(jnp.bfloat16)
        c = jnp.broadcast_to(c, (1, 1100, 1, 64))
        limit = np.arange(64) * 18
        index, score = jax.jit(lambda u, c: select(u, c, limit, 16))(u, c)
        wide = (x.astype(jnp.float32) for x in (u, c))
        expected = select_blocks(*wide, limit, 16, implementation="xla")
        assert_same_bits((index, score), expected)

    def test_the_best_are_in_columns_of_one_thread(self, hopper):
        """Its list gets full: other columns say nothing of its own. There are ties, too."""
        rng = np.random.default_rng(6)
        best = np.arange(1100) // 8 % 8 < 2  # the first two of every 8 groups
        c = np.zeros((1, 1100, 1, 64))
        c[0, :, 0, 0] = rng.normal(size=1100) + 10 * best
        u, c = jnp.ones((1, 64, 1, 64), jnp.bfloat16), jnp.asarray(c, jnp.bfloat16)
        limit = 1100 - np.arange(64) * 5
        index, score = jax.jit(lambda u, c: select(u, c, limit, 16))(u, c)
        wide = (x.astype(jnp.float32) for x in (u, c))
        expected = select_blocks(*wide, limit, 16, implementation="xla")
        assert_same_bits((index, score), expected)

    @pytest.mark.parametrize("tokens", [pytest.param(40, marks=pytest.mark.long), 4])
    def test_what_may_not_be_selected_may_be_nan(self, hopper, tokens):
        u, c, limit, start = make(2, 1, tokens, 150, 1, 64)
        limit, start = np.clip(limit, 0, 100), np.clip(start, 10, None)
        run = jax.jit(lambda u, c: select(u, c, limit, 8, start=start))
        clean = run(u, c)
        assert_same_bits(run(u, c.at[:, 100:].set(jnp.nan).at[:, :10].set(jnp.nan)), clean)

    def test_later_queries_do_not_matter_bit_for_bit(self, hopper):
        u, c, limit, start = make(3, 1, 90, 150, 1, 64)

        @jax.jit
        def run(u, limit):
            return select(u, c, limit, 8, start=start)

        limit = np.sort(limit)
        before, after = run(u, limit), run(u.at[:, 50:].multiply(-3), limit)
        assert_same_bits([x[:, :50] for x in before], [x[:, :50] for x in after])
        raised = limit.copy()
        raised[:, 50:] = 150
        assert_same_bits([x[:, :50] for x in before], [x[:, :50] for x in run(u, raised)])

    @pytest.mark.long
    def test_gradients_and_vmap(self, hopper):
        u, c, limit, start = make(4, 2, 30, 80, 1, 64)
        bar = jnp.asarray(np.random.default_rng(5).normal(size=(2, 30, 1, 8)), jnp.float32)

        def gradients(implementation, u, c, limit, start, bar):
            def score(u, c):
                found = select_blocks(u, c, limit, 8, start=start, implementation=implementation)[1]
                return jnp.sum(jnp.where(found > -jnp.inf, found * bar, 0))

            return jax.grad(score, argnums=(0, 1))(u, c)

        operands = u, c, jnp.asarray(limit), jnp.asarray(start), bar
        found = jax.jit(functools.partial(gradients, "mosaic_gpu"))(*operands)
        wide = [x.astype(jnp.float32) for x in (u, c)]
        expected = jax.jit(functools.partial(gradients, "xla"))(*wide, *operands[2:])
        for x, y in zip(found, expected, strict=True):
            x, y = (np.asarray(each, np.float32) for each in (x, y))
            np.testing.assert_allclose(x, y, 2**-8, 2**-12)
        stacked = [x[:, None] for x in operands]
        mapped = jax.jit(jax.vmap(functools.partial(gradients, "mosaic_gpu")))(*stacked)
        assert_same_bits([x[:, 0] for x in mapped], found)

    @pytest.mark.parametrize("tokens", [100, 2])
    def test_no_races(self, capfd, tokens):
        u, c, limit, start = make(6, 1, tokens, 300, 1, 64)
        with interpret(detect_races=True):
            jax.block_until_ready(jax.jit(lambda u, c: select(u, c, limit, 8, start=start))(u, c))
        assert "RACE" not in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [None, 1])
def test_many(levels):
    assert_right(*make(7, 1, 4096, 16384, 2, 64, levels), 16)


@pytest.mark.parametrize(
    ("target", "dim", "count"),
    [
        ("h200", 64, 16),
        *(
            pytest.param("h200", *case, marks=pytest.mark.long)
            for case in ((64, 32), (64, 64), (128, 16), (128, 64))
        ),
        pytest.param("h100", 64, 8, marks=pytest.mark.long),
    ],
)
def test_keeps_to_registers(target, dim, count):
    u = jax.ShapeDtypeStruct((1, 2**20, 2, dim), jnp.bfloat16)
    c = jax.ShapeDtypeStruct((1, 2**14, 2, dim), jnp.bfloat16)
    limit = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    compilation = compile_for(target, functools.partial(select, count=count), u, c, limit)
    assert len(compilation.kernels) == 2
    for kernel in compilation.kernels:
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
    assert compilation.temporary_bytes < 2**24 + 2 * count * 2**23  # groups and columns


def test_few_queries_keep_to_registers():
    u = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16)
    c = jax.ShapeDtypeStruct((1, 2**16, 2, 64), jnp.bfloat16)
    limit = jax.ShapeDtypeStruct((1,), jnp.int32)
    compilation = compile_for("h200", functools.partial(select, count=16), u, c, limit)
    assert [kernel.spill_store_bytes for kernel in compilation.kernels] == [0, 0]
    assert compilation.temporary_bytes < 2**16


@pytest.mark.long
def test_queries_over_8_devices():
    """With block features that are everywhere, whose gradients are added up."""

    def scores(u, c, limit):
        score, vjp = jax.vjp(lambda u, c: select(u, c, limit, 16)[1], u, c)
        return vjp(score)

    def sharded(u, c, limit):
        queries = P(None, "device")
        return jax.shard_map(
            scores, in_specs=(queries, P(), P("device")), out_specs=(queries, P())
        )(u, c, limit)

    u = jax.ShapeDtypeStruct((1, 2**15, 2, 64), jnp.bfloat16)
    c = jax.ShapeDtypeStruct((1, 2**9, 2, 64), jnp.bfloat16)
    limit = jax.ShapeDtypeStruct((2**15,), jnp.int32)
    compilation = compile_for("h200", sharded, u, c, limit, devices=8)
    assert compilation.kernels
    assert "all-reduce" in compilation.executable.as_text()
