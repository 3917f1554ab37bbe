"""Which axis of the mesh splits which axis of the parameters, and what that asks of a layer.

Parameters name their axes (`axis_names`); the state of the optimizer has those of its parameters.
Within `jax.shard_map` a layer sees a device's part: `whole` gathers what is split to be stored,
over devices with other sequences ("fsdp") and with other tokens of the same ones ("seq"); what is
split to share the work ("tensor") stays split.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.mesh_axes import vary_over, varying
from sparsex_jax.parallel.mesh import TOKEN_AXES, axis_size, used

STORED = ("fsdp", "seq")
WORK = ("tensor",)
# Logical axis -> axes of the mesh; others are not split.
RULES = {"heads": WORK, "kv_heads": WORK, "hidden": WORK, "model": STORED}
Axes = tuple[str | None, ...]


def partition(axes: Axes, sizes: Mapping[str, int]) -> P:
    """How a parameter with these logical axes lies on a mesh with these sizes.

    The scales of norms have no named axis: they are on every device.
    """
    split = [used(RULES.get(name, ()), sizes) if name else () for name in axes]
    return P(*(names[0] if len(names) == 1 else names or None for names in split))


def partitions(tree: Any, axes: Mapping[str, Axes], sizes: Mapping[str, int]) -> Any:
    """A PartitionSpec for each array of a state: of parameters, and what is kept of each.

    Args:
      tree: arrays, those of a parameter under its name, whatever is around it.
      axes: logical axes by the parameter's name.
      sizes: of the mesh's axes.
    """

    def spec(path, _):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        names = [key for key in keys if key in axes]
        return partition(axes[names[-1]], sizes) if names else P()

    return jax.tree_util.tree_map_with_path(spec, tree)


def state_shardings(state: Any, axes: Mapping[str, Axes], mesh: Mesh) -> Any:
    """Where each array of a state lies on a mesh; arguments as in `partitions`."""
    specs = partitions(state, axes, mesh.shape)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def whole(parameter: nnx.Param, dtype: Any = None) -> jax.Array:
    """A parameter as a layer computes with it, of a dtype: gathered along `STORED`.

    Its gradient is summed over the devices that have other tokens, in the parameter's own dtype,
    and each gets its part of the sum.
    """
    return gather(parameter[...], parameter.get_metadata().get("axis_names", ()), dtype)


def gather(x: jax.Array, axes: Axes, dtype: Any = None) -> jax.Array:
    """`whole`, of an array with logical axes."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    x = vary_over(frozenset(used(TOKEN_AXES)), x)
    split = used(STORED)
    for axis, name in enumerate(axes):
        if split and name and RULES.get(name) == STORED:
            return _gathered(x, axis, split, x.dtype, dtype)
    return x.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(x, axis, split, wide, dtype):
    return lax.all_gather(x.astype(dtype), split, axis=axis, tiled=True)


def _gathered_fwd(x, axis, split, wide, dtype):
    return _gathered(x, axis, split, wide, dtype), None


def _gathered_bwd(axis, split, wide, dtype, _, bar):
    return (lax.psum_scatter(bar.astype(wide), split, scatter_dimension=axis, tiled=True),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def enter_split(x: jax.Array) -> jax.Array:
    """x before layers that each device of "tensor" has a part of; its gradient is summed there."""
    return vary_over(frozenset(used(WORK)), x)


def leave_split(x: jax.Array, axes: Axes) -> jax.Array:
    """A product with a kernel of these axes: summed over the parts that its first one has."""
    split = axes[0] is not None and RULES.get(axes[0]) == WORK
    return lax.psum(x, "tensor") if split and "tensor" in varying(x) else x


def own_part(x: jax.Array, axis: int) -> jax.Array:
    """This device's part, along "tensor", of an axis of an array that all have."""
    parts = axis_size("tensor")
    if parts == 1:
        return x
    size = x.shape[axis] // parts
    first = lax.axis_index("tensor") * size
    return lax.dynamic_slice_in_dim(enter_split(x), first, size, axis)
