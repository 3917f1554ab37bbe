"""range_attention on TPUs: interpreted on the CPU, and compiled for TPU v5e."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, tpu
from pallas_kernels.ahead_of_time import compile_for, target_mesh
from pallas_kernels.range_attention import range_attention
from pallas_kernels.range_attention.mosaic_tpu import plan
from tests.pallas_kernels import accuracy
from tests.pallas_kernels.accuracy import assert_same_bits
from tests.pallas_kernels.test_range_attention import (
    assert_strictly_causal,
    assert_unseen_may_be_nan,
    operands,
    ragged,
    results_and_gradients,
    window,
)
from tests.pallas_kernels.tpu_interpreter import MODES, TPU, interpret

KERNELS = ("range_forward", "range_query_gradient", "range_key_gradients")


def attend(q, k, v, start, end, key_bias=None):
    return range_attention(q, k, v, start, end, key_bias, implementation="mosaic_tpu")


def some_operands(*sizes, biased=False, dtype=jnp.bfloat16):
    *arrays, bias = operands(0, *sizes, dtype)
    return (*arrays, bias) if biased else tuple(arrays)


def assert_accurate(arrays, start, end):
    """Results and gradients are right to rounding; returns them."""
    exact = [x.astype(jnp.float32) for x in arrays]
    found, plain, right = (
        results_and_gradients(name, given, start, end)
        for name, given in (("mosaic_tpu", arrays), ("xla", arrays), ("reference", exact))
    )
    accuracy.assert_accurate(("out", "lse", "q", "k", "v", "key_bias"), found, plain, right)
    return found


class TestInterpreted:
    @pytest.mark.parametrize(
        ("mode", "num_kv_heads", "groups", "tokens", "dim", "biased"),
        [
            ("on_wait", 2, 1, 300, 64, False),
            ("eager", 1, 3, 300, 64, True),
            ("on_wait", 1, 8, 200, 128, True),
        ],
    )
    def test_window(self, mode, num_kv_heads, groups, tokens, dim, biased):
        arrays = some_operands(1, tokens, tokens, num_kv_heads, groups, dim, biased=biased)
        with interpret(mode):
            assert_accurate(arrays, *window(tokens, 64, 16))

    def test_ragged_ranges_twice(self):
        t = np.arange(300)
        bounds = ragged(2, 1, 300, 700)
        # Of a second sequence, half of the queries see no key, whole tiles of them.
        other = [
            np.select([t < 130, t < 260], [x, 500], y) for x, y in ((t // 2, 550), (t + 10, 650))
        ]
        start, end = (np.stack([x[0], y]) for x, y in zip(bounds, other, strict=True))
        arrays = some_operands(2, 300, 700, 2, 3, 64, biased=True)
        with interpret("eager"):
            found = assert_accurate(arrays, start, end)
            assert_same_bits(results_and_gradients("mosaic_tpu", arrays, start, end), found)

    def test_dense(self):
        # Walks of many tiles, most of which are seen whole.
        arrays = some_operands(1, 900, 900, 1, 1, 64, dtype=jnp.float32)
        with interpret():
            assert_accurate(arrays, np.zeros(900, np.int32), np.arange(900) + 1)

    def test_one_query(self):
        with interpret():
            assert_accurate(some_operands(2, 1, 200, 1, 4, 64), np.array([7]), np.array([195]))

    def test_what_no_query_sees_may_be_nan(self):
        with interpret():
            assert_unseen_may_be_nan("mosaic_tpu", jnp.bfloat16, 64)

    def test_strictly_causal(self):
        with interpret("eager"):
            assert_strictly_causal(jax.jit(attend), jnp.bfloat16, 64, 100)

    @pytest.mark.long
    def test_vmap(self):
        q, k, v, bias = some_operands(3, 40, 56, 1, 2, 64, biased=True)
        start, end = window(40, 24, 8)

        def results(q, k, bias):
            out, vjp = jax.vjp(lambda *x: attend(*x[:2], v[:1], start, end, x[2]), q, k, bias)
            return out, vjp(out)

        with interpret():
            mapped = jax.vmap(results, in_axes=(0, None, 0))
            mapped = jax.jit(mapped)(q[:, None], k[:1], bias[:, None])
            single = jax.jit(results)
            for b in range(3):
                expected = single(q[b : b + 1], k[:1], bias[b : b + 1])
                assert_same_bits(jax.tree.map(lambda x, b=b: x[b], mapped), expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_no_races(self, mode, capfd):
        arrays = some_operands(1, 300, 300, 2, 1, 64, biased=True)
        with interpret(mode, detect_races=True):
            jax.block_until_ready(
                results_and_gradients("mosaic_tpu", arrays, *window(300, 160, 64))
            )
        printed = capfd.readouterr().out
        assert "RACE" not in printed
        assert "non-zero count" not in printed  # of a semaphore: a copy that nobody awaits


def test_walks_only_where_ranges_reach():
    q, k = (jax.ShapeDtypeStruct((1, 2**16, heads, 128), jnp.bfloat16) for heads in (8, 2))
    sizes = plan.Sizes.of(q, k, 1.0)
    assert (sizes.columns, sizes.key_width) == (1024, 256)
    start, end = (jnp.asarray(x, jnp.int32)[None] for x in window(2**16, 512, 64))
    ranges = plan.ranges_of(start, end, sizes)
    for walks in (plan.plan_queries(ranges, sizes), plan.plan_keys(ranges, sizes)):
        first, last, *_ = np.asarray(walks[:, 0]).T
        assert np.all(last - first <= 3) and np.all(first[1:] >= first[:-1])


def test_default_on_tpus():
    bounds = window(128, 64, 16)
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        with dispatch.targeting(device):
            program = jax.make_jaxpr(lambda *x: range_attention(*x, *bounds))(
                *some_operands(1, 128, 128, 1, 2, 64)
            )
        assert "range_forward" in str(program)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("groups", [1, 5, 12, 32])
def test_keeps_to_the_budget(dtype, groups):
    shapes = jax.eval_shape(lambda: some_operands(1, 4096, 4096, 1, groups, 128, biased=True))
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in shapes[:3]] + [shapes[3]]
    bounds = window(4096, 512, 64)

    def gradients(q, k, v, bias):
        out, vjp = jax.vjp(lambda *x: attend(*x[:3], *bounds, x[3]), q, k, v, bias)
        return vjp(out)

    with dispatch.targeting(TPU):
        jax.eval_shape(gradients, *shapes)  # raises if a kernel needs more than VMEM_BUDGET


def test_refuses_what_it_cannot(monkeypatch):
    q, k, v = some_operands(1, 8, 8, 1, 2, 64)
    bounds = window(8, 8, 8)
    with pytest.raises(ValueError, match="'mosaic_tpu' cannot run range_attention on cpu: needs"):
        attend(q, k, v, *bounds)
    with dispatch.targeting(TPU):
        for given, problem in (
            ([x[..., :32] for x in (q, k, v)], "64, 128, not 32"),
            ([x.astype(jnp.float16) for x in (q, k, v)], "bfloat16 and float32, not float16"),
            ((jnp.tile(q, (1, 1, 20, 1)), k, v), "up to 32 query heads per KV head, not 40"),
        ):
            with pytest.raises(ValueError, match=problem):
                attend(*given, *bounds)
        monkeypatch.setattr(tpu, "VMEM_BUDGET", 2**16)
        with pytest.raises(ValueError, match=r"range_forward needs \d+ bytes of VMEM, over 65536"):
            attend(q, k, v, *bounds)


def abstract_operands(tokens, dim, *, batch=1, sharding=None, biased=False):
    """With 8 query and 2 KV heads."""

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=sharding)

    keys, bound = shape(tokens, 2, dim), shape(tokens, dtype=jnp.int32)
    bias = [shape(tokens, 2, dtype=jnp.float32)] if biased else []
    return shape(tokens, 8, dim), keys, keys, bound, bound, *bias


def forward_and_backward(q, k, v, start, end, *key_bias):
    # The default, so that it is what a TPU would run.
    def attend(q, k, v, *bias):
        return range_attention(q, k, v, start, end, *bias)

    out, vjp = jax.vjp(attend, q, k, v, *key_bias)
    return out, vjp(jax.tree.map(jnp.sin, out))


class TestCompiled:
    """With the compiler for TPUs."""

    @pytest.mark.parametrize(
        ("tokens", "dim", "biased"),
        [
            (2**14, 64, True),
            (2**14, 128, False),
            pytest.param(2**19, 64, False, marks=pytest.mark.long),
            pytest.param(2**19, 128, True, marks=pytest.mark.long),
        ],
    )
    def test_eight_chips(self, tokens, dim, biased):
        """Each has so many tokens, of its own sequence."""
        sharding = jax.NamedSharding(target_mesh("v5e:2x4"), P("device"))
        operands = abstract_operands(tokens, dim, batch=8, sharding=sharding, biased=biased)

        def sharded(*operands):
            return jax.shard_map(forward_and_backward, in_specs=P("device"), out_specs=P("device"))(
                *operands
            )

        compilation = compile_for("v5e:2x4", sharded, *operands)
        assert sorted(kernel.name for kernel in compilation.kernels) == sorted(KERNELS)
        assert all(0 < kernel.vmem_bytes <= tpu.VMEM_BUDGET for kernel in compilation.kernels)
        # Little more than the cotangent of out. Arrays with heads of 128 come and go in another
        # order than the kernels', so these are copied.
        q_bytes = 2 * operands[0].size // 8
        assert compilation.temporary_bytes <= (1.2 if dim == 64 else 4.8) * q_bytes

    def test_checkpoint_and_vmap(self):
        policy = jax.checkpoint_policies.save_only_these_names("range_attention")

        def gradients(q, k, v, start, end):
            f = jax.checkpoint(lambda *x: range_attention(*x, start, end), policy=policy)
            out, vjp = jax.vjp(f, q, k, v)
            return out, vjp(jax.tree.map(jnp.sin, out))

        operands = [
            jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in abstract_operands(2**10, 128)
        ]
        compilation = compile_for("v5e:2x2", jax.vmap(gradients), *operands, devices=1)
        assert sorted(kernel.name for kernel in compilation.kernels) == sorted(KERNELS)
