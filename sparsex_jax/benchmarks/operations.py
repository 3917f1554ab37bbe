"""Floating-point operations, and what is sent, of a traced program: loops and recomputation too."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

from sparsex_jax.benchmarks.hlo import COLLECTIVES

_KINDS = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


def count_operations(jaxpr: core.Jaxpr, turns: int = 1) -> int:
    """Operations of matrix products and kernels of one device; a product of n terms has 2 n.

    Kernels count as their cost estimates say; in a ring, which visits all devices, they are of all
    turns together. In `jax.shard_map` shapes are those of a device. Of branches the longest counts.

    Args:
      jaxpr: of `jax.make_jaxpr`, its attribute `jaxpr`.
      turns: of a loop whose number of turns is data.
    """
    return sum(times * _operations(equation) for equation, times in _executed(jaxpr, turns))


def count_sent(jaxpr: core.Jaxpr, sizes: Mapping[str, int], turns: int = 1) -> dict[str, int]:
    """Bytes that a device sends to others, by kind of collective, as `hlo.Program.sent` counts.

    Args:
      jaxpr: as in `count_operations`.
      sizes: of the mesh's axes.
      turns: likewise.
    """
    total = dict.fromkeys(COLLECTIVES, 0)
    for equation, times in _executed(jaxpr, turns):
        if (kind := _KINDS.get(equation.primitive.name)) is not None:
            total[kind] += times * _sent(kind, equation, sizes)
    return total


def _executed(jaxpr: core.Jaxpr, turns: int) -> Iterator[tuple[core.JaxprEqn, int]]:
    """The equations that compute, kernels among them, and how many times each runs."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        parts = [] if name == "pallas_call" else _parts(params)
        if not parts:
            yield equation, 1
            continue
        if name == "cond":
            parts = [max(parts, key=lambda part: count_operations(part, turns))]
        again = {"scan": params.get("length", 1), "while": turns}.get(name, 1)
        inside = [found for part in parts for found in _executed(part, turns)]
        ring = name == "scan" and _goes_round(parts[0], params["length"])
        for each, times in inside:
            once = ring and each.primitive.name == "pallas_call"
            yield each, times if once else again * times


def _goes_round(body: core.Jaxpr, turns: int) -> bool:
    """Whether each turn of a loop sends something on, from any of as many devices to the next."""
    for equation in body.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "ppermute" and len(params["perm"]) == turns:
            return True
        if name not in ("scan", "while", "pallas_call"):
            if any(_goes_round(part, turns) for part in _parts(params)):
                return True
    return False


def _operations(equation: core.JaxprEqn) -> int:
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, result = (x.aval.shape for x in (equation.invars[0], equation.outvars[0]))  # type: ignore[attr-defined]
        return 2 * math.prod(left[axis] for axis in contracted) * math.prod(result)
    return params["cost_estimate"].flops if equation.primitive.name == "pallas_call" else 0


def _sent(kind: str, equation: core.JaxprEqn, sizes: Mapping[str, int]) -> int:
    avals: list[Any] = [x.aval for x in equation.invars]  # type: ignore[attr-defined]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in avals)
    names = equation.params.get("axes") or equation.params["axis_name"]
    group = math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))
    if kind == "collective-permute":
        return size if group > 1 else 0
    if kind == "all-gather":
        return size * (group - 1)
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group


def _parts(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs within an equation."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr))
    found = [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in leaves]
    return [x for x in found if isinstance(x, core.Jaxpr)]
