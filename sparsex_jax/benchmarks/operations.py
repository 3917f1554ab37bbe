"""Floating-point operations of a traced program, loops and recomputation included."""

import math
from typing import Any

import jax
from jax.extend import core


def count_operations(jaxpr: core.Jaxpr) -> int:
    """Operations of matrix products and kernels of one device; a product of n terms has 2 n.

    Kernels count as their cost estimates say. In `jax.shard_map` shapes are those of a device. A
    loop whose number of turns is data counts as one turn, and of branches the longest counts.

    Args:
      jaxpr: of `jax.make_jaxpr`, its attribute `jaxpr`.
    """
    return sum(_count(equation) for equation in jaxpr.eqns)


def _count(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, result = (x.aval.shape for x in (equation.invars[0], equation.outvars[0]))  # type: ignore[attr-defined]
        return 2 * math.prod(left[axis] for axis in contracted) * math.prod(result)
    if name == "pallas_call":
        return params["cost_estimate"].flops
    parts = [count_operations(part) for part in _parts(params)]
    if name == "cond":
        return max(parts)
    return sum(parts) * (params["length"] if name == "scan" else 1)


def _parts(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs within an equation."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr))
    found = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in leaves]
    return [x for x in found if isinstance(x, core.Jaxpr)]
