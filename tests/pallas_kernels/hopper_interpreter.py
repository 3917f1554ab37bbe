"""Runs Mosaic GPU kernels on the CPU: `interpret`, and in small pieces: `cut_small`.

JAX's interpreter has a thread per warpgroup, and simulates shared memory, barriers and TMA. Memory
is NaN before it is written, reads out of bounds raise (TMA fills with zeros). For JAX 0.11.2 this
adds what the kernels need besides:

  * what `hopper_lanes`, `hopper_products` and the selection's `thread_lists` have of Mosaic's own
  * `pl.run_state`, so that `plgpu.ACC.init(value)` works
  * `plgpu.wgmma` with the left operand in registers
  * what wgmma reads of shared memory, in race detection
  * in race detection, plain reads of shared memory that TMA then fills again: to arrive at a
    barrier is enough between them, as on the chip
  * barriers whose last phases nobody awaits, as at the end of every ring
  * a check that copies by TMA begin at multiples of 128 bytes in shared memory, as they must
  * a check that copies to device memory end within rows: without a swizzle Mosaic may copy bytes
    as they lie, and what is past the end of a row falls into the next

Race detection has limits: thread blocks run one after another, a wgmma counts as finished when it
is issued, and a `commit_smem` that is missing before another warpgroup's wgmma is not noticed.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import callback, source_info_util
from jax._src import core as jax_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge, indexing
from jax._src.state import types as state_types

from pallas_kernels import dispatch, hopper, hopper_lanes, hopper_products
from pallas_kernels.block_selection.mosaic_gpu import thread_lists
from pallas_kernels.hopper import HALF
from tests.pallas_kernels import plain_lists
from tests.pallas_kernels.host_callbacks import with_numpy

# What the kernels are chosen for.
HOPPER = types.SimpleNamespace(
    platform="gpu", compute_capability="9.0", device_kind="interpreted Hopper GPU"
)


@gpu_callbacks.fail_on_exception
def _record_reads(*, token, thread, keys, transforms, source_info):
    """Tells the race detector, on the host, that wgmma reads buffers asynchronously."""
    shared = gpu_callbacks._get_shared_memory()
    pseudo_thread = shared.get_next_tma_thread_id()
    with shared.lock:
        shared.clocks[thread].inc(pseudo_thread)
        clock = shared.clocks[thread].copy()
    for key, key_transforms in zip(keys, transforms, strict=True):
        key = memory.HostAllocationKey.from_array(key)
        indices = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(key_transforms))
        gpu_callbacks.get_races().check_read(
            thread,
            clock.async_smem_clock.copy(),
            key,
            shared.access(key, indices),
            source_info=source_info,
        )
    return token


# Rules run when a kernel is traced, and emit callbacks that the token orders.


def _allocate_registers(interpreter, eqn, token, value):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=interpreter.thread,
        memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=eqn.source_info,
    )


def _free_registers(interpreter, eqn, token, key):
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        allocation_key_as_array=key,
        source_info=eqn.source_info,
    )


def _is_ref(var):
    return isinstance(var.aval, state_types.AbstractRef)


def _run_state(interpreter, eqn, token, values):
    keys = []
    for value, var in zip(values, eqn.invars, strict=True):
        if not _is_ref(var):
            token, value = _allocate_registers(interpreter, eqn, token, value)
        keys.append(value)
    token, _ = interpreter.interpret(eqn.params["jaxpr"], token, *keys)
    outs = []
    for value, key, var in zip(values, keys, eqn.invars, strict=True):
        if not _is_ref(var):
            token, value = gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=var.aval,
                mesh_location=interpreter.mesh_location,
                thread=interpreter.thread,
                allocation_key_as_array=key,
                transforms=(),
                source_info=eqn.source_info,
            )
            token = _free_registers(interpreter, eqn, token, key)
        outs.append(value)
    return token, outs


def _wgmma(interpreter, eqn, token, values):
    accumulator, a, b, *leaves = values
    from_registers = not _is_ref(eqn.invars[1])
    if from_registers:
        token, a = _allocate_registers(interpreter, eqn, token, a)
    if interpreter.interpret_params.detect_races:
        trees = [
            eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([])
            for name in ("acc", "a", "b")
        ]
        transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        reads = [
            jaxpr_interpret.resolve_ref(eqn.invars[i].aval, (a, b)[i - 1], transforms[i])
            for i in ((2,) if from_registers else (1, 2))
        ]
        token = callback.io_callback(
            functools.partial(_record_reads, source_info=eqn.source_info),
            gpu_callbacks.TOKEN_SHAPE_DTYPE,
            token=token,
            thread=interpreter.thread,
            keys=[key for key, _ in reads],
            transforms=[each for _, each in reads],
        )
    operands = (accumulator, a, b, *leaves)
    token, outs = interpreter._interpret_wgmma_ref_p(eqn, token, lambda: operands)
    if from_registers:
        token = _free_registers(interpreter, eqn, token, a)
    return token, outs


def _of_warp(op, x):
    """What op makes of the 16 rows of each warp, for each row."""
    return jnp.repeat(op(x.reshape(4, -1), axis=1), 16)


# What `hopper_lanes` computes, by name; a vote is of all warps of a warpgroup at once.
_INLINE = {
    "narrow": hopper_lanes.plain_narrow,
    "widen": hopper_lanes.plain_widen,
    "vote": jnp.any,
    "largest": functools.partial(_of_warp, jnp.max),
    "lowest": functools.partial(_of_warp, jnp.min),
}


def _inline(interpreter, eqn, token, values):
    (x,) = values
    return token, [_INLINE[eqn.params["mgpu_fn"].__name__](x)]


_RULES = {
    discharge.run_state_p: _run_state,
    primitives.wgmma_ref_p: _wgmma,
    primitives.inline_mgpu_p: _inline,
}
_stock_arrive = gpu_callbacks._barrier_arrive
_stock_interpret = jaxpr_interpret.JaxprInterpreter.interpret
_stock_deallocate = memory.Barrier.deallocate


def _interpret(self, jaxpr, token, *args):
    """Interprets equation by equation: by a rule from above if there is one, else as before."""
    if not any(eqn.primitive in _RULES for eqn in jaxpr.eqns):
        return _stock_interpret(self, jaxpr, token, *args)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        if rule := _RULES.get(eqn.primitive):
            with source_info_util.user_context(
                eqn.source_info.traceback, name_stack=eqn.source_info.name_stack
            ):
                token, outs = rule(self, eqn, token, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
            continue
        inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jax_core.Literal)))
        outputs = [v for v in eqn.outvars if not isinstance(v, jax_core.DropVar)]
        single = types.SimpleNamespace(constvars=[], invars=inputs, outvars=outputs, eqns=[eqn])
        token, outs = _stock_interpret(self, single, token, *(env[v] for v in inputs))
        env.update(zip(outputs, outs, strict=True))
    return token, [read(atom) for atom in jaxpr.outvars]


def _arrive(token, mesh_location, thread, *args, **kwargs):
    gpu_callbacks._get_shared_memory().commit_smem(thread)
    return _stock_arrive(token, mesh_location, thread, *args, **kwargs)


def _deallocate(self):
    with self.cv:
        if self.ref_count == 1:  # the last thread leaves
            for thread in self.last_observed_phase_by_thread:
                self.last_observed_phase_by_thread[thread] = self.phase
        _stock_deallocate(self)


def _check_alignment(ref):
    """Of what TMA copies; a start that is traced counts as a multiple of the slice."""
    for transform in getattr(ref, "transforms", ()):
        if not isinstance(transform, indexing.NDIndexer):
            continue
        stride = jnp.dtype(ref.dtype).itemsize
        for size, index in reversed(list(zip(transform.shape, transform.indices, strict=True))):
            start, unit = (index.start, index.size) if hasattr(index, "start") else (index, 1)
            offset = (start if isinstance(start, int) else unit) * stride
            if offset % 128:
                raise ValueError(
                    f"TMA copies to or from byte {offset} of {ref}, no multiple of 128"
                )
            stride *= size


def _check_ends(src, dst):
    """Of what leaves shared memory; a start that is traced counts as a multiple of the slice."""
    if any(isinstance(x, gpu_core.UnswizzleRef) for x in getattr(src, "transforms", ())):
        return
    for transform in getattr(dst, "transforms", ()):
        if not isinstance(transform, indexing.NDIndexer):
            continue
        for size, index in zip(transform.shape, transform.indices, strict=True):
            if isinstance(index, indexing.Slice) and size % index.size:
                raise ValueError(
                    f"A copy without a swizzle may reach past the end of a row: of {dst} it takes"
                    f" {index.size} of {size}, no multiple"
                )


def _load(src, dst, *args, **kwargs):
    _check_alignment(dst)
    return _stock_load(src, dst, *args, **kwargs)


def _store(src, dst, *args, **kwargs):
    _check_alignment(src)
    _check_ends(src, dst)
    return _stock_store(src, dst, *args, **kwargs)


_stock_load, _stock_store = plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem


# What warps do each on their own, done by their warpgroup, which also waits for it.


def _spread(ref):
    return jnp.repeat(ref[...], HALF // ref.shape[0])


def _send_entries(tile, array, places):
    rows = array.shape[1]
    for first in range(0, HALF, rows):

        @pl.when(places[first] >= 0)
        def _(first=first):
            source = tile.at[pl.ds(first, rows)]
            # Not by TMA's tensor copies, so less alignment is enough.
            _stock_store(source, array.at[places[first]], commit_group=False)


def _begin_products(rows, others):
    return jnp.matmul(rows[...], others[...].T, preferred_element_type=jnp.float32)


def _hide(x, first, last):
    column = jnp.arange(x.shape[1])
    return jnp.where((column >= first[:, None]) & (column < last[:, None]), x, -jnp.inf)


def _by_warp(count, visit):
    for n in range(count):
        visit(n)


# What is replaced while kernels are interpreted.


def _to_int(x):
    """Of the numbers that callbacks get `with_numpy`, too."""
    return int(x) if isinstance(x, np.integer) else _stock_to_int(x)


_stock_to_int = memory._to_int
_CHANGES = (
    (jaxpr_interpret.JaxprInterpreter, "interpret", _interpret),
    (gpu_callbacks, "_barrier_arrive", _arrive),
    (memory.Barrier, "deallocate", _deallocate),
    (plgpu, "copy_gmem_to_smem", _load),
    (plgpu, "copy_smem_to_gmem", _store),
    (hopper_lanes, "spread", _spread),
    (hopper_lanes, "send_entries", _send_entries),
    (hopper_products, "begin", _begin_products),
    (hopper_products, "finish", lambda products: products),
    (hopper_lanes, "hide", _hide),
    (hopper_lanes, "highest_of_rows", plain_lists.highest_of_rows),
    *(
        (thread_lists, name, getattr(plain_lists, name))
        for name in ("put", "drop", "load", "merge")
    ),
    (hopper, "by_warp", _by_warp),
    (memory, "_to_int", _to_int),
)
_STOCK = tuple((owner, name, getattr(owner, name)) for owner, name, _ in _CHANGES)


@contextlib.contextmanager
def interpret(*, detect_races=False):
    """Runs the Mosaic GPU kernels that are traced in this context on the CPU.

    They are chosen as on a Hopper GPU. A function that was traced outside must be traced anew.
    """
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    for each in _CHANGES:
        setattr(*each)
    try:
        with plgpu.force_gpu_interpret_mode(params), dispatch.targeting(HOPPER), with_numpy():
            yield
    except Exception:
        gpu_callbacks.reset_gpu_interpret_mode_state()  # else the next kernel fails, too
        raise
    finally:
        for each in _STOCK:
            setattr(*each)


def races_found():
    """Whether the last kernel had a race; it ran with `detect_races`."""
    return gpu_callbacks.get_races().races_found


def cut_small(monkeypatch, mosaic_gpu, programs: int, **cut) -> None:
    """Makes a package's kernels run in few thread blocks, with as few stages as they can.

    `cut` changes more of their configs.
    """
    config_for = mosaic_gpu.config_for

    def small(*args, **kwargs):
        config = config_for(*args, **kwargs)
        stages = min(config.stages, 2 * getattr(config, "computing", 1))
        return dataclasses.replace(config, **{"stages": stages, "programs": programs} | cut)

    monkeypatch.setattr(mosaic_gpu, "config_for", small)
    if hasattr(mosaic_gpu, "combine_config_for"):
        combine_config_for = mosaic_gpu.combine_config_for

        def small_combine(sizes):
            config = combine_config_for(sizes)
            return config and dataclasses.replace(config, programs=programs, stages=2)

        monkeypatch.setattr(mosaic_gpu, "combine_config_for", small_combine)
