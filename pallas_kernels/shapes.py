"""Arrays brought into the shapes that kernels take: padded, and axes of vmap made batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def pad(x, axis: int, multiple: int, mode: str = "constant", fill=0):
    """Pads an axis to a multiple of a number: by `jnp.pad`, "constant" with `fill`."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if each == axis % x.ndim else 0) for each in range(x.ndim)]
    if not missing:
        return x
    return jnp.pad(x, widths, mode, **({"constant_values": fill} if mode == "constant" else {}))


def batchable(f: Callable) -> Callable:
    """Makes vmap of f, whose arrays all have a batch axis first, one call with a larger batch."""
    call = jax.custom_batching.custom_vmap(f)

    @call.def_vmap
    def _(axis_size, batched, *args):
        def merge(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        merged = jax.tree.map(merge, args, tuple(batched))
        outs = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), batchable(f)(*merged))
        return outs, jax.tree.map(lambda _: True, outs)

    return call


def differentiated_as(general: Callable, alone: Callable) -> Callable:
    """A function that `alone` computes, and `general` where it is differentiated."""

    @jax.custom_vjp
    def compute(*operands):
        return alone(*operands)

    compute.defvjp(lambda *operands: jax.vjp(general, *operands), lambda vjp, bars: vjp(bars))
    return compute
