"""What a plan compiles: a training step, or the reading of contexts, on devices not here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.ahead_of_time import target_mesh
from sparsex_jax.config import ConfigError, ModelConfig, TrainConfig
from sparsex_jax.modules import Transformer
from sparsex_jax.parallel.dispatch import plan_rounds
from sparsex_jax.parallel.mesh import batch_spec, check_batch, check_model
from sparsex_jax.parallel.prefill import make_prefill
from sparsex_jax.parallel.rules import state_shardings
from sparsex_jax.training.optimizer import make_optimizer, make_schedule
from sparsex_jax.training.parameters import Skeleton, split_model
from sparsex_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """A training step on devices that need not be here.

    Attributes:
      config: of the training.
      stage: number of the stage that the step is of.
      mesh: of `make_mesh`.
    """

    config: TrainConfig
    stage: int
    mesh: Mesh | None

    def __post_init__(self):
        count = len(self.config.stages)
        if not 0 <= self.stage < count:
            raise ConfigError(f"stage={self.stage} must be one of the preset's: 0 to {count - 1}")
        stage = self.config.stages[self.stage]
        check_model(self.config.model, self.mesh)
        check_batch(
            f"stages[{self.stage}]", stage.batch_size, stage.length, self.config.accumulation,
            self.config.model, self.mesh,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config.stages[self.stage].length

    @property
    def batch_size(self) -> int:
        """Sequences that are computed with at a time."""
        return self.config.stages[self.stage].batch_size // self.config.accumulation

    @property
    def top_k(self) -> int:
        """Blocks that are selected."""
        count = self.config.stages[self.stage].top_k
        return self.config.model.attention.top_k if count is None else count

    def state(self) -> dict:
        """The shapes of the state, and how they lie on the devices."""
        skeleton, params = _model(self.config.model)
        optimizer = make_optimizer(self.config.optimizer, self.config.total_steps)
        state = {
            "params": params,
            "optimizer": jax.eval_shape(optimizer.init, params),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        return _placed(state, skeleton, self.mesh)

    def batch(self) -> dict:
        """The shapes of a batch, likewise."""
        shape = self.config.accumulation, self.batch_size, self.length
        types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, batch_spec(self.mesh))
        return {name: _place(x, sharding) for name, x in batch.items()}

    def function(self) -> Callable:
        """What `make_step` makes of it."""
        skeleton, _ = _model(self.config.model)
        optimizer, steps = self.config.optimizer, self.config.total_steps
        return make_step(
            skeleton, make_optimizer(optimizer, steps), make_schedule(optimizer, steps),
            self.config.stages[self.stage].top_k, self.mesh, self.config.implementation,
            self.config.mesh.sequence_strategy, self.config.stages[self.stage].loss_tokens,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prefill:
    """The reading of contexts, one for each of the mesh's groups of devices.

    Attributes:
      config: of the model and the mesh; parameters have the model's `dtype`.
      length: tokens of a context.
      mesh: of `make_mesh`.
    """

    config: TrainConfig
    length: int
    mesh: Mesh | None

    def __post_init__(self):
        check_model(self.config.model, self.mesh)
        check_batch("prefill", self.batch_size, self.length, 1, self.config.model, self.mesh)

    @property
    def batch_size(self) -> int:
        """Contexts that are read at a time."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def top_k(self) -> int:
        """Blocks that are selected."""
        return self.config.model.attention.top_k

    def state(self) -> dict:
        """The shapes of the parameters, and how they lie on the devices."""
        skeleton, params = _model(self.config.model)
        dtype = jnp.dtype(self.config.model.dtype)

        def read(x):
            return jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype)

        return _placed({"params": jax.tree.map(read, params)}, skeleton, self.mesh)

    def batch(self) -> jax.ShapeDtypeStruct:
        """The shape of the contexts, likewise."""
        tokens = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        if self.mesh is None:
            return tokens
        return _place(tokens, NamedSharding(self.mesh, P(*batch_spec(self.mesh)[1:])))

    def function(self) -> Callable:
        """What `make_prefill` makes of it."""
        prefill = make_prefill(
            _model(self.config.model)[0], self.config.model, self.mesh,
            self.config.implementation, self.config.mesh.sequence_strategy,
        )  # fmt: skip
        return lambda state, tokens: prefill(state["params"], tokens)


Work = TrainingStep | Prefill


def absent_devices(target: str, count: int | None = None, given: str | None = None) -> list[Any]:
    """The devices of a target, of which there need be none here.

    Args:
      target, count: as in `ahead_of_time.target_mesh`.
      given: what the user calls the target; None for its name.

    Raises:
      ConfigError: there is no such target or number, or its compiler is not installed.
    """
    try:
        return list(target_mesh(target, count).devices.flat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"target={(given or target)!r}: {error}") from error


def rounds_of(work: Work) -> int:
    """Rounds of dispatch in a layer where choices are even; 1 where sequences are whole."""
    sizes, model = ({} if work.mesh is None else work.mesh.shape), work.config.model
    parts = sizes.get("seq", 1)
    rounds = plan_rounds(
        parts, work.batch_size // (sizes.get("data", 1) * sizes.get("fsdp", 1)),
        work.length // parts, model.num_heads // sizes.get("tensor", 1), model.head_dim, work.top_k,
    )  # fmt: skip
    return rounds.expected


def trace(work: Work) -> core.Jaxpr:
    """The program of a TPU, whose kernels carry estimates of their costs; those of GPUs cannot.

    Raises:
      ConfigError: libtpu is not installed.
    """
    with dispatch.targeting(absent_devices("v5e:2x2")[0]):
        return jax.make_jaxpr(work.function())(work.state(), work.batch()).jaxpr


@functools.cache
def _model(config: ModelConfig) -> tuple[Skeleton, dict]:
    """The skeleton of a model, and the shapes of its parameters."""
    skeletons = []

    def make():
        skeleton, params = split_model(Transformer(config, rngs=nnx.Rngs(0)))
        skeletons.append(skeleton)
        return params

    params = jax.eval_shape(make)
    return skeletons[0], params


def _placed(state: dict, skeleton: Skeleton, mesh: Mesh | None) -> dict:
    if mesh is None:
        return state
    return jax.tree.map(_place, state, state_shardings(state, skeleton.axes, mesh))


def _place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
