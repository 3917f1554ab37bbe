"""The choice of implementations, and the shared validation of operands."""

import logging
import types

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


def device(platform, capability=None, kind="device"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind=kind)


def only_short(x):
    return None if len(x) < 3 else f"takes fewer than 3, not {len(x)}"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(jax, "devices", lambda: [device("cpu", kind="some CPU")])
    dispatch.register(
        "range_attention",
        Implementation("xla", portable),
        Implementation("mosaic_gpu", fast, dispatch.not_hopper, only_short),
    )


def test_takes_the_best_that_can_run(registry):
    assert dispatch.select("range_attention", None, [1]) is portable
    with dispatch.targeting(device("gpu", "9.0")):
        assert dispatch.select("range_attention", None, [1]) is fast
        assert dispatch.select("range_attention", None, [1, 2, 3]) is portable
        assert dispatch.select("range_attention", "xla", [1]) is portable
    for other in (device("gpu", "8.0"), device("gpu", "10.0"), device("tpu")):
        with dispatch.targeting(other):
            assert dispatch.select("range_attention", None, [1]) is portable
    assert dispatch.select("range_attention", None, [1]) is portable


def test_tpus():
    for kind in ("TPU v5 lite", "TPU v5p", "TPU v6 lite"):
        assert dispatch.not_tpu(device("tpu", kind=kind)) is None
    for other in (device("tpu", kind="TPU v4"), device("gpu", "9.0"), device("cpu")):
        assert dispatch.not_tpu(other) == f"needs a TPU v5e, v5p or v6e, not {other.device_kind}"


def test_says_once_which_one_and_why(registry, caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            dispatch.select("range_attention", None, [1])
            with dispatch.targeting(device("gpu", "9.0")):
                dispatch.select("range_attention", None, [1, 2, 3])
                dispatch.select("range_attention", "mosaic_gpu", [1])
    assert [record.getMessage() for record in caplog.records] == [
        "range_attention: xla (the first that runs on cpu; not mosaic_gpu: needs a GPU of compute"
        " capability 9.x (Hopper), not some CPU)",
        "range_attention: xla (the first that runs on gpu; not mosaic_gpu: takes fewer than 3,"
        " not 3)",
        "range_attention: mosaic_gpu (asked for by name)",
    ]


def test_deferred_is_imported_by_the_first_call():
    function = dispatch.deferred("no_such_module", "f")
    with pytest.raises(ModuleNotFoundError):
        function()
    assert dispatch.deferred("math", "hypot")(3, 4) == 5


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("cuda", "implementation='cuda' is not an implementation of range_attention; use xla"),
        ("mosaic_gpu", "cannot run range_attention on cpu: needs a GPU .*; use xla or None"),
    ],
)
def test_explicit_choice_never_falls_back(registry, name, problem):
    with pytest.raises(ValueError, match=problem):
        dispatch.select("range_attention", name, [1])


def test_explicit_choice_must_take_the_operands(registry):
    problem = "cannot run range_attention on gpu: takes fewer than 3, not 4; use xla or None"
    with dispatch.targeting(device("gpu", "9.0")), pytest.raises(ValueError, match=problem):
        dispatch.select("range_attention", "mosaic_gpu", [1, 2, 3, 4])


def test_rejects_unknown_names(registry):
    with pytest.raises(ValueError, match="primitive='attention' must be one of range_attention"):
        dispatch.register("attention", Implementation("xla", portable))
    with pytest.raises(ValueError, match="name='triton' must be one of mosaic_gpu"):
        Implementation("triton", portable)


def test_nothing_can_run(registry, monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch.register(
        "range_attention", Implementation("mosaic_gpu", fast, lambda device: "needs sm_90")
    )
    with pytest.raises(RuntimeError, match="no implementation for cpu: not mosaic_gpu: needs"):
        dispatch.select("range_attention", None, [1])


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
