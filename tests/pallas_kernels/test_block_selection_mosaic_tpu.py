"""select_blocks on TPUs: interpreted on the CPU, and compiled for v5e."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import compile_for, target_mesh
from pallas_kernels.block_selection import mosaic_tpu, select_blocks
from pallas_kernels.block_selection.mosaic_tpu.configs import Config, Sizes
from tests.pallas_kernels.accuracy import assert_same_bits
from tests.pallas_kernels.test_block_selection_mosaic_gpu import make
from tests.pallas_kernels.tpu_interpreter import MODES, TPU, interpret

select = functools.partial(select_blocks, implementation="mosaic_tpu")

# An interpreted kernel takes longer to compile than to run.
quick = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def run(u, c, limit, start, count):
    return quick(lambda u, c: select(u, c, limit, count, start=start))(u, c)


def expect(u, c, limit, start, count):
    """Of plain JAX in f32; NaN counts as 0."""
    u, c = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (u, c))
    return select_blocks(u, c, limit, count, start=start, implementation="xla")


def assert_right(operands, count):
    """The same blocks as plain JAX finds, but where scores differ by less than a rounding."""
    index, score = run(*operands, count)
    right_index, right_score = expect(*operands, count)
    assert (index.dtype, score.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_allclose(score, right_score, rtol=1e-5, atol=1e-5)
    differs = np.asarray(index) != np.asarray(right_index)
    finite = np.nan_to_num(np.asarray(right_score), neginf=-1e9)
    near = np.abs(np.diff(finite, axis=-1)) < 1e-4
    near = np.pad(near, [(0, 0)] * 3 + [(0, 1)]) | np.pad(near, [(0, 0)] * 3 + [(1, 0)])
    near[..., -1] = True  # the first that was left out is not known
    assert not np.any(differs & ~near)
    assert np.mean(differs) < 0.01


@pytest.fixture
def cut(monkeypatch):
    """Sets the queries of a tile and the blocks of a chunk."""
    return lambda *sizes: monkeypatch.setattr(mosaic_tpu, "CONFIG", Config(*sizes))


class TestInterpreted:
    @pytest.fixture(autouse=True)
    def small(self, cut):
        """Small tiles, and chunks of a step or two, so that all take turns."""
        cut(128, 1024)
        with interpret():
            yield

    @pytest.mark.parametrize("mode", MODES)
    def test_selection_in_chunks(self, mode, cut):
        """Of one step each: the supergroups are all chosen; two tiles of queries."""
        cut(128, 512)
        with interpret(mode):
            assert_right(make(0, 1, 140, 1100, 2, 64), 8)

    # With one chunk of several steps the best supergroups are found. From 4,096 blocks on, a
    # descent has several rounds. Queries of several registers are cut where there are many rows.
    @pytest.mark.parametrize(
        ("sizes", "shape", "count"),
        [
            ((256, 1024), (2, 75, 100, 1, 64), 1),
            ((256, 1536), (1, 200, 1700, 1, 128), 16),
            ((128, 5120), (1, 100, 5000, 1, 64), 16),
            pytest.param((256, 1024), (1, 150, 300, 1, 64), 64, marks=pytest.mark.long),
        ],
    )
    def test_selection(self, cut, sizes, shape, count):
        cut(*sizes)
        assert_right(make(0, *shape), count)

    # In 1,100 blocks there are ties in and between groups, supergroups, steps and chunks.
    @pytest.mark.parametrize(("blocks", "count"), [(1100, 5), (200, 40)])
    def test_ties_take_the_lower_index(self, blocks, count):
        operands = make(1, 1, 70, blocks, 1, 128, levels=1)
        index, score = run(*operands, count)
        expected = expect(*operands, count)
        np.testing.assert_array_equal(index, expected[0])
        np.testing.assert_array_equal(score, expected[1])

    def test_few_blocks_that_begin_and_end_within_groups(self):
        u, c, _, _ = make(8, 1, 64, 1030, 1, 64)
        start = np.arange(64) * 16 + np.arange(64) % 8
        limit = start + np.arange(64) % 23 - 1  # none for some, more than K for others
        c = c.at[:, :5].set(jnp.nan).at[:, 1027:].set(jnp.nan)
        start, limit = np.maximum(start, 5), np.minimum(limit, 1027)
        index, score = run(u, c, limit, start, 16)
        expected = expect(u, c, limit, start, 16)
        np.testing.assert_array_equal(index, expected[0])
        np.testing.assert_allclose(score, expected[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rising", [True, False])
    def test_scores_in_order(self, cut, rising):
        """Each chunk is better than all before, or none is; in bf16 there are ties from 256 on."""
        cut(128, 512)
        u = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
        c = jnp.arange(1100.0)[:: 1 if rising else -1, None, None].astype(jnp.bfloat16)
        operands = u, jnp.broadcast_to(c, (1, 1100, 1, 64)), np.arange(64) * 18, None
        assert_same_bits(run(*operands, 16), expect(*operands, 16))

    def test_signed_zeros_tie(self):
        u = jnp.zeros((1, 1, 1, 64), jnp.bfloat16).at[..., 0].set(1)
        c = (
            jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
            .at[0, :, 0, 0]
            .set(jnp.array([-1, -0.0, 0, -0.0], jnp.bfloat16))
        )
        index, score = run(u, c, np.array([4]), None, 3)
        np.testing.assert_array_equal(index[0, 0, 0], [1, 2, 3])
        assert not np.any(np.signbit(score))

    def test_what_may_not_be_selected_may_be_nan(self):
        u, c, limit, start = make(2, 1, 40, 150, 1, 64)
        limit, start = np.clip(limit, 0, 100), np.clip(start, 10, None)
        clean = run(u, c, limit, start, 8)
        poisoned = c.at[:, 100:].set(jnp.nan).at[:, :10].set(jnp.nan)
        assert_same_bits(run(u, poisoned, limit, start, 8), clean)

    def test_later_queries_do_not_matter_bit_for_bit(self):
        u, c, limit, start = make(3, 1, 150, 600, 1, 64)

        @quick
        def run(u, limit):
            return select(u, c, limit, 8, start=start)

        limit = np.sort(limit)
        before, after = run(u, limit), run(u.at[:, 50:].multiply(-3), limit)
        assert_same_bits([x[:, :50] for x in before], [x[:, :50] for x in after])
        raised = limit.copy()
        raised[:, 50:] = 600
        assert_same_bits([x[:, :50] for x in before], [x[:, :50] for x in run(u, raised)])

    @pytest.mark.long
    def test_gradients_and_vmap(self):
        u, c, limit, start = make(4, 2, 30, 80, 1, 64)
        bar = jnp.asarray(np.random.default_rng(5).normal(size=(2, 30, 1, 8)), jnp.float32)

        def gradients(implementation, u, c, limit, start, bar):
            def score(u, c):
                found = select_blocks(u, c, limit, 8, start=start, implementation=implementation)[1]
                return jnp.sum(jnp.where(found > -jnp.inf, found * bar, 0))

            return jax.grad(score, argnums=(0, 1))(u, c)

        operands = u, c, jnp.asarray(limit), jnp.asarray(start), bar
        found = quick(functools.partial(gradients, "mosaic_tpu"))(*operands)
        wide = [x.astype(jnp.float32) for x in (u, c)]
        expected = jax.jit(functools.partial(gradients, "xla"))(*wide, *operands[2:])
        for x, y in zip(found, expected, strict=True):
            x, y = (np.asarray(each, np.float32) for each in (x, y))
            np.testing.assert_allclose(x, y, 2**-8, 2**-12)
        stacked = [x[:, None] for x in operands]
        mapped = quick(jax.vmap(functools.partial(gradients, "mosaic_tpu")))(*stacked)
        assert_same_bits([x[:, 0] for x in mapped], found)

    @pytest.mark.parametrize("mode", MODES)
    def test_no_races(self, mode, capfd):
        operands = make(6, 1, 200, 1600, 1, 64)
        with interpret(mode, detect_races=True):
            found = jax.block_until_ready(run(*operands, 8))
        assert "RACE" not in capfd.readouterr().out
        np.testing.assert_array_equal(found[0], expect(*operands, 8)[0])


@pytest.mark.parametrize(
    ("problem", "dtype", "dim", "count", "blocks"),
    [
        ("takes bfloat16, not float32", jnp.float32, 64, 8, 16),
        ("width 64 and 128, not 32", jnp.bfloat16, 32, 8, 16),
        ("up to 64 blocks, not 65", jnp.bfloat16, 64, 65, 16),
        ("up to 2\\^24, not 16777217", jnp.bfloat16, 64, 8, 2**24 + 1),
    ],
)
def test_others_are_refused(problem, dtype, dim, count, blocks):
    u, c = (jax.ShapeDtypeStruct((1, n, 1, dim), dtype) for n in (4, blocks))
    limit = jax.ShapeDtypeStruct((4,), jnp.int32)
    with dispatch.targeting(TPU), pytest.raises(ValueError, match=problem):
        jax.eval_shape(functools.partial(select, count=count), u, c, limit)


def test_config_in_whole_registers_and_steps():
    for field, sizes in (("queries=200", (200, 512)), ("blocks=8000", (128, 8000))):
        with pytest.raises(ValueError, match=field):
            Config(*sizes)


@pytest.mark.parametrize("count", [1, 16, 64])
def test_vmem_is_counted(count):
    buffers = Sizes(512, 8192, 64, count).buffers()
    assert buffers["scores"] == ((8192, 512), jnp.float32)
    assert 2**24 < Sizes(512, 8192, 64, count).vmem_bytes() < 2**25  # of 128 MiB


def compile_on_chips(f, tokens, blocks, dim, results):
    """f(u, c, limit), with the queries of each chip and the block features of all; 2 KV heads."""
    mesh, queries = target_mesh("v5e:2x4"), P(None, "device")

    def shaped(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def mapped(*operands):
        specs = queries, P(), P("device")
        return jax.shard_map(f, in_specs=specs, out_specs=results)(*operands)

    return compile_for(
        "v5e:2x4",
        mapped,
        shaped((1, tokens * mesh.size, 2, dim), jnp.bfloat16, queries),
        shaped((1, blocks, 2, dim), jnp.bfloat16, P()),
        shaped((tokens * mesh.size,), jnp.int32, P("device")),
    )


@pytest.mark.parametrize(
    ("tokens", "blocks", "dim", "count"),
    [(2**14, 2**8, 64, 16), (2**19, 2**13, 64, 16), (2**19, 2**16, 128, 16), (300, 2**13, 128, 64)],
)
def test_compiles_for_v5e(tokens, blocks, dim, count):
    choose = functools.partial(select_blocks, count=count)  # the dispatcher's own choice
    compilation = compile_on_chips(choose, tokens, blocks, dim, P(None, "device"))
    assert len(compilation.kernels) == 1
    # At most u, c and the results in other orders: nothing of [T, Nb].
    ordered = 2 * tokens * (2 * dim + 8 * max(count, 8)) + 4 * blocks * 128
    assert compilation.temporary_bytes < 1.1 * ordered + 2**20


@pytest.mark.long
def test_gradients_under_checkpoint_compile_for_v5e():
    """What is saved by name is not selected anew; gradients of what all chips share are added."""
    saved = jax.checkpoint_policies.save_only_these_names("block_selection")

    def gradients(u, c, limit):
        @functools.partial(jax.checkpoint, policy=saved)
        def total(u, c):
            index, score = select_blocks(u, c, limit, 16)
            return jnp.sum(jnp.where(index >= 0, score, 0) ** 2)

        return jax.grad(total, argnums=(0, 1))(u, c)

    compilation = compile_on_chips(gradients, 256, 64, 64, (P(None, "device"), P()))
    assert len(compilation.kernels) == 1
    assert "all-reduce" in compilation.executable.as_text()
