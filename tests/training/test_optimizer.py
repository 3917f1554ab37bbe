"""Muon: what it moves, how, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsex_jax.config import MeshConfig, OptimizerConfig
from sparsex_jax.parallel.mesh import make_mesh
from sparsex_jax.parallel.rules import state_shardings
from sparsex_jax.training.optimizer import make_optimizer, make_schedule
from tests.parallel.devices import on_devices

CONFIG = OptimizerConfig(method="muon", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)
PARAMS = {
    "up.kernel": (64, 96),
    "down.kernel": (96, 64),
    "gates.kernel": (64, 8),
    "convolution.taps": (4, 64),
    "embedding": (100, 64),
    "norm.scale": (64,),
    "query_log_signs": (3, 4),
}
AXES = {
    "up.kernel": ("model", "hidden"),
    "down.kernel": ("hidden", "model"),
    "gates.kernel": ("model", None),
    "convolution.taps": (None, "model"),
    "embedding": ("vocab", "model"),
    "norm.scale": (None,),
    "query_log_signs": (None, "heads"),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in PARAMS.items()}


def steps(optimizer, place=lambda state: state, count=3):
    """The updates of the last of some steps."""
    params = place(draw(0))
    state = place(optimizer.init(params))
    update = jax.jit(optimizer.update)
    for number in range(count):
        updates, state = update(place(draw(1 + number)), state, params)
    return jax.device_get(updates)


def test_projections_move_the_same_in_all_directions():
    """The iteration leaves singular values between 0.5 and 1.5 times what they should be."""
    found = steps(make_optimizer(OptimizerConfig(**vars(CONFIG) | {"weight_decay": 0.0}), 20))
    rate = make_schedule(CONFIG, 20)(2)
    for name in ("up.kernel", "down.kernel"):
        values = np.linalg.svd(found[name], compute_uv=False) / (0.2 * rate * 96**0.5)
        assert 0.5 < values.min() and values.max() < 1.5, name
    assert np.ptp(np.linalg.svd(draw(3)["up.kernel"], compute_uv=False)) > 10


def test_matrices_of_a_shape_are_made_orthogonal_together():
    config = OptimizerConfig(**vars(CONFIG) | {"weight_decay": 0.0, "momentum": 0.0})
    optimizer, schedule = make_optimizer(config, 20), make_schedule(CONFIG, 20)
    alone = optax.contrib.muon(schedule, beta=0.0, nesterov=False, consistent_rms=0.2)
    found, expected = steps(optimizer), steps(alone)
    for name in ("up.kernel", "down.kernel"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    params = draw(0)
    program = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
    assert program.count("dot_general") == 15  # five times three, as for one matrix


def test_others_move_as_with_adam():
    found = steps(make_optimizer(CONFIG, 20))
    schedule = make_schedule(CONFIG, 20)
    adam = steps(optax.nadam(schedule, CONFIG.beta1, CONFIG.beta2))
    for name in ("gates.kernel", "convolution.taps", "embedding", "norm.scale"):
        np.testing.assert_allclose(found[name], adam[name], rtol=1e-5)


def test_with_adamw_matrices_decay_and_logarithms_do_not():
    config = OptimizerConfig(**vars(CONFIG) | {"method": "adamw"})
    plain = OptimizerConfig(**vars(config) | {"weight_decay": 0.0})
    decayed, others = (steps(make_optimizer(each, 20), count=1) for each in (config, plain))
    for name, value in others.items():
        moved = not np.allclose(decayed[name], value, atol=1e-6)
        assert moved == (name not in ("norm.scale", "query_log_signs")), name


def test_what_muon_moves_decays():
    config = OptimizerConfig(**vars(CONFIG) | {"weight_decay": 0.0})
    decayed, others = steps(make_optimizer(CONFIG, 20)), steps(make_optimizer(config, 20))
    params, rate = draw(0), make_schedule(CONFIG, 20)(2)
    for name, value in others.items():
        share = CONFIG.weight_decay if name in ("up.kernel", "down.kernel") else 0
        np.testing.assert_allclose(decayed[name], value - rate * share * params[name], atol=1e-6)


@on_devices
def test_a_mesh_changes_nothing_but_rounding():
    optimizer, mesh = make_optimizer(CONFIG, 20), make_mesh(MeshConfig(1, 4, 1, 2))

    def place(tree):
        tree = jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, state_shardings(tree, AXES, mesh))

    assert not place(draw(0))["up.kernel"].sharding.is_fully_replicated
    found, whole = steps(optimizer, place), steps(optimizer)
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
