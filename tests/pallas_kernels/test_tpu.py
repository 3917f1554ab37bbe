"""What all Mosaic TPU kernels have: costs, the order of their grids, a bound on VMEM."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

from pallas_kernels import dispatch, tpu
from pallas_kernels.ahead_of_time import compile_for, target_mesh
from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.csr import BlockCSR
from pallas_kernels.range_attention import range_attention

KERNELS = {
    "block_selection",
    "block_sparse_attention_backward",
    "block_sparse_attention_forward",
    "block_sparse_attention_sum",
    "range_forward",
    "range_key_gradients",
    "range_query_gradient",
}


def all_primitives(q, k, v, u, c, bias, start, end):
    """The gradients of all three."""

    def total(q, k, v, u, c, bias):
        index, score = select_blocks(u, c, start // 64, 16)
        near = range_attention(q, k, v, start, end, bias)
        far = block_sparse_attention(
            q, k, v, BlockCSR.from_selection(index, score, c.shape[1]), block_size=64
        )
        return sum(jnp.sum(jnp.where(x > -jnp.inf, x, 0)) for x in (*near, *far))

    return jax.grad(total, argnums=range(6))(q, k, v, u, c, bias)


def operands(tokens, groups, dim):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    keys, bound = shape(1, tokens, 2, dim), shape(tokens, dtype=jnp.int32)
    return (
        shape(1, tokens, 2 * groups, dim), keys, keys, shape(1, tokens, 2, 64),
        shape(1, tokens // 64, 2, 64), shape(1, tokens, 2, dtype=jnp.float32), bound, bound,
    )  # fmt: skip


def calls(jaxpr):
    """The calls of kernels in a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
            continue
        for leaf in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
        ):
            if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr):
                yield from calls(getattr(leaf, "jaxpr", leaf))


@pytest.mark.parametrize(
    ("tokens", "groups", "dim"), [(512, 1, 64), (2**19, 4, 64), (2**19, 8, 128), (2**15, 32, 128)]
)
def test_kernels_say_what_they_take(tokens, groups, dim):
    with dispatch.targeting(target_mesh("v5e:2x2").devices.flat[0]):
        jaxpr = jax.make_jaxpr(all_primitives)(*operands(tokens, groups, dim)).jaxpr
    found = list(calls(jaxpr))
    assert {params["name"] for params in found} == KERNELS
    for params in found:
        options, cost = params["compiler_params"], params["cost_estimate"]
        assert len(options.dimension_semantics) == len(params["grid_mapping"].grid)
        assert 0 < options.vmem_limit_bytes <= tpu.VMEM_BUDGET
        moved = [x.size * x.dtype.itemsize for x in params["out_avals"]]
        assert cost.flops > 0 and cost.bytes_accessed >= sum(moved)


@pytest.mark.long
@pytest.mark.parametrize(("groups", "dim"), [(2, 64), (8, 128)])
def test_libtpu_counts_no_more_vmem(groups, dim):
    """It refuses a kernel that takes more than its bound, too."""
    target, shapes = "v5e:2x2", operands(512, groups, dim)
    with dispatch.targeting(target_mesh(target).devices.flat[0]):
        jaxpr = jax.make_jaxpr(all_primitives)(*shapes).jaxpr
    bounds = {params["name"]: params["compiler_params"].vmem_limit_bytes for params in calls(jaxpr)}
    compilation = compile_for(target, all_primitives, *shapes, devices=1)
    assert {kernel.name for kernel in compilation.kernels} == KERNELS
    for kernel in compilation.kernels:
        assert kernel.vmem_bytes <= bounds[kernel.name], kernel.name


def test_budget_leaves_room_on_every_chip():
    """A quarter is the compiler's."""
    for name in ("TPU_V5E", "TPU_V5P", "TPU_V6E"):
        chip = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[name], 1)
        assert tpu.VMEM_BUDGET <= 0.75 * chip.vmem_capacity_bytes, name
