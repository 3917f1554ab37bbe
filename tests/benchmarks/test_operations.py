"""Operations of traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import target_mesh
from pallas_kernels.range_attention import range_attention
from sparsex_jax.benchmarks.operations import count_operations, count_sent

X, Y = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def loop(x, y):
    return lax.scan(lambda total, _: (total + x @ y, None), jnp.zeros((3, 5)), None, length=7)


def branches(x, y):
    return lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: jnp.zeros((3, 5)))


def recomputed(x, y):
    """Forward, forward again, and two products backward."""
    f = jax.checkpoint(lambda x, y: jnp.sum(jnp.sin(x @ y)), prevent_cse=True)
    return jax.grad(f, argnums=(0, 1))(x, y)


@pytest.mark.parametrize(
    ("f", "products"),
    [
        (jnp.matmul, 1),
        (jax.jit(jnp.matmul), 1),
        (loop, 7),
        (lambda x, y: lax.fori_loop(0, 7, lambda _, total: total + x @ y, jnp.zeros((3, 5))), 7),
        (branches, 1),
        (recomputed, 4),
        (lambda x, y: jnp.einsum("ab,bc->ca", x, y), 1),
        (lambda x, y: jnp.sin(x), 0),
    ],
)
def test_counts(f, products):
    assert count_operations(jax.make_jaxpr(f)(X, Y).jaxpr) == products * PRODUCT


def test_batched_product():
    jaxpr = jax.make_jaxpr(jnp.matmul)(jnp.ones((6, 3, 4)), jnp.ones((6, 4, 5))).jaxpr
    assert count_operations(jaxpr) == 6 * PRODUCT


def test_kernels_count_as_they_say():
    q, k = (jax.ShapeDtypeStruct((1, 2048, heads, 64), jnp.bfloat16) for heads in (4, 2))
    bound = jax.ShapeDtypeStruct((2048,), jnp.int32)
    with dispatch.targeting(target_mesh("v5e:2x2").devices.flat[0]):
        jaxpr = jax.make_jaxpr(lambda *x: range_attention(*x))(q, k, k, bound, bound).jaxpr
    assert count_operations(jaxpr) == 2 * 2 * 4 * 2048 * 1024 * 64  # a walk of 1024 keys


def test_shapes_are_those_of_a_device():
    def f(x, y):
        mesh = jax.sharding.AbstractMesh(
            (3,), ("device",), axis_types=(jax.sharding.AxisType.Auto,)
        )
        spec = jax.sharding.PartitionSpec("device")
        everywhere = jax.sharding.PartitionSpec()
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, everywhere), out_specs=spec)(
            x, y
        )

    assert count_operations(jax.make_jaxpr(f)(X, Y).jaxpr) == PRODUCT // 3


def test_loops_that_data_end_count_as_often_as_is_said():
    def f(x, y):
        return lax.while_loop(lambda z: z[0, 0] < 9, lambda z: z + x @ y, jnp.zeros((3, 5)))

    jaxpr = jax.make_jaxpr(f)(X, Y).jaxpr
    assert count_operations(jaxpr) == PRODUCT and count_operations(jaxpr, 6) == 6 * PRODUCT


def on_eight(f, *arguments):
    """The program of eight devices along "seq"."""
    mesh = jax.sharding.AbstractMesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(f, mesh=mesh, in_specs=P("seq"), out_specs=P("seq"), check_vma=False)
    return jax.make_jaxpr(split)(*arguments).jaxpr


def test_what_is_sent():
    def f(x):  # 4 numbers on each device
        everything = lax.all_gather(x, "seq")
        parts = lax.psum_scatter(everything, "seq") + lax.all_to_all(everything, "seq", 0, 0)[0]
        return lax.ppermute(parts, "seq", [(0, 1)]) + lax.psum(x, "seq")

    def often(x):
        def more(x):
            return lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0]

        return lax.while_loop(lambda x: x[0] < 9, more, x)

    x = jnp.ones(32)
    expected = {
        "all-gather": 7 * 16, "all-reduce": 2 * 7 * 16 / 8, "reduce-scatter": 7 * 16,
        "all-to-all": 7 * 16, "collective-permute": 16,
    }  # fmt: skip
    assert count_sent(on_eight(f, x), {"seq": 8}) == expected
    found = count_sent(on_eight(often, x), {"seq": 8}, turns=5)
    assert found == {kind: 15 * size for kind, size in expected.items()}


@pytest.mark.parametrize("round_trip", [True, False])
def test_kernels_of_a_ring_count_once(round_trip):
    q = jax.ShapeDtypeStruct((8, 2048, 2, 64), jnp.bfloat16)
    bound = jnp.full(2048, 2048)

    def f(x):
        def turn(x, _):
            sent = lax.ppermute(x, "seq", [(i, (i + 1) % 8) for i in range(8 if round_trip else 7)])
            return range_attention(x, sent, sent, bound * 0, bound)[0], None

        return lax.scan(turn, x, None, length=8)[0]

    with dispatch.targeting(target_mesh("v5e:2x2").devices.flat[0]):
        jaxpr = on_eight(f, q)
    once = 2 * 2 * 2 * 2048 * 1024 * 64  # as above
    assert count_operations(jaxpr) == (1 if round_trip else 8) * once
