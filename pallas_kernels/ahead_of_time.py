"""Compiling for accelerators that are not here, and what their compiler says of each kernel.

    q = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.bfloat16)
    compilation = compile_for("h200", f, q)
    assert all(kernel.spill_store_bytes == 0 for kernel in compilation.kernels)

XLA, LLVM, ptxas and libtpu of the extra `compile` need no driver and no chip: a target's
configuration stands in for it. Where there is no GPU, set JAX_PLATFORMS=cpu before JAX is imported,
or JAX's plugin looks for one and complains. Without a GPU XLA cannot tune itself, so the code
outside of kernels is not what would run there. For TPUs the compiler does all that it would there.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.resources
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch, kernel_counts, tpu_schedule

_GPUS = ("h100", "h200")
_SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of TPU v5e, as they are rented
TPU_TARGETS = tuple(f"v5e:{each}" for each in _SLICES)
TARGETS = (*_GPUS, *TPU_TARGETS)
GPUS_PER_HOST = 8
# What libtpu needs to know, when it is loaded, where there is no TPU.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a Mosaic GPU kernel.

    Attributes:
      name: the function's.
      registers: per thread, at launch; warpgroups may shift them between each other later.
      spill_store_bytes: per thread, from registers to local memory.
      spill_load_bytes: per thread, back.
      notes: warnings, and remarks on performance such as "wgmma serialized".
    """

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """What libtpu reports of a Mosaic TPU kernel in the compiled program.

    Attributes:
      name: the kernel's.
      vmem_bytes: of on-chip memory: blocks, scratch and what does not fit in registers.
      instruction: its name in the program.
      schedule: its bundles and spills; None where something else loaded libtpu first, as JAX does
        on a TPU.
    """

    name: str
    vmem_bytes: int
    instruction: str
    schedule: tpu_schedule.Schedule | None


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled function, which cannot be run here.

    Attributes:
      executable: of JAX; `as_text()` is its optimised program.
      argument_bytes: on each device.
      output_bytes: on each device.
      temporary_bytes: on each device, at once. More than a GPU has is no error.
      peak_bytes: of all these on each device, at once, by the compiler's count.
      kernels: hand-written kernels, in the order of their compilation (GPUs) or of the program.
    """

    executable: jax.stages.Compiled
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    peak_bytes: int
    kernels: tuple[Kernel, ...] | tuple[TpuKernel, ...]


def target_mesh(target: str, devices: int | None = None) -> Mesh:
    """A mesh of devices that are not here, with the one axis "device".

    Args:
      target: one of TARGETS.
      devices: GPUs: up to 8, or a multiple of 8, those of that many hosts; None for one. TPUs: the
        first so many chips of the slice; None for all.

    Raises:
      ValueError: if the target is unknown, or there is no such number of devices.
      RuntimeError: if the target's compiler is not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    if target in _GPUS:
        described = _gpus(target, 1 if devices is None else devices)
    else:
        described = _tpus(target)
        if devices is not None and not 1 <= devices <= len(described):
            raise ValueError(
                f"devices={devices} must be 1 to {len(described)}, or None for all of {target}:"
                " name a larger slice"
            )
        described = described[:devices]
    return Mesh(np.array(described), ("device",))


@functools.cache
def _gpus(target: str, devices: int):
    if devices < 1 or (devices > GPUS_PER_HOST and devices % GPUS_PER_HOST):
        raise ValueError(
            f"devices={devices} must be 1 to {GPUS_PER_HOST}, or a multiple of {GPUS_PER_HOST}:"
            " hosts are all alike"
        )
    per_host = min(devices, GPUS_PER_HOST)
    topology = f"1x{devices // per_host}x{per_host}"
    configuration = importlib.resources.files("pallas_kernels") / "targets" / f"{target}.txtpb"
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            topology=topology,
            target_config=configuration.read_text(),
        )
    except NotImplementedError as error:
        raise RuntimeError(
            f"compiling for {target} needs JAX's CUDA plugin and ptxas: install the extra"
            " `compile`, by pip install '.[compile]' in the checkout"
        ) from error
    return description.devices


@functools.cache
def _tpus(target: str):
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"compiling for {target} needs libtpu: install the extra `compile`, by"
            " pip install '.[compile]' in the checkout"
        )
    arguments = "LIBTPU_INIT_ARGS"
    before = {name: os.environ.get(name) for name in (*_LIBTPU, arguments)}
    os.environ.update(_LIBTPU | {name: x for name, x in before.items() if x is not None})
    os.environ[arguments] = tpu_schedule.init_args(before[arguments] or "")
    try:
        return topologies.get_topology_desc(target, "tpu").devices
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class MemoryExceededError(RuntimeError):
    """A program takes more memory than a device of the target has."""


