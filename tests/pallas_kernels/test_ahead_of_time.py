"""Compiling for targets that are not here."""

import math
import os

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ahead_of_time, dispatch
from pallas_kernels.ahead_of_time import TARGETS, compile_for, target_mesh
from pallas_kernels.block_sparse_attention.mosaic_tpu.kernels import weighted_sum
from pallas_kernels.range_attention import range_attention


@pytest.mark.parametrize("target", ["h100", "h200"])
def test_target_is_what_it_is_called(target):
    device = target_mesh(target).devices.flat[0]
    assert target.upper() in device.device_kind
    assert dispatch.not_hopper(device) is None


@pytest.mark.parametrize(("devices", "hosts"), [(1, 1), (2, 1), (8, 1), (32, 4)])
def test_hosts(devices, hosts):
    mesh = target_mesh("h200", devices)
    assert mesh.size == devices and mesh.axis_names == ("device",)
    assert len({device.process_index for device in mesh.devices.flat}) == hosts


@pytest.mark.parametrize("target", [each for each in TARGETS if each.startswith("v5e")])
def test_slices(target):
    names = (*ahead_of_time._LIBTPU, "LIBTPU_INIT_ARGS")
    environment = {name: os.environ.get(name) for name in names}
    mesh = target_mesh(target)
    rows, columns = map(int, target.removeprefix("v5e:").split("x"))
    assert mesh.size == rows * columns and mesh.axis_names == ("device",)
    assert mesh == target_mesh(target, mesh.size)
    assert target_mesh(target, 1).devices.flat[0] == mesh.devices.flat[0]
    assert dispatch.not_tpu(mesh.devices.flat[0]) is None
    changed = {name for name, was in environment.items() if os.environ.get(name) != was}
    assert changed <= {"TPU_SKIP_MDS_QUERY"}  # which JAX sets when it finds libtpu


@pytest.mark.parametrize(("target", "platform"), [("h200", "cuda"), ("v5e:2x2", "tpu")])
def test_a_program_is_the_same_whatever_was_lowered_before(target, platform):
    """JAX's compilation cache knows it by its text."""

    def lowered(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.bfloat16)
        bounds = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        mesh = target_mesh(target, 1)
        with dispatch.targeting(mesh.devices.flat[0]), jax.set_mesh(mesh):
            traced = jax.jit(lambda *x: range_attention(*x)[0]).trace(x, x, x, bounds, bounds)
            program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "range_forward" in program
        return program

    first = lowered(256)
    lowered(512)
    jax.clear_caches()
    assert lowered(256) == first


def test_refuses():
    with pytest.raises(ValueError, match="target='h300' must be one of h100, h200"):
        compile_for("h300", jnp.sin)
    for devices in (0, 12):
        with pytest.raises(ValueError, match=f"devices={devices} must be 1 to 8, or a multiple"):
            target_mesh("h100", devices)
    for devices in (0, 9):
        with pytest.raises(ValueError, match=f"devices={devices} must be 1 to 8, or None"):
            target_mesh("v5e:2x4", devices)
    # None of 3 x 4 chips is rented, and 32 x 32 would end the process.
    for target in ("v5e", "v5e:3x4", "v5e:32x32"):
        with pytest.raises(ValueError, match=f"target='{target}' must be one of h100, .*16x16"):
            target_mesh(target)


def test_says_what_to_install(monkeypatch):
    def without_plugin(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(ahead_of_time.topologies, "get_topology_desc", without_plugin)
    with pytest.raises(RuntimeError, match=r"for h200 needs .* pip install '\.\[compile\]'"):
        target_mesh("h200", 16)


def test_says_what_to_install_for_tpus(monkeypatch):
    ahead_of_time._tpus.cache_clear()
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"for v5e:2x4 needs libtpu: .* pip install '\.\[comp"):
        target_mesh("v5e:2x4")


def test_says_that_a_chip_has_too_little_memory():
    x = jax.ShapeDtypeStruct((20 << 10, 2**19), jnp.bfloat16)
    with pytest.raises(RuntimeError, match=r"take less on each device.*15\.75G"):
        compile_for("v5e:2x4", lambda x: x[:8] * 2, x)


