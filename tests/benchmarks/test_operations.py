"""Operations of traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import target_mesh
from pallas_kernels.range_attention import range_attention
from sparsex_jax.benchmarks.operations import count_operations

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
