"""One optimizer step, compiled: micro-batches, devices, clipping, update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.mesh_axes import zeros_like
from sparsex_jax.config import ConfigError
from sparsex_jax.parallel.mesh import TOKEN_AXES, batch_share, batch_spec, used
from sparsex_jax.parallel.rules import gather, partitions, state_shardings
from sparsex_jax.training.parameters import Skeleton

# {"params": arrays by name, "optimizer": optax state, "step": int32 scalar}
TrainState = dict


def place_state(state: TrainState, skeleton: Skeleton, mesh: Mesh | None) -> TrainState:
    """Puts a state, or a part of one (NumPy or JAX arrays), where the sharding rules say."""
    # From the host: arrays on one device cannot be copied to those of other processes.
    return jax.device_put(jax.device_get(state), _shardings(state, skeleton, mesh))


def _shardings(state: TrainState, skeleton: Skeleton, mesh: Mesh | None) -> TrainState:
    if mesh is not None:
        return state_shardings(state, skeleton.axes, mesh)
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, state)


def state_like(
    params: dict, optimizer: optax.GradientTransformation, skeleton: Skeleton, mesh: Mesh | None
) -> TrainState:
    """The shapes of a state, each with the sharding that the rules say; parameters by name."""
    shapes = {
        "params": jax.eval_shape(lambda x: x, params),
        "optimizer": jax.eval_shape(optimizer.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        _shardings(shapes, skeleton, mesh),
    )


def first_state(
    params: dict, optimizer: optax.GradientTransformation, skeleton: Skeleton, mesh: Mesh | None
) -> TrainState:
    """The state before the first step, on the devices; arguments as of `state_like`."""
    like = state_like(params, optimizer, skeleton, mesh)["optimizer"]
    placed = place_state({"params": params, "step": np.int32(0)}, skeleton, mesh)
    # Where they are to lie: the moments are never whole.
    init = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, like))
    return {**placed, "optimizer": init(placed["params"])}


def fetch(x: np.ndarray | jax.Array) -> np.ndarray:
    """A copy of a whole array on the host; all processes have to ask for it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)


def place_batch(batch: dict[str, np.ndarray], accumulation: int, mesh: Mesh | None) -> dict:
    """Puts a batch onto the devices as [A, B / A, T], split along the last two axes.

    Args:
      batch: leaves [B, T], B being this process's share (`batch_share`) of the global batch.
      accumulation: A.
      mesh: of `make_mesh`.
    """
    split = {
        name: value.reshape(accumulation, -1, *value.shape[1:]) for name, value in batch.items()
    }
    if mesh is None:
        return jax.device_put(split, jax.devices()[0])
    sharding = NamedSharding(mesh, batch_spec(mesh))
    number, shares = batch_share(mesh)

    def place(value):
        parts, rows, tokens = value.shape
        first = number * rows

        def part(index):
            low, high, _ = index[1].indices(rows * shares)
            return value[index[0], low - first : high - first, index[2]]

        return jax.make_array_from_callback((parts, rows * shares, tokens), sharding, part)

    return {name: place(value) for name, value in split.items()}


def gradients_of(
    skeleton: Skeleton, top_k: int | None, mesh: Mesh | None, implementation: str | None,
    sequence_strategy: str, loss_tokens: int | None = None,
) -> Callable:  # fmt: skip
    """A function from (params, batch) to the sums (nll, weight, gradients of nll)."""
    sharded = getattr(skeleton.model_class, "sharded", False)
    if mesh is not None and not sharded and mesh.shape["seq"] * mesh.shape["tensor"] > 1:
        raise ConfigError(
            f"mesh.seq={mesh.shape['seq']} and mesh.tensor={mesh.shape['tensor']} split sequences"
            f" and heads, which {skeleton.model_class.__name__} does not support: use 1 for both"
        )
    options = {"top_k": top_k, "implementation": implementation}
    if loss_tokens is not None:
        options["loss_tokens"] = loss_tokens
    if sharded:
        options["sequence_strategy"] = sequence_strategy
    token_axes = () if mesh is None else used(TOKEN_AXES, mesh.shape)

    def loss(params, batch):
        if not sharded:
            params = {name: gather(x, skeleton.axes[name]) for name, x in params.items()}
        return skeleton.build(params).loss(
            batch["tokens"], batch["targets"], batch["weights"],
            segment_ids=batch.get("segment_ids"), **options,
        )  # fmt: skip

    def micro(params, batch):
        # The gradient of what a layer takes whole is summed over devices (`parallel.rules`).
        sums, gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return *lax.psum(sums, token_axes), gradients

    def summed(params, batch):
        first = jax.tree.map(lambda value: value[0], batch)
        if batch["tokens"].shape[0] == 1:
            return micro(params, first)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, micro(params, batch)), None

        zeros = jnp.float32(0), jnp.float32(0), jax.tree.map(zeros_like, params)
        return lax.scan(add, zeros, batch)[0]

    if mesh is None:
        return summed

    def on_devices(params, batch):
        specs = partitions(params, skeleton.axes, mesh.shape)
        # shard_map, not automatic partitioning: the kernels see the shapes of one device.
        return jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(specs, batch_spec(mesh)),
            out_specs=(P(), P(), specs),
        )(params, batch)

    return on_devices


def make_step(
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    top_k: int | None,
    mesh: Mesh | None,
    implementation: str | None = None,
    sequence_strategy: str = "auto",
    loss_tokens: int | None = None,
) -> jax.stages.Wrapped:
    """Builds the compiled step; the state passed in is consumed.

    Loss and gradients are sums over the whole batch (all micro-batches, all devices) divided by
    the sum of its weights, so that neither accumulation nor sharding changes what is optimised.

    Args:
      skeleton: the model; its class has `.loss`.
      optimizer: takes normalised gradients.
      schedule: learning rate by step, for the metrics.
      top_k: blocks selected; None takes the model's.
      mesh: of `make_mesh`; batch and state lie on it as `sparsex_jax.parallel` says.
      implementation: of the primitives; None picks by platform.
      sequence_strategy: as in `MeshConfig`.
      loss_tokens: as in `StageConfig`; the weights of all other tokens are 0.

    Returns:
      A jitted function (state, batch with leaves [A, B / A, T]) -> (state, f32 [3]: loss, learning
      rate, gradient norm before clipping, bool []: whether the new state is finite throughout).

    Raises:
      ConfigError: the mesh splits sequences or heads, and the model does not support it.
    """
    summed = gradients_of(skeleton, top_k, mesh, implementation, sequence_strategy, loss_tokens)

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
            state = lax.with_sharding_constraint(state, state_shardings(state, skeleton.axes, mesh))
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]
        return state, metrics, jnp.all(jnp.stack(finite))

    return jax.jit(step, donate_argnums=0)
