"""Runs of equal keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.segments import (
    cut_at_multiples,
    cut_runs,
    first_places,
    most_pieces,
    sum_runs,
)


@pytest.mark.parametrize("size", [0, 1, 7, 200])
@pytest.mark.parametrize("highest", [0, 3, 60])
def test_first_places(size, highest):
    rng = np.random.default_rng(size)
    for lowest, count in ((0, highest), (-2, 5), (0, 0)):  # some are negative, some beyond
        keys = np.sort(rng.integers(lowest, highest + 1, size)).astype(np.int32)
        found = jax.jit(first_places, static_argnums=1)(keys, count)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.searchsorted(keys, np.arange(count + 1)))


@pytest.mark.parametrize("count", [2**17 + 5, 2**18 - 1])
def test_first_places_of_many_numbers(count):
    rng = np.random.default_rng(count)
    keys = np.sort(rng.integers(0, count, 500)).astype(np.int32)
    found = jax.jit(first_places, static_argnums=1)(keys, count)
    np.testing.assert_array_equal(found, np.searchsorted(keys, np.arange(count + 1)))


def test_sum_runs():
    rng = np.random.default_rng(0)
    keys = np.sort(rng.integers(0, 9, 50))
    rows = {"a": rng.standard_normal((50, 3)), "b": rng.standard_normal(50)}
    found = jax.jit(sum_runs)(keys, rows)
    for n in range(50):
        run = slice(np.searchsorted(keys, keys[n]), n + 1)
        for name, x in rows.items():
            np.testing.assert_allclose(found[name][n], x[run].sum(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 4, 64])
def test_cut_runs(width):
    keys = np.sort(np.random.default_rng(1).integers(0, 9, 50))
    keys = keys[keys != 4]  # an empty run
    starts = first_places(jnp.asarray(keys), 9)
    tiles = jax.jit(cut_runs, static_argnums=(1, 2))(starts, keys.size, width)
    used = int(tiles.starts[-1])
    found = np.asarray(tiles.place)[:used][np.asarray(tiles.inside)[:used]]
    np.testing.assert_array_equal(found, np.arange(keys.size))  # each place once, in order
    for tile in range(used):
        run = int(tiles.run[tile])
        assert tiles.starts[run] <= tile < tiles.starts[run + 1] and tiles.inside[tile, 0]
        assert set(keys[np.asarray(tiles.place[tile])[np.asarray(tiles.inside[tile])]]) == {run}


@pytest.mark.parametrize("width", [1, 4, 16, 64])
@pytest.mark.parametrize("size", [0, 1, 32, 50])
def test_cut_at_multiples(width, size):
    keys = np.sort(np.random.default_rng(1).integers(0, 9, size))
    beyond = 7  # places of no run, at the end
    starts = first_places(jnp.asarray(keys, jnp.int32), 9)
    most = most_pieces(9, size + beyond, width)
    pieces = jax.jit(cut_at_multiples, static_argnums=(1, 2))(starts, width, most)
    run, begin = map(np.asarray, pieces)
    cuts = {0, *range(0, size, width), *(np.flatnonzero(np.diff(keys)) + 1)} if size else set()
    used = len(cuts)
    assert used <= most == len(run) == len(begin) - 1
    np.testing.assert_array_equal(begin[:used], sorted(cuts))
    np.testing.assert_array_equal(begin[used:], size)
    np.testing.assert_array_equal(run[:used], keys[begin[:used]])
    if size:
        np.testing.assert_array_equal(run[used:], keys[-1])
    assert np.all((run >= 0) & (run < 9))
