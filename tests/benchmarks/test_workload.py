import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.block_selection import select_blocks
from sparsex_jax.benchmarks import workload
from sparsex_jax.benchmarks.workload import Workload
from sparsex_jax.config import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 1000}, "length=1000 must be a multiple of 64"),
        ({"tokens": 512}, "at least 1024: use 1024"),
        ({"tokens": 1024, "query_heads": 3}, "multiple of kv_heads=2"),
        ({"tokens": 1024, "kv_heads": 0}, "kv_heads=0 must be positive"),
        ({"tokens": 1024, "head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_wrong_shapes(fields, message):
    with pytest.raises(ConfigError, match=message):
        Workload(**fields)


def test_inputs_have_their_shapes_and_are_the_same_for_all_parts():
    work = Workload(1024, 4, 2, 16)
    names = ("q", "k", "salience", "query_features", "block_features", "dynamic_gate", "index")
    made = work.make(names)
    for name in names:
        assert (made[name].shape, made[name].dtype) == (
            work.spec(name).shape, work.spec(name).dtype,
        )  # fmt: skip
    again = work.make(reversed(names))
    for name in names:
        np.testing.assert_array_equal(made[name], again[name])
    other = dataclasses.replace(work, seed=1).make(["q"])["q"]
    assert np.mean(np.asarray(other == made["q"])) < 0.1
    features = np.asarray(made["query_features"], np.float32)
    np.testing.assert_allclose(np.mean(features**2, axis=-1), 1 / 64, rtol=0.05)
    assert np.asarray(made["dynamic_gate"]).min() >= 0


def test_random_numbers_made_in_chunks(monkeypatch):
    monkeypatch.setattr(workload, "FLOATS_PER_CHUNK", 2**12)
    numbers = workload.normal(jax.random.key(0), (1, 4096 + 64, 2, 16), np.dtype("float32"))
    numbers = np.asarray(numbers)[0].reshape(-1, 32)
    assert len(np.unique(numbers)) > 0.99 * numbers.size
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0, 1], atol=0.02)


def measured_overlap(work):
    """The overlap of all tokens with more than K blocks behind them."""
    made = work.make(("query_features", "block_features"))
    limit = np.maximum(np.arange(work.tokens) - 511, 0) // 64
    index, _ = select_blocks(
        made["query_features"], made["block_features"], limit, work.config.top_k
    )
    index = np.asarray(index)[0, limit > work.config.top_k]
    return np.mean((index[1:, :, :, None] == index[:-1, :, None]).any(-1))


def test_correlated_selections_overlap_as_wanted():
    random, correlated = (
        Workload(16384, 2, 1, 16, selection=selection) for selection in ("random", "correlated")
    )
    assert random.stretch == 1 and correlated.stretch > 1
    assert random.overlap < 0.4
    assert abs(correlated.overlap - 0.8) < 0.06
    for work in (random, correlated):
        np.testing.assert_allclose(work.overlap, measured_overlap(work), atol=0.05)


def test_no_overlap_where_nothing_is_to_choose():
    work = Workload(1024, 2, 1, 16, selection="correlated")
    assert work.overlap is None and work.stretch == 1
