"""Tuned configs: candidates and their shared memory, files, and the choice for a device."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import block_selection, dispatch, hopper, tuning
from pallas_kernels.ahead_of_time import compile_for, target_mesh
from pallas_kernels.block_selection import mosaic_gpu as selection
from pallas_kernels.block_sparse_attention import mosaic_gpu as block_sparse
from pallas_kernels.block_sparse_attention.entries import Sizes
from pallas_kernels.block_sparse_attention.mosaic_gpu import block_walk, entry_walk
from pallas_kernels.block_sparse_attention.mosaic_gpu.plan import plan_chunks
from pallas_kernels.range_attention import mosaic_gpu as range_attention
from pallas_kernels.range_attention.mosaic_gpu import key_walk, query_walk

KERNELS = tuning.kernels()
FORWARD = KERNELS["range_attention.forward"]
KIND = "NVIDIA H200"
TUNED = dataclasses.replace(FORWARD.default(64), stages=6)  # a candidate
shape = jax.ShapeDtypeStruct


def abstract_call(kernel, head_dim, config):
    """A function, and the shapes of its arguments: the call that needs most shared memory."""
    tokens, heads, groups, count = 4096, 2, 8, 16
    q, k = (shape((1, tokens, n, head_dim), jnp.bfloat16) for n in (heads * groups, heads))
    rows, bound = shape(q.shape[:3], jnp.float32), shape((1, tokens), jnp.int32)
    if kernel.primitive == "block_selection":
        f = functools.partial(selection.select, count=count, config=config)
        return f, k, shape((1, tokens // 64, heads, head_dim), jnp.bfloat16), bound, bound
    functions = {
        "range_attention.forward": key_walk.forward,
        "range_attention.query_gradient": key_walk.query_gradient,
        "range_attention.key_gradients": query_walk.key_gradients,
        "block_sparse_attention.forward": entry_walk.forward,
        "block_sparse_attention.query_gradient": entry_walk.query_gradient,
        "block_sparse_attention.key_gradients": block_walk.key_gradients,
    }
    f, more = functions[kernel.name], () if kernel.function == "forward" else (q, rows, rows)
    if kernel.primitive == "range_attention":
        bias = shape((1, heads, tokens), jnp.float32)
        return functools.partial(f, scale=1.0, config=config), q, k, k, bound, bound, bias, *more
    sizes = Sizes(1, heads, groups, head_dim, tokens, 64, tokens // 64, count, tokens, 1.0)
    indptr, entries = (shape((1, heads, n), jnp.int32) for n in (tokens + 1, tokens * count))
    chunk = jax.eval_shape(
        lambda *x: plan_chunks(jnp.zeros(1, jnp.int32), *x, sizes).chunk(0),
        indptr, entries, shape(entries.shape, jnp.float32),
    )  # fmt: skip
    return lambda *x: f(*x, sizes, config), q, k, k, *more, chunk


def test_candidates():
    assert len(KERNELS) == 7
    for kernel in KERNELS.values():
        for head_dim in kernel.head_dims:
            candidates = kernel.candidates(head_dim)
            assert candidates[0] == kernel.default(head_dim)
            assert 2 <= len(candidates) == len(set(candidates)) <= 16


@pytest.mark.parametrize("name", KERNELS)
def test_shared_memory_is_what_the_compiler_counts(name):
    kernel = KERNELS[name]
    config = dataclasses.replace(kernel.default(128), stages=23)
    with pytest.raises(ValueError, match="shared memory: smem_bytes=") as caught:
        compile_for("h200", *abstract_call(kernel, 128, config))
    used, most = map(int, re.findall(r"smem_bytes=(\d+)", str(caught.value)))
    assert (used, most) == (kernel.shared_memory(128, config), hopper.SHARED_MEMORY)


@pytest.mark.parametrize("name", KERNELS)
def test_the_largest_candidate_keeps_to_registers(name):
    kernel = KERNELS[name]
    # Steps of 128 fit in registers at D = 64 only.
    head_dim = 64 if kernel.primitive == "range_attention" else 128
    config = max(
        kernel.candidates(head_dim),
        key=lambda x: (getattr(x, "step", 0), kernel.shared_memory(head_dim, x)),
    )
    kernels = compile_for("h200", *abstract_call(kernel, head_dim, config)).kernels
    assert kernels
    for found in kernels:
        assert found.spill_store_bytes == found.spill_load_bytes == 0
        assert not found.notes


def content(**changes):
    """Of a file with one entry, some fields of which are changed."""
    entry = {
        "kernel": FORWARD.name,
        "head_dim": 64,
        "config": dataclasses.asdict(TUNED),
        "evidence": {},
    }
    return {"device_kind": KIND, "entries": [entry | changes]}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The file of an H200, which does not exist."""
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    return tmp_path / "nvidia_h200.json"