def compile_for(
    target: str,
    f: Callable,
    *abstract_args,
    devices: int | None = None,
    mesh: Mesh | None = None,
    donate_argnums: int | tuple[int, ...] = (),
) -> Compilation:
    """Compiles `f` for a target as if it were here: kernels are chosen for it, too.

    The standard output and error of the process are captured meanwhile, so not for use in several
    threads at a time.

    Args:
      target: one of TARGETS.
      f: takes arrays, and trees of them. It is traced in the context of the mesh, so a
        `jax.shard_map` in it needs none.
      *abstract_args: arrays or ShapeDtypeStructs. One whose sharding is on the mesh stays there,
        others are on every device.
      devices: see `target_mesh`.
      mesh: of the devices of `target_mesh`, with other axes; None for that mesh.
      donate_argnums: arguments whose memory may be used for results, as in `jax.jit`.

    Raises:
      ValueError: as `target_mesh`; or of a kernel that needs more on-chip memory than there is.
      RuntimeError: as `target_mesh`.
      MemoryExceededError: for TPUs, if it takes more memory than a chip has.
    """
    mesh = target_mesh(target, devices) if mesh is None else mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        on_mesh = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return x if on_mesh else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    platform = "cuda" if target in _GPUS else "tpu"
    # The mesh is part of what JAX knows its traces by: none made for another device is reused.
    with dispatch.targeting(mesh.devices.flat[0]), jax.set_mesh(mesh):
        jitted = jax.jit(lambda *args: f(*args), donate_argnums=donate_argnums)
        traced = jitted.trace(*jax.tree.map(place, abstract_args))
        with kernel_counts.counting():  # XLA reports on no kernel that it has compiled before
            lowered = traced.lower(lowering_platforms=(platform,))
    if platform == "tpu":
        tpu_schedule.forget()
    try:
        executable, report = _compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("out of memory (on|in memory space) hbm", str(error), re.IGNORECASE):
            raise
        raise MemoryExceededError(
            f"{target} has too little memory for this: take less on each device, or more devices."
            f" {error}"
        ) from error
    memory: Any = executable.memory_analysis()
    kernels = _parse(report) if target in _GPUS else _tpu_kernels(executable.as_text())
    return Compilation(
        executable,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        tuple(kernels),
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The executable, and what its compilers printed."""
    with tempfile.TemporaryFile() as sink:

        def printed() -> str:
            sink.seek(0)
            return sink.read().decode(errors="replace")

        try:
            with _ptxas_reports(), _printing_to(sink):
                executable = lowered.compile()
        except Exception as error:
            error.add_note(printed())  # LLVM and ptxas say there why, not in the exception
            raise
        return executable, printed()


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[None]:
    """Makes ptxas print reports, and JAX run it even if its cache on disk has the result."""
    variable, cache = "MOSAIC_GPU_DUMP_PTXAS", "jax_enable_compilation_cache"
    variable_was, cache_was = os.environ.get(variable), jax.config.jax_enable_compilation_cache
    os.environ[variable] = "1"
    jax.config.update(cache, False)
    compilation_cache.reset_cache()  # it reads the setting only once
    try:
        yield
    finally:
        jax.config.update(cache, cache_was)
        compilation_cache.reset_cache()
        if variable_was is None:
            del os.environ[variable]
        else:
            os.environ[variable] = variable_was


@contextlib.contextmanager
def _printing_to(sink: IO[bytes]) -> Iterator[None]:
    """Redirects the process' output and error, of C++ and of subprocesses, too."""
    c_library = ctypes.CDLL(None)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        for descriptor in (1, 2):
            os.dup2(sink.fileno(), descriptor)
        yield
    finally:
        c_library.fflush(None)
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


def _parse(report: str) -> Iterator[Kernel]:
    """The kernels of ptxas' verbose report; it ends each with its registers."""
    name, spills = "", (0, 0)
    notes: list[str] = []
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]), int(match[2])
        elif "ptxas warning" in line or "Potential Performance Loss" in line:
            notes.append(line.strip())
        elif match := re.search(r"Used (\d+) registers", line):
            yield Kernel(name, int(match[1]), *spills, tuple(notes))
            notes = []


def _tpu_kernels(program: str) -> Iterator[TpuKernel]:
    """The kernels of a compiled program, from its text."""
    found: list[tuple[tuple, TpuKernel]] = []
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call"', line)
        instruction = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
        # Where the kernel's part of VMEM begins, after arrays of the program, and where it ends.
        begin = re.search(r'"scoped_memory_configs":\[{[^}]*"offset":"(\d+)"', line)
        end = re.search(r'"used_scoped_memory_configs":\[{[^}]*"size":"(\d+)"', line)
        if name is None or instruction is None or begin is None or end is None:
            raise RuntimeError(f"libtpu does not say as before what a kernel uses: {line[:1000]}")
        vmem_bytes = int(end[1]) - int(begin[1])
        shapes = re.findall(r"\w+\[[\d,]*\]", line.partition("metadata=")[0])
        schedule = tpu_schedule.read(instruction[1])
        kernel = TpuKernel(name[1], vmem_bytes, instruction[1], schedule)
        found.append(((name[1], *shapes), kernel))
    # Of kernels that are alike, libtpu compiles one.
    known = {alike: kernel.schedule for alike, kernel in found if kernel.schedule is not None}
    for alike, kernel in found:
        yield dataclasses.replace(kernel, schedule=kernel.schedule or known.get(alike))
