"""AdamW or Muon, with warm-up, cosine decay and clipping."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

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
        method = muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_projections,
            consistent_rms=_MUON_RMS,
        )
    else:
        method = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda value: value.ndim >= 2, params),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _projections(params: dict[str, jax.Array]) -> dict[str, MuonDimensionNumbers | None]:
    """Dimensions of what projects one wide vector to another; None for everything else."""

    def is_projection(name: str, x: jax.Array | optax.MaskedNode) -> bool:
        if isinstance(x, optax.MaskedNode):  # what Muon was told to leave out
            return False
        return name.endswith(".kernel") and min(x.shape) >= _LEAST_SIDE

    return {
        name: MuonDimensionNumbers() if is_projection(name, x) else None
        for name, x in params.items()
    }
