"""One step: accumulation, schedule, decay, clipping."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsex_jax.config import OptimizerConfig
from sparsex_jax.training.optimizer import make_optimizer, make_schedule
from sparsex_jax.training.parameters import split_model
from sparsex_jax.training.step import make_step, place_batch
from tests.training import tiny

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_fraction=0.1)


def first_batch():
    stage = tiny.CONFIG.stages[0]
    return next(
        iter(tiny.make_dataset(tiny.CONFIG.data, stage, seed=0, process_index=0, process_count=1))
    )


def take_step(batch, accumulation, config=CONFIG, top_k=None):
    skeleton, params = split_model(tiny.TinyModel(tiny.CONFIG.model, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config, 20)
    state = {"params": params, "optimizer": optimizer.init(params), "step": np.int32(0)}
    step = make_step(skeleton, optimizer, make_schedule(config, 20), top_k, None)
    state, metrics, finite = step(state, place_batch(batch, accumulation, None))
    assert finite == all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    return jax.device_get((state, metrics))


def test_loss_is_the_weighted_mean():
    batch = first_batch()
    model = tiny.TinyModel(tiny.CONFIG.model, rngs=nnx.Rngs(0))
    nll, weight = model.loss(**batch, top_k=3)
    _, (loss, rate, _) = take_step(batch, 1, top_k=3)
    np.testing.assert_allclose(loss, nll / weight, rtol=1e-5)
    np.testing.assert_allclose(rate, 0.1 / 4, rtol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing_but_rounding(accumulation):
    batch = first_batch()
    assert np.ptp(batch["weights"].sum(axis=1)) > 5  # equal weights would hide a wrong mean
    whole, whole_metrics = take_step(batch, 1)
    parts, parts_metrics = take_step(batch, accumulation)
    np.testing.assert_allclose(parts_metrics, whole_metrics, rtol=1e-5)
    moments, others = whole["optimizer"][1][0].mu, parts["optimizer"][1][0].mu
    for name, value in moments.items():
        assert np.abs(value).max() > 1e-4
        np.testing.assert_allclose(others[name], value, rtol=1e-3, atol=1e-7)


def test_a_batch_without_weights_moves_only_by_decay():
    batch = first_batch()
    batch["weights"] = np.zeros_like(batch["weights"])
    before = split_model(tiny.TinyModel(tiny.CONFIG.model, rngs=nnx.Rngs(0)))[1]
    state, (loss, rate, norm) = take_step(batch, 2)
    assert loss == 0 and norm == 0
    for name, value in before.items():
        keep = 1 - rate * CONFIG.weight_decay if value.ndim >= 2 else 1.0
        np.testing.assert_allclose(state["params"][name], keep * np.asarray(value), rtol=1e-6)
    assert {value.ndim for value in before.values()} == {0, 1, 2}


def test_gradients_are_clipped_by_their_global_norm():
    config = dataclasses.replace(CONFIG, clip_norm=0.01)
    state, (_, _, norm) = take_step(first_batch(), 1, config)
    assert norm > 0.1  # what is logged is the norm before clipping
    mu = state["optimizer"][1][0].mu
    clipped = np.sqrt(sum(np.sum(np.square(value)) for value in mu.values()))
    np.testing.assert_allclose(clipped, (1 - config.beta1) * config.clip_norm, rtol=1e-4)


def test_schedule_rises_and_decays():
    schedule = make_schedule(CONFIG, 20)
    rates = np.array([schedule(step) for step in range(21)])
    np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rates[[4, 20]], [0.1, 0.01], rtol=1e-6)
    assert np.all(np.diff(rates[4:]) < 0)
    short = make_schedule(CONFIG, 2)
    np.testing.assert_allclose([short(0), short(1)], [0.05, 0.1], rtol=1e-6)


def test_the_model_is_told_how_many_tokens_count():
    told = []

    class Model(tiny.TinyModel):
        def loss(self, *operands, loss_tokens=None, **options):
            told.append(loss_tokens)
            return super().loss(*operands, **options)

    skeleton, params = split_model(Model(tiny.CONFIG.model, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(CONFIG, 20)
    state = {"params": params, "optimizer": optimizer.init(params), "step": np.int32(0)}
    batch = place_batch(first_batch(), 1, None)
    for count in (7, None):
        step = make_step(skeleton, optimizer, make_schedule(CONFIG, 20), 2, None, loss_tokens=count)
        step.lower(state, batch)
    assert told == [7, None]


def test_the_model_is_told_the_implementation():
    class Model(tiny.TinyModel):
        def loss(self, *args, implementation, **kwargs):
            raise LookupError(implementation)

    skeleton, params = split_model(Model(tiny.CONFIG.model, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(CONFIG, 20)
    state = {"params": params, "optimizer": optimizer.init(params), "step": np.int32(0)}
    step = make_step(skeleton, optimizer, make_schedule(CONFIG, 20), None, None, "xla")
    with pytest.raises(LookupError, match="xla"):
        step(state, place_batch(first_batch(), 1, None))