def test_bytes_are_those_of_a_device():
    def f(x, tree):
        def local(x, y):
            return x + y, jax.lax.psum(x, "device")

        spec = jax.sharding.PartitionSpec("device")
        everywhere = jax.sharding.PartitionSpec()
        return jax.shard_map(local, in_specs=(spec, everywhere), out_specs=(spec, everywhere))(
            x, tree["y"]
        )

    mesh = target_mesh("h100", 8)
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    x = jax.ShapeDtypeStruct((8 * 1024,), jnp.float32, sharding=sharding)
    compilation = compile_for("h100", f, x, {"y": jnp.ones(1024)}, devices=8)
    assert compilation.argument_bytes == 2 * 4096
    assert 2 * 4096 <= compilation.output_bytes < 2 * 4096 + 1024
    assert compilation.temporary_bytes < 16 * 4096
    assert compilation.peak_bytes >= 2 * 4096
    assert compilation.kernels == ()
    assert "all-reduce" in compilation.executable.as_text()


def range_forward(tokens):
    q, k = (jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.bfloat16) for heads in (4, 1))
    bound = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def f(*operands):
        return range_attention(*operands, implementation="mosaic_gpu")

    return f, q, k, k, bound, bound


def test_report_comes_with_every_compilation(capfd):
    setting = jax.config.jax_enable_compilation_cache
    print("before")
    first, second = (compile_for("h200", *range_forward(256)) for _ in range(2))
    print("after")
    (kernel,) = first.kernels
    assert kernel.name.startswith("range_forward") and kernel.registers == 168
    assert second.kernels == first.kernels
    assert capfd.readouterr() == ("before\nafter\n", "")
    assert jax.config.jax_enable_compilation_cache == setting
    assert "MOSAIC_GPU_DUMP_PTXAS" not in os.environ


def test_kernels_of_a_tpu():
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (2, 1))
    bound = jax.ShapeDtypeStruct((256,), jnp.int32)
    compilation = compile_for("v5e:2x2", range_attention, q, k, k, bound, bound, devices=1)
    (kernel,) = compilation.kernels
    assert kernel.name == "range_forward" and 2**16 < kernel.vmem_bytes < 2**24
    assert f"%{kernel.instruction} = " in compilation.executable.as_text()
    # A tile of 256 tokens of one KV head, which walks over tiles of keys, whole or with a mask.
    assert math.prod(kernel.schedule.grid) == 1 and kernel.schedule.spill_stores > 0
    walk = max(kernel.schedule.body.all("loop"), key=lambda loop: loop.total)
    whole, masked = sorted(x.total for x in walk.inner if x.total > 100)
    assert 200 < whole < masked < kernel.schedule.body.total < 4000
    with pytest.raises(RuntimeError, match="libtpu does not say"):
        list(ahead_of_time._tpu_kernels('%f = custom_call_target="tpu_custom_call"'))


def test_kernels_that_are_alike_have_one_schedule():
    parts = jax.ShapeDtypeStruct((16, 2**16, 256), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((16, 2**16, 4), jnp.float32)

    def twice(one, other, weights):
        return weighted_sum(one, weights, 64), weighted_sum(other, weights + 1, 64)

    compilation = compile_for("v5e:2x2", twice, parts, parts, weights, devices=1)
    one, other = compilation.kernels
    assert one.instruction != other.instruction
    assert one.schedule == other.schedule and one.schedule.grid == (512, 1)


def test_chooses_for_the_target(monkeypatch):
    monkeypatch.setattr(dispatch, "_registry", {})
    dispatch.register(
        "range_attention",
        dispatch.Implementation("mosaic_gpu", jnp.cos, dispatch.not_hopper),
        dispatch.Implementation("xla", jnp.sin),
    )

    @jax.jit
    def f(x):
        return dispatch.select("range_attention", None, x)(x)

    x = jnp.ones(4)
    assert f(x)[0] == jnp.sin(1.0)
    assert "cosine" in compile_for("h200", f, x).executable.as_text()
    assert f(x)[0] == jnp.sin(1.0)


def test_reads_ptxas():
    report = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'first_kernel' for 'sm_90a'
ptxas info    : Function properties for first_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compile time = 135.4 ms
ptxas info    : Compiling entry function 'second_kernel' for 'sm_90a'
ptxas info    : Function properties for second_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers
"""
    note = report.splitlines()[0]
    assert list(ahead_of_time._parse(report)) == [
        ahead_of_time.Kernel("first_kernel", 168, 4, 12, (note,)),
        ahead_of_time.Kernel("second_kernel", 90, 0, 0, ()),
    ]


def test_errors_say_what_the_compiler_printed():
    class Lowered:
        def compile(self):
            os.write(2, b"ptxas fatal: no such instruction")
            raise RuntimeError("compilation failed")

    with pytest.raises(RuntimeError) as caught:
        ahead_of_time._compile(Lowered())
    assert caught.value.__notes__ == ["ptxas fatal: no such instruction"]
