"""Choice of tokens: greedy, by temperature, from the likely ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.cache.sampling import Sampling, likely
from sparsex_jax.config import ConfigError

SHARES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


def draws(sampling, count=4000):
    logits = jnp.broadcast_to(jnp.log(SHARES), (count, 5)).astype(jnp.float32)
    choose = jax.jit(sampling.choose)
    return np.asarray(choose(logits, jnp.arange(count, dtype=jnp.uint32), jnp.int32(3)))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.71, [1, 2, 3]), (0.69, [1, 3]), (0.4 - 1e-6, [1]), (1e-9, [1])],
)
def test_top_p_cuts_and_leaves_the_rest_as_likely_as_before(top_p, kept):
    counts = np.bincount(draws(Sampling(1.0, top_p)), minlength=5)
    wanted = np.where(np.isin(np.arange(5), kept), SHARES, 0)
    wanted /= wanted.sum()
    assert (counts[wanted == 0] == 0).all()
    spread = np.sqrt(wanted * (1 - wanted) * len(SHARES) * 800) + 1e-9
    np.testing.assert_array_less(np.abs(counts - 4000 * wanted), 4.5 * spread + 1e-6)


def test_temperature_sharpens_and_0_is_greedy():
    wanted = SHARES**2 / (SHARES**2).sum()
    counts = np.bincount(draws(Sampling(0.5)), minlength=5)
    spread = np.sqrt(4000 * wanted * (1 - wanted))
    np.testing.assert_array_less(np.abs(counts - 4000 * wanted), 4.5 * spread)
    assert (draws(Sampling(), 50) == 1).all()
    tie = jnp.array([[1.0, 2.0, 2.0]])
    assert Sampling().choose(tie, jnp.zeros(1, jnp.uint32), jnp.int32(0)) == 1


def test_a_draw_depends_on_its_own_seed_step_and_logits_only():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((8, 50)), jnp.float32)
    choose, seeds = jax.jit(Sampling(1.0, 0.9).choose), jnp.array(range(5, 13), jnp.uint32)
    together = choose(logits, seeds, jnp.int32(2))
    for i in range(8):
        alone = choose(logits[i : i + 1], seeds[i : i + 1], jnp.int32(2))
        assert alone[0] == together[i]
    same = jnp.broadcast_to(logits[0], (64, 50))
    by_step = [int(choose(same[:1], seeds[:1], jnp.int32(i))[0]) for i in range(12)]
    assert len(set(by_step)) > 3
    by_seed = choose(same, jnp.arange(64, dtype=jnp.uint32), jnp.int32(2))
    assert len(set(np.asarray(by_seed).tolist())) > 8


def test_ties_at_the_cut_go_to_the_earlier_token():
    kept = np.isfinite(np.asarray(likely(jnp.zeros(4), 0.5)))
    assert kept.tolist() == [True, True, False, False]


def test_refused():
    for arguments, message in (
        ((-0.1,), "temperature=-0.1 must be at least 0"),
        ((float("nan"),), "temperature=nan"),
        ((1.0, 0.0), r"top_p=0.0 must lie in \(0, 1\]"),
        ((0.0, 0.5), "top_p=0.5 has no effect at temperature=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sampling(*arguments)
