"""AdamW or Muon, with warm-up, cosine decay and clipping."""

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sparsex_jax.config import OptimizerConfig

_LEAST_SIDE = 32  # of a matrix whose updates Muon makes orthogonal
_MUON_RMS = 0.2  # of an update's entries, in units of the learning rate: as much as AdamW's


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then a cosine down to `final_fraction`.

    Args:
      config: the optimizer's.
      total_steps: steps of the whole run; a warm-up that would take longer ends with it.
    """
    peak = config.learning_rate
    warmup = min(config.warmup_steps, total_steps)
    decay = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1), config.final_fraction)
    if warmup == 0:
        return decay
    # Step 0 takes peak / warmup, not 0: no step is without effect.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon, as `OptimizerConfig` says."""
    schedule = make_schedule(config, total_steps)
    if config.method == "muon":
        orthogonal = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            optax.stateless(_orthogonal),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
        adam = optax.nadam(schedule, config.beta1, config.beta2)
        method = optax.partition({"orthogonal": orthogonal, "adam": adam}, _labels)
    else:
        method = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: _decays(name, x) for name, x in params.items()},
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _decays(name: str, x: jax.Array) -> bool:
    """Matrices do, but not logarithms: these would go to 0, and what they are of to 1."""
    return x.ndim >= 2 and "_log_" not in name


def _labels(params: dict[str, jax.Array]) -> dict[str, str]:
    """Which way each is moved: those that project one wide vector to another as Muon does."""

    def is_projection(name: str, x: jax.Array) -> bool:
        return name.endswith(".kernel") and min(x.shape) >= _LEAST_SIDE

    return {name: "orthogonal" if is_projection(name, x) else "adam" for name, x in params.items()}


def _orthogonal(updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """Matrices with nearly equal singular values instead, and entries of `_MUON_RMS` on average.

    Those of one shape, or transposed, go through the iteration together: a small model's are too
    small, one by one, to keep a GPU busy.
    """
    del params
    leaves, tree = jax.tree.flatten(updates)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, x in enumerate(leaves):
        groups.setdefault(tuple(sorted(x.shape)), []).append(number)
    batched = scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(1, 2)
    )
    for (low, high), numbers in groups.items():
        wide = [leaves[n] if leaves[n].shape == (low, high) else leaves[n].T for n in numbers]
        stacked = jnp.stack(wide)
        found, _ = batched.update(stacked, batched.init(stacked))
        for n, x in zip(numbers, _MUON_RMS * high**0.5 * found, strict=True):
            leaves[n] = x if leaves[n].shape == (low, high) else x.T
    return jax.tree.unflatten(tree, leaves)
