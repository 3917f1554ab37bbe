"""The choice of implementations, and the shared validation of operands."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checks, dispatch
from pallas_kernels.dispatch import Implementation


def fast(x):
    return x


def portable(x):
    return x


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    dispatch.register(
        "range_attention",
        Implementation("xla", portable),
        Implementation(
            "mosaic_gpu", fast, lambda platform: None if platform == "gpu" else "needs sm_90"
        ),
    )


def test_takes_the_best_that_can_run(registry, monkeypatch):
    assert dispatch.select("range_attention") is portable
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.select("range_attention") is fast
    assert dispatch.select("range_attention", "xla") is portable


def test_says_once_which_one_and_why(registry, caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            dispatch.select("range_attention")
    assert [record.getMessage() for record in caplog.records] == [
        "range_attention: xla (the first that runs on cpu; not mosaic_gpu: needs sm_90)"
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("cuda", "implementation='cuda' is not an implementation of range_attention; use xla"),
        ("mosaic_gpu", "cannot run range_attention on cpu: needs sm_90; use xla or None"),
    ],
)
def test_explicit_choice_never_falls_back(registry, name, problem):
    with pytest.raises(ValueError, match=problem):
        dispatch.select("range_attention", name)


def test_rejects_unknown_names(registry):
    with pytest.raises(ValueError, match="primitive='attention' must be one of range_attention"):
        dispatch.register("attention", Implementation("xla", portable))
    with pytest.raises(ValueError, match="name='triton' must be one of mosaic_gpu"):
        Implementation("triton", portable)


def test_nothing_can_run(registry, monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch.register(
        "range_attention", Implementation("mosaic_gpu", fast, lambda platform: "needs sm_90")
    )
    with pytest.raises(RuntimeError, match="no implementation for cpu: not mosaic_gpu: needs"):
        dispatch.select("range_attention")


def test_explains_every_primitive():
    rows = dispatch.explain()
    assert [row[0] for row in rows] == list(dispatch.PRIMITIVES)
    assert all(name in dispatch.PREFERENCE and reason for _, name, reason in rows)


def test_per_token_broadcasts_and_clips():
    wide = np.array([-(2**40), 5, 2**40])
    out = checks.per_token("end", wide, 2, 3, monotone=True)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, [[-(2**31), 5, 2**31 - 1]] * 2)
    out = checks.per_token("end", np.array([0, 2**32 - 1], np.uint32), 1, 2)
    np.testing.assert_array_equal(out, [[0, 2**31 - 1]])
    out = checks.per_token("end", jnp.array([[3, 1], [2, 0]], jnp.int8), 2, 2)
    np.testing.assert_array_equal(out, [[3, 1], [2, 0]])


def test_per_token_rejects():
    with pytest.raises(ValueError, match=r"end has shape \(4,\), but must be \[T\] or \[B, T\]"):
        checks.per_token("end", np.arange(4), 2, 3)
    with pytest.raises(TypeError, match="end is float32, but must be integer"):
        checks.per_token("end", jnp.zeros(3), 2, 3)
    with pytest.raises(ValueError, match="start decreases from token 1 to 2"):
        checks.per_token("start", [[0, 0, 0], [1, 2, 1]], 2, 3, monotone=True)


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (((1, 4, 2), (1, 4, 2, 8), (1, 4, 2, 8)), r"q has shape .*\[B, T, Hq, D\]"),
        (((1, 4, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)), "k has shape .* axis B must have size 1"),
        (((1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 4)), "k has shape .* axis D must have size 8"),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8)), "v has shape .* axis N must have size 4"),
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "Hq=3 must be a multiple of Hkv=2"),
        (((1, 4, 3, 8), (1, 4, 0, 8), (1, 4, 0, 8)), "Hq=3 must be a multiple of Hkv=0"),
    ],
)
def test_attention_operand_shapes(shapes, problem):
    with pytest.raises(ValueError, match=problem):
        checks.check_attention_operands(*map(np.zeros, shapes))


def test_attention_operand_dtypes():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(TypeError, match="v is bfloat16, but must be float32 like q"):
        checks.check_attention_operands(x, x, x.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="q is int32, but must be floating"):
        checks.check_attention_operands(*[x.astype(jnp.int32)] * 3)
