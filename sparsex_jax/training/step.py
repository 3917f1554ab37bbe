"""One optimizer step, compiled: micro-batches, devices, clipping, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsex_jax.training.errors import TrainingError
from sparsex_jax.training.parameters import Skeleton

# {"params": arrays by name, "optimizer": optax state, "step": int32 scalar}
TrainState = dict


def make_mesh(devices: list[Any] | None = None) -> Mesh | None:
    """A mesh with the axis "data" over devices, by default those of all processes.

    None for a single one.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) == 1:
        return None
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def spread(tree: Any, devices: int) -> Any:
    """How the arrays of a state lie on devices: a PartitionSpec for each.

    A matrix is spread along its longest axis that the devices divide (ZeRO, arXiv:1910.02054), so
    that each holds only its part of parameters and moments; the rest is on every device.
    """

    def spec(x) -> P:
        axes = [axis for axis in range(x.ndim) if x.ndim >= 2 and x.shape[axis] % devices == 0]
        if not axes:
            return P()
        longest = max(axes, key=lambda axis: x.shape[axis])
        return P(*[None] * longest, "data")

    return jax.tree.map(spec, tree)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of a state lies: as `spread` says."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), spread(state, mesh.size))


def check_divisible(name: str, batch_size: int, accumulation: int, mesh: Mesh | None) -> None:
    """Raises TrainingError unless every device gets as many sequences of each micro-batch."""
    unit = accumulation * (mesh.size if mesh else 1)
    if batch_size % unit:
        below = batch_size // unit * unit
        advice = f"{below} or {below + unit}" if below else str(unit)
        raise TrainingError(
            f"{name}.batch_size={batch_size} must be a multiple of accumulation={accumulation}"
            f" times {unit // accumulation} devices: use {advice}, or fewer devices"
        )


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Puts a state (NumPy or JAX arrays) onto the devices, as `spread` says."""
    if mesh is None:
        return jax.device_put(state, jax.devices()[0])
    # From the host: arrays on one device cannot be copied to those of other processes.
    return jax.device_put(jax.device_get(state), state_shardings(state, mesh))


def fetch(x: np.ndarray | jax.Array) -> np.ndarray:
    """A copy of a whole array on the host; all processes have to ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)


def place_batch(batch: dict[str, np.ndarray], accumulation: int, mesh: Mesh | None) -> dict:
    """Puts a batch onto the devices as [A, B / A, T], split along the second axis.

    Args:
      batch: leaves [B, T], B being this process's share of the global batch.
      accumulation: A.
      mesh: of `make_mesh`.
    """
    split = {
        name: value.reshape(accumulation, -1, *value.shape[1:]) for name, value in batch.items()
    }
    if mesh is None:
        return jax.device_put(split, jax.devices()[0])
    sharding = NamedSharding(mesh, P(None, "data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in split.items()
    }


def _gather(params: Any, specs: Any) -> Any:
    """Whole arrays from a device's parts, within shard_map; `specs` are those of `spread`."""

    def whole(x, spec):
        return lax.all_gather(x, "data", axis=len(spec) - 1, tiled=True) if spec else x

    return jax.tree.map(whole, params, specs)


def _add_up(tree: Any, devices: int) -> Any:
    """Sums of the devices' whole arrays, of which each device gets its part, as `spread` says."""

    def total(x, spec):
        if not spec:
            return lax.psum(x, "data")
        return lax.psum_scatter(x, "data", scatter_dimension=len(spec) - 1, tiled=True)

    return jax.tree.map(total, tree, spread(tree, devices))


def _summed_gradients(
    skeleton: Skeleton, top_k: int | None, mesh: Mesh | None, implementation: str | None
) -> Callable:
    """A function from (params, batch) to the sums (nll, weight, gradients of nll)."""

    def loss(params, batch):
        nll, weight = skeleton.build(params).loss(
            batch["tokens"],
            batch["targets"],
            batch["weights"],
            segment_ids=batch.get("segment_ids"),
            top_k=top_k,
            implementation=implementation,
        )
        return nll, weight

    def micro(params, batch):
        (nll, weight), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        sums = nll, weight, gradients
        return sums if mesh is None else _add_up(sums, mesh.size)

    def summed(params, batch):
        first = jax.tree.map(lambda value: value[0], batch)
        if batch["tokens"].shape[0] == 1:
            return micro(params, first)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, micro(params, batch)), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro, params, first)
        )
        return lax.scan(add, zeros, batch)[0]

    if mesh is None:
        return summed

    def on_devices(params, batch):
        specs = spread(params, mesh.size)
        # shard_map, not automatic partitioning: the kernels see the shapes of one device.
        return jax.shard_map(
            lambda params, batch: summed(_gather(params, specs), batch),
            mesh=mesh,
            in_specs=(specs, P(None, "data")),
            out_specs=(P(), P(), specs),
            check_vma=False,
        )(params, batch)

    return on_devices


def make_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    top_k: int | None,
    mesh: Mesh | None,
    implementation: str | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, jax.Array, jax.Array]]:
    """Builds the compiled step; the state passed in is consumed.

    Loss and gradients are sums over the whole batch (all micro-batches, all devices) divided by
    the sum of its weights, so that neither accumulation nor sharding changes what is optimised.

    Args:
      skeleton: the model; its class has `.loss`.
      optimizer: takes normalised gradients.
      schedule: learning rate by step, for the metrics.
      top_k: blocks selected; None takes the model's.
      mesh: of `make_mesh`; batches are sharded along "data", the state as `spread` says.
      implementation: of the primitives; None picks by platform.

    Returns:
      A function (state, batch with leaves [A, B / A, T]) -> (state, f32 [3]: loss, learning rate,
      gradient norm before clipping, bool []: whether the new state is finite throughout).
    """
    summed = _summed_gradients(skeleton, top_k, mesh, implementation)

    def step(state, batch):
        nll, weight, gradients = summed(state["params"], batch)
        scale = 1 / jnp.where(weight > 0, weight, 1)
        gradients = jax.tree.map(lambda value: value * scale, gradients)
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        metrics = jnp.stack(
            [nll * scale, schedule(state["step"]), optax.tree.norm(gradients)]
        ).astype(jnp.float32)
        state = {
            "params": optax.apply_updates(state["params"], updates),
            "optimizer": moments,
            "step": state["step"] + 1,
        }
        if mesh is not None:
            state = lax.with_sharding_constraint(state, state_shardings(state, mesh))
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]
        return state, metrics, jnp.all(jnp.stack(finite))

    return jax.jit(step, donate_argnums=0)
