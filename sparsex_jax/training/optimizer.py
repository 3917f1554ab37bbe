"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) with warm-up, cosine decay and clipping."""

import jax
import optax

from sparsex_jax.config import OptimizerConfig


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
    """Clipping by global norm, then AdamW; weight decay acts on matrices (ndim >= 2) only."""

    def matrices(params):
        return jax.tree.map(lambda value: value.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=matrices,
        ),
    )
