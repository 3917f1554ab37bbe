"""range_attention on Hopper GPUs: interpreted or on a GPU (make test-gpu), and compiled for one."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import hopper
from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.range_attention import mosaic_gpu, range_attention
from tests.pallas_kernels import accuracy
from tests.pallas_kernels.accuracy import assert_same_bits
from tests.pallas_kernels.hopper_interpreter import cut_small, interpret
from tests.pallas_kernels.test_range_attention import (
    assert_strictly_causal,
    assert_unseen_may_be_nan,
    operands,
    ragged,
    results_and_gradients,
    window,
)

# A kernel that waits for ever does not listen to signals.
pytestmark = pytest.mark.timeout(300, method="thread")


def attend(q, k, v, start, end, key_bias=None, *, all_finite=False):
    return range_attention(
        q, k, v, start, end, key_bias, all_finite=all_finite, implementation="mosaic_gpu"
    )


def bfloat16_operands(batch, tokens, keys, num_kv_heads, groups, dim, *, biased=False):
    *arrays, bias = operands(0, batch, tokens, keys, num_kv_heads, groups, dim, jnp.bfloat16)
    return (*arrays, bias) if biased else tuple(arrays)


def assert_accurate(arrays, start, end):
    """Results and gradients are right to rounding."""
    exact = [x.astype(jnp.float32) for x in arrays]
    found, plain, right = (
        results_and_gradients(name, given, start, end)
        for name, given in (("mosaic_gpu", arrays), ("xla", arrays), ("reference", exact))
    )
    accuracy.assert_accurate(("out", "lse", "q", "k", "v", "key_bias"), found, plain, right)


class TestSmall:
    """With two thread blocks and two stages, so that all take turns."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        cut_small(monkeypatch, mosaic_gpu, programs=2, stages=2)

    @pytest.mark.parametrize(
        ("num_kv_heads", "groups", "tokens", "size", "block"),
        [(1, 1, 200, 64, 16), (1, 3, 100, 64, 64), (2, 4, 72, 32, 8), (1, 8, 160, 128, 16)],
    )
    def test_window(self, hopper, num_kv_heads, groups, tokens, size, block):
        arrays = bfloat16_operands(1, tokens, tokens, num_kv_heads, groups, 64)
        assert_accurate(arrays, *window(tokens, size, block))

    @pytest.mark.parametrize("dim", [128, pytest.param(256, marks=pytest.mark.long)])
    def test_wide_heads(self, hopper, dim):
        arrays = bfloat16_operands(1, 136, 136, 1, 2, dim, biased=True)
        assert_accurate(arrays, *window(136, 96, 32))

    @pytest.mark.parametrize("biased", [False, True])
    def test_three_warpgroups(self, hopper, monkeypatch, biased):
        cut_small(monkeypatch, mosaic_gpu, programs=2, stages=2, computing=3)
        arrays = bfloat16_operands(1, 200, 200, 1, 5, 64, biased=biased)
        assert_accurate(arrays, *window(200, 128, 16))

    def test_ragged_ranges_twice(self, hopper):
        t = np.arange(75)
        bounds = ragged(2, 1, 75, 101)
        # Of a second sequence, half of the queries see no key, whole tiles of them.
        other = [np.select([t < 30, t < 60], [x, 50], y) for x, y in ((t // 2, 55), (t + 10, 95))]
        start, end = (np.stack([x[0], y]) for x, y in zip(bounds, other, strict=True))
        arrays = bfloat16_operands(2, 75, 101, 2, 3, 64, biased=True)
        assert_accurate(arrays, start, end)
        first, second = (results_and_gradients("mosaic_gpu", arrays, start, end) for _ in range(2))
        assert_same_bits(first, second)

    @pytest.mark.long
    def test_one_query(self, hopper):
        assert_accurate(bfloat16_operands(2, 1, 200, 1, 4, 64), np.array([7]), np.array([195]))

    @pytest.mark.parametrize("biased", [True, False])
    def test_what_no_query_sees_may_be_nan(self, hopper, biased):
        assert_unseen_may_be_nan("mosaic_gpu", jnp.bfloat16, 64, biased)

    def test_same_if_all_is_finite(self, hopper):
        t = np.arange(75)
        start = np.maximum(t, 20) - 17
        end = np.where(t < 20, start, start + 40)  # 20 queries see nothing, 3 + 4 keys nobody
        q, k, v, bias = bfloat16_operands(1, 75, 101, 2, 3, 64, biased=True)

        for given in ((), (bias,)):
            hidden, promised = (
                jax.jit(functools.partial(forward_and_backward, all_finite=x))(
                    q, k, v, start, end, *given
                )
                for x in (False, True)
            )
            assert np.all(hidden[1][0][:, :20] == 0) and np.all(hidden[1][1][:, :3] == 0)
            assert_same_bits(promised, hidden)

    def test_strictly_causal(self, hopper):
        assert_strictly_causal(jax.jit(attend), jnp.bfloat16, 64, 100)

    @pytest.mark.long
    def test_vmap(self, hopper):
        q, k, v, bias = bfloat16_operands(3, 40, 56, 1, 2, 64, biased=True)
        start, end = window(40, 24, 8)

        def results(q, k, bias):
            out, vjp = jax.vjp(lambda *x: attend(*x[:2], v[:1], start, end, x[2]), q, k, bias)
            return out, vjp(out)

        single = jax.jit(results)
        mapped = jax.jit(jax.vmap(results, in_axes=(0, None, 0)))(q[:, None], k[:1], bias[:, None])
        for b in range(3):
            expected = single(q[b : b + 1], k[:1], bias[b : b + 1])
            assert_same_bits(jax.tree.map(lambda x, b=b: x[b], mapped), expected)

    def test_no_races(self, capfd):
        q, k, v, bias = bfloat16_operands(1, 200, 200, 1, 3, 64, biased=True)
        start, end = window(200, 160, 64)

        @jax.jit
        def gradients(q, k, v, bias):
            out, vjp = jax.vjp(lambda *x: attend(*x[:3], start, end, x[3]), q, k, v, bias)
            return vjp(out)

        with interpret(detect_races=True):
            jax.block_until_ready(gradients(q, k, v, bias))
        assert "RACE" not in capfd.readouterr().out


@pytest.mark.gpu
class TestLarge:
    """With what only a GPU has: time and memory."""

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    def test_accurate_and_deterministic(self, dim, biased):
        arrays = bfloat16_operands(1, 4096, 4096, 2, 8, dim, biased=biased)
        bounds = window(4096, 512, 64)
        assert_accurate(arrays, *bounds)
        first = results_and_gradients("mosaic_gpu", arrays, *bounds)
        for _ in range(20):
            assert_same_bits(results_and_gradients("mosaic_gpu", arrays, *bounds), first)

    def test_dense(self):
        arrays = bfloat16_operands(1, 4096, 4096, 1, 4, 128)
        assert_accurate(arrays, np.zeros(4096, np.int32), np.arange(4096) + 1)

    def test_beyond_32_bits(self):
        tokens, tail = 2**23 + 4096, 8192  # times 2 heads of 128: over 2^31 elements
        q, k, v = (
            jax.random.normal(jax.random.key(i), (1, tokens, heads, 128), jnp.bfloat16)
            for i, heads in enumerate((2, 1, 1))
        )
        start, end = (jnp.asarray(x, jnp.int32) for x in window(tokens, 512, 64))

        @jax.jit
        def results(q, k, v, start, end):
            (out, lse), vjp = jax.vjp(lambda *x: attend(*x, start, end), q, k, v)
            return out, lse, *vjp((out, lse))

        # The last queries alone, with the keys that they see; of those, only they see the last.
        first = int(start[-tail])
        expected = results(
            q[:, -tail:], k[:, first:], v[:, first:], start[-tail:] - first, end[-tail:] - first
        )
        found = results(q, k, v, start, end)
        last = tail - 1024
        assert_same_bits([x[:, -last:] for x in found[:2]], [x[:, -last:] for x in expected[:2]])
        # XLA sums delta in an order that depends on the length.
        for x, y in zip(found[2:], expected[2:], strict=True):
            x, y = (np.asarray(each[:, -last:], np.float32) for each in (x, y))
            np.testing.assert_allclose(x, y, 2**-7, 2**-7)

    def test_checkpoint(self):
        arrays = bfloat16_operands(1, 1024, 1024, 2, 8, 128)
        start, end = window(1024, 512, 64)

        def loss(q, k, v):
            out, lse = attend(q, k, v, start, end)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(lse)

        gradients = (
            jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arrays) for f in (loss, jax.checkpoint(loss))
        )
        assert_same_bits(*gradients)


def abstract_operands(tokens, dim, *, batch=1, num_heads=16, num_kv_heads=2, biased=False):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((batch, *sizes), dtype)

    keys = shape(tokens, num_kv_heads, dim)
    bias = [shape(tokens, num_kv_heads, dtype=jnp.float32)] if biased else []
    bound = shape(tokens, dtype=jnp.int32)
    return shape(tokens, num_heads, dim), keys, keys, bound, bound, *bias


def forward_and_backward(q, k, v, start, end, *key_bias, all_finite=False):
    def f(*x):
        return attend(*x[:3], start, end, *x[3:], all_finite=all_finite)

    out, vjp = jax.vjp(f, q, k, v, *key_bias)
    return out, vjp(out)


def kernel_calls(compilation) -> list[str]:
    """The lines of a program in which kernels are called."""
    program = compilation.executable.as_text().splitlines()
    return [line for line in program if 'custom_call_target="mosaic_gpu' in line]


class TestCompiled:
    """With the compilers for H100 and H200."""

    @pytest.mark.parametrize(
        ("target", "dim", "biased"),
        [
            pytest.param("h200", 64, True, marks=pytest.mark.long),
            ("h200", 128, True),
            pytest.param("h200", 128, False, marks=pytest.mark.long),
            pytest.param("h200", 64, False, marks=pytest.mark.long),
            pytest.param("h100", 128, False, marks=pytest.mark.long),
        ],
    )
    def test_keeps_to_registers(self, target, dim, biased):
        operands = abstract_operands(2**17, dim, biased=biased)
        compilation = compile_for(target, forward_and_backward, *operands)
        assert len(compilation.kernels) == 3
        for kernel in compilation.kernels:
            assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
            assert not kernel.notes

    def test_warpgroups_share_the_registers(self, monkeypatch):
        asked, ask = {}, plgpu.set_max_registers

        def record(n, *, action):
            asked[action] = n
            ask(n, action=action)

        monkeypatch.setattr(plgpu, "set_max_registers", record)
        (kernel,) = compile_for("h200", attend, *abstract_operands(2**14, 128)).kernels
        # Who asks for more than the others have left waits for ever.
        assert asked["decrease"] + 2 * asked["increase"] <= 3 * kernel.registers

    @pytest.mark.long
    def test_widest_heads(self):
        for f in (attend, forward_and_backward):
            assert compile_for("h200", f, *abstract_operands(2**17, 256)).kernels

    @pytest.mark.long
    @pytest.mark.parametrize("keys", [P(), P(None, "device")])
    def test_queries_over_8_devices(self, keys):
        queries = P(None, "device")

        def sharded(*operands):
            return jax.shard_map(
                forward_and_backward,
                in_specs=(queries, keys, keys, queries, queries),
                out_specs=((queries, queries), (queries, keys, keys)),
            )(*operands)

        compilation = compile_for("h200", sharded, *abstract_operands(2**17, 128), devices=8)
        assert len(kernel_calls(compilation)) == 3
        # What queries elsewhere give to keys that are everywhere is added up.
        assert ("all-reduce" in compilation.executable.as_text()) == (keys == P())

    @pytest.mark.long
    def test_checkpoint(self):
        policy = jax.checkpoint_policies.save_only_these_names("range_attention")

        def gradients(q, k, v, start, end):
            f = jax.checkpoint(lambda *x: attend(*x, start, end), policy=policy)
            out, vjp = jax.vjp(f, q, k, v)
            return out, vjp(jax.tree.map(jnp.sin, out))

        compilation = compile_for("h200", gradients, *abstract_operands(2**17, 128))
        assert len(kernel_calls(compilation)) == 3

    def test_layers_share_a_kernel(self, monkeypatch):
        launched = []

        def launch(name, *args, **kwargs):
            launched.append(name)
            return stock_launch(name, *args, **kwargs)

        def layers(q, *others):
            for _ in range(4):
                q, _ = attend(jnp.sin(q), *others)
            return q

        stock_launch = hopper.launch
        monkeypatch.setattr(hopper, "launch", launch)
        compilation = compile_for("h200", layers, *abstract_operands(3 * 2**12, 128))
        assert launched == ["range_forward"]
        assert len(kernel_calls(compilation)) == 4 and len(compilation.kernels) == 1

    @pytest.mark.long
    def test_vmap_is_one_call(self):
        operands = abstract_operands(2**14, 128)
        stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in operands]
        assert len(kernel_calls(compile_for("h200", jax.vmap(forward_and_backward), *stacked))) == 3

    @pytest.mark.long
    def test_memory_of_a_million_tokens(self):
        q, k, *_ = operands = abstract_operands(2**20, 128)
        size = 2 * q.size + 4 * k.size
        forward, both = (compile_for("h200", f, *operands) for f in (attend, forward_and_backward))
        # Copies without what nobody sees: of k and v, and of q and its cotangent.
        assert forward.temporary_bytes < 4 * k.size + size / 16
        assert both.temporary_bytes < 4 * k.size + 4 * q.size + size / 8
        forward, both = (
            compile_for("h200", functools.partial(f, all_finite=True), *operands)
            for f in (attend, forward_and_backward)
        )
        assert forward.temporary_bytes < size / 16 and both.temporary_bytes < size / 8

    @pytest.mark.long
    def test_64_million_tokens(self):
        operands = abstract_operands(2**26, 128, num_heads=2, num_kv_heads=1)
        assert compile_for("h200", forward_and_backward, *operands).kernels


def test_refuses_what_it_cannot():
    q, k, v = bfloat16_operands(1, 8, 8, 1, 2, 64)
    start, end = window(8, 8, 8)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run range_attention on cpu: needs"):
        attend(q, k, v, start, end)
    with interpret():
        for operands, problem in (
            ([x[..., :32] for x in (q, k, v)], "64, 128, 256, not 32"),
            ([x.astype(jnp.float32) for x in (q, k, v)], "takes bfloat16, not float32"),
            ((jnp.tile(q, (1, 1, 12, 1)), k, v), "up to 16 query heads per KV head, not 24"),
        ):
            with pytest.raises(ValueError, match=problem):
                attend(*operands, start, end)