def choose(target="h200"):
    with dispatch.targeting(target_mesh(target).devices.flat[0]):
        return range_attention.config_for("forward", 64)


def test_tuned_configs_are_those_of_the_device(path):
    default = FORWARD.default(64)
    assert choose() == default
    path.write_text(json.dumps(content()))
    assert choose() == TUNED
    assert choose("h100") == default
    assert range_attention.config_for("forward", 64) == default  # on the CPU
    with dispatch.targeting(target_mesh("h200").devices.flat[0]):
        assert range_attention.config_for("forward", 128) == FORWARD.default(128)
        assert block_sparse.config_for("forward", 64) == block_sparse.KERNELS["forward"].default(64)
        assert selection.config_for(64) == selection.KERNELS["select"].default(64)
    path.write_text(json.dumps(content(config=dataclasses.asdict(default))))
    assert choose() == default  # the file was read again


def test_kernels_are_launched_as_tuned(path, monkeypatch):
    config = selection.Config(stages=2)
    kernel = KERNELS["block_selection.select"]
    tuning.store(path, KIND, kernel, 64, config, {})
    seen = []

    def launch(*_, scratch, **__):
        seen.append(scratch["c_tile"].shape[0])
        raise ZeroDivisionError

    monkeypatch.setattr(hopper, "launch", launch)
    u, c = (shape((1, n, 2, 64), jnp.bfloat16) for n in (2**16, 1024))
    with pytest.raises(ZeroDivisionError):
        compile_for(
            "h200",
            lambda u, c: block_selection.select_blocks(
                u, c, jnp.arange(2**16) // 64, 16, implementation="mosaic_gpu"
            ),
            u, c,
        )  # fmt: skip
    assert seen == [2]


def test_files_lie_in_the_package_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv(tuning.FOLDER, raising=False)
    folder = tuning.folder()
    assert (folder.parent.name, folder.name) == ("pallas_kernels", "tuned")
    for path in folder.glob("*"):  # those that are shipped
        assert tuning.load(path)
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="SPARSEX_TUNED='.*none' is no folder: make it, or unset"):
        choose()


LARGE = dataclasses.asdict(dataclasses.replace(TUNED, stages=20))
UNTRIED = dataclasses.asdict(dataclasses.replace(TUNED, step=192, stages=2))


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of device_kind and entries"),
        ({"device_kind": KIND, "entries": {}}, "entries must be a list"),
        ({"device_kind": "NVIDIA H100", "entries": []}, "device_kind='NVIDIA H100'"),
        (content(extra=1), "must be an object of config, evidence, head_dim, kernel"),
        (content(kernel="backward"), "kernel='backward' is not one of range_attention.forward, "),
        (content(head_dim=96), "head_dim=96 of range_attention.forward is not one of"),
        (content(config={"stages": 4}), "must have the fields step, stages, places, programs"),
        (content(config=LARGE | {"colour": 1}), "must have the fields"),
        (content(config=LARGE | {"stages": True}), "must have positive integers"),
        (content(config=LARGE | {"stages": 0}), "must have positive integers"),
        (content(config=LARGE), r"needs \d+ bytes of shared memory of 232448"),
        (content(config=UNTRIED), "is not a candidate"),
        ({"device_kind": KIND, "entries": 2 * content()["entries"]}, "has two entries of range"),
    ],
)
def test_broken_files_are_refused(path, broken, problem):
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with pytest.raises(ValueError, match=problem) as caught:
        choose()
    message = str(caught.value)
    assert str(path) in message and "remove the file, and run `sparsex tune`" in message


def test_store(path, tmp_path):
    other = KERNELS["block_sparse_attention.forward"]
    tuning.store(path, KIND, other, 128, other.default(128), {"milliseconds": 1.5})
    tuning.store(path, KIND, FORWARD, 64, FORWARD.default(64), {})
    tuning.store(path, KIND, FORWARD, 64, TUNED, {})
    assert tuning.load(path) == {
        (other.name, 128): other.default(128), (FORWARD.name, 64): TUNED,
    }  # fmt: skip
    assert choose() == TUNED
    saved = json.loads(path.read_text())
    assert saved["device_kind"] == KIND
    assert saved["entries"][0]["evidence"] == {"milliseconds": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_stored_leaves_the_file_as_it_was(path, tmp_path, monkeypatch):
    tuning.store(path, KIND, FORWARD, 64, TUNED, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is not a candidate"):
        tuning.store(path, KIND, FORWARD, 64, dataclasses.replace(TUNED, stages=1), {})
    with pytest.raises(ValueError, match="JSON compliant"):
        tuning.store(path, KIND, FORWARD, 64, TUNED, {"milliseconds": float("nan")})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tuning.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        tuning.store(path, KIND, FORWARD, 64, FORWARD.default(64), {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):  # nothing is thrown away
        tuning.store(path, KIND, FORWARD, 64, TUNED, {})
