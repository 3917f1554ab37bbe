"""What the Hopper kernels (Pallas Mosaic GPU, sm_90) share.

A kernel is a persistent grid of thread blocks, mostly of three or four warpgroups: the last copies
tiles into rings in shared memory by TMA, the others compute, on 64 rows each.
"""

import dataclasses
import math
import types
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.extend
import jax.numpy as jnp
from jax import lax

from pallas_kernels import kernel_counts
from pallas_kernels.mesh_axes import vary_over, varying

kernel_counts.leave_out()

HALF = 64  # rows of a tile that one compute warpgroup owns: of one wgmma
ROWS = 2 * HALF
WARPS = 4  # of a warpgroup; each has 16 rows
LOG2E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number per row of a product
COLUMN = plgpu.Layout.WGMMA.reduce(0)
SHARED_MEMORY = 227 * 1024  # bytes that a thread block may use
# Of each thread at launch, by the number of computing warpgroups beside the loading one. Who asks
# for more than the others have left waits for ever.
_REGISTERS = {2: 168, 3: 128}
_ALIGNMENT = 1024  # bytes, of each array in shared memory
_BARRIER = 8  # bytes
MULTIPROCESSORS = 132  # of an H100 SXM, H200: one thread block each


def operand_tile(shape, inner=HALF):
    """Shared memory for an operand of wgmma, bf16; its last two axes are a matrix of rows of D.

    Args:
      shape: of the tile.
      inner: the smallest inner dimension of the products that it is in, 32 or a multiple of 64;
        the same for both operands.
    """
    columns = min(inner, HALF)
    swizzled = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled)


def crossed_tile(shape, dtype=jnp.float32):
    """Shared memory for a matrix that is written by columns of 8 and read as its transpose."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 8)),))


def row_tile(shape, dtype):
    """Shared memory for a matrix whose rows lie one after the other, as in device memory.

    Without transforms Mosaic would choose others, and copies would go by fewer bytes at a time.
    """
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, shape[-1])),))


def shared_memory(scratch, *, reduces: bool) -> int:
    """Bytes of shared memory that a kernel takes.

    Args:
      scratch: tree of scratch types, as for `launch`.
      reduces: whether it sums over an axis or takes a maximum, for which Mosaic sets some aside.
    """
    total = plgpu.CompilerParams().reduction_scratch_bytes if reduces else 0
    for leaf in jax.tree.leaves(scratch):
        if isinstance(leaf, plgpu.Barrier):
            total += _BARRIER * math.prod(leaf.num_barriers)
        else:
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return total


def full(shape, value, layout=plgpu.Layout.WGMMA):
    """A constant f32 array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(x, shape):
    """One number per row, as a matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x, shape):
    """One number per column, as a matrix."""
    return lax.broadcast_in_dim(x, shape, [1])


def multiply(a, b, shape, meanwhile: Callable = lambda: None):
    """a @ b in f32; b lies in shared memory, a there or in registers."""

    def compute(acc):
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def multiply_add(acc, a, b):
    """acc + a @ b in f32."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def transposed(ref):
    """The transpose of a matrix in shared memory."""
    return ref.transpose((1, 0))


def by_warp(count: int, visit: Callable[[int], None]):
    """Calls `visit` for 0 to `count` - 1, each of a warpgroup's warps for its share of them.

    For copies: to start one takes a warp dozens of instructions. What they need to know must have
    been read from shared memory before, and what other warps have written is theirs only after
    `commit_smem`. They arrive at barriers, and are awaited, as a warpgroup's are.
    """

    def share(own):
        for warp in range(WARPS):
            first, last = warp * count // WARPS, (warp + 1) * count // WARPS

            @pl.when(own == warp)
            def _(numbers=range(first, last)):
                for n in numbers:
                    visit(n)

    plgpu.warp_map(share)


def half_of(warpgroup):
    """The rows of a tile that a compute warpgroup owns."""
    return pl.ds(pl.multiple_of(warpgroup * HALF, HALF), HALF)


def keep(x, axis: int, at_least=None, below=None):
    """x [M, N], with -inf where a row's (axis 0) or column's (1) number is out of bounds.

    A bound is a number, or one for each index along the other axis.
    """
    along = along_rows if axis else along_columns
    number = plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA)
    # One bound after the other: both at once would take twice the registers.
    if at_least is not None:
        x = jnp.where(number >= _spread(at_least, along, x.shape), x, -jnp.inf)
    if below is not None:
        x = jnp.where(number < _spread(below, along, x.shape), x, -jnp.inf)
    return x


def _spread(bound, along, shape):
    return along(bound, shape) if bound.ndim else bound


def scores(q_tile, k_tile, bias, hide, *, scale: float, meanwhile: Callable = lambda: None):
    """q k^T of tiles in shared memory, in units of log 2.

    Args:
      q_tile: [M, D].
      k_tile: [N, D].
      bias: as of `logits`.
      hide: likewise.
      scale: likewise.
      meanwhile: is called while the product is being computed.
    """
    shape = q_tile.shape[0], k_tile.shape[0]
    products = multiply(q_tile, transposed(k_tile), shape, meanwhile)
    return logits(products, bias, hide, scale=scale)


def logits(products, bias, hide, *, scale: float):
    """Products of queries and keys [M, N] as logits, in units of log 2.

    Args:
      products: f32.
      bias: None, or a function of the shape that gives the bias in natural units.
      hide: None, or a function of the result that puts -inf where a query must not look.
      scale: of the products.
    """
    found = products * (scale * LOG2E)
    if bias is not None:
        found = found + bias(found.shape) * LOG2E
    return found if hide is None else hide(found)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots in shared memory that are filled and emptied in turns.

    Attributes:
      size: slots.
      ready: a barrier per slot, at which every copy into it arrives.
      used: a barrier per slot, at which every consumer arrives.
      first: slot, where several rings share arrays; others of `Ring.barriers` are theirs.
    """

    size: int
    ready: jax.Ref
    used: jax.Ref
    first: jax.Array | int = 0

    @staticmethod
    def barriers(size: int, copies: int, consumers: int = 2):
        """The scratch that a ring needs: its two barriers."""
        return (
            plgpu.Barrier(num_arrivals=copies, num_barriers=size),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=size),
        )

    def claim(self, turn):
        """The slot of a turn, once it is free to be filled."""
        slot = self.slot(turn)
        pl.when(turn >= self.size)(lambda: plgpu.barrier_wait(self.used.at[slot]))
        return slot

    def slot(self, turn):
        """The slot of a turn."""
        return self.first + lax.rem(turn, self.size)

    def receive(self, turn):
        """The slot of a turn, once it is filled."""
        slot = self.slot(turn)
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def release(self, turn):
        """Says that this warpgroup has done with a turn's slot."""
        plgpu.barrier_arrive(self.used.at[self.slot(turn)])


def launch(
    name: str,
    run: Callable,
    *,
    programs: int,
    operands,
    outputs,
    scratch,
    updated=types.MappingProxyType({}),
    warpgroups: int = 3,
    meets: bool = True,
):
    """Runs a kernel.

    Args:
      name: of the kernel, for profilers and compilers' reports.
      run: is called once per warpgroup with a namespace: `program`, `programs`, `warpgroup`, and
        a reference for each name in the four dicts below, None for None.
      programs: thread blocks.
      operands: dict of arrays, or None.
      updated: dict of arrays, or None, of which the kernel writes a part; in place, where nothing
        else needs what they were. They must not vary over axes of a mesh (`jax.shard_map`), as far
        as JAX knows, and nor do the results.
      outputs: dict of shapes and dtypes.
      scratch: dict of scratch types, trees of them, or None.
      warpgroups: of a thread block.
      meets: whether all warps of a warpgroup meet before each copy, and before and after what they
        write to shared memory. Otherwise `run` sees to it, where they must, by `commit_smem`.

    Returns:
      A dict of arrays, like `updated` and `outputs`.
    """
    given, changed = (
        {k: x for k, x in each.items() if x is not None} for each in (operands, updated)
    )

    def kernel(*refs):
        run(
            types.SimpleNamespace(
                program=lax.axis_index("program"),
                programs=programs,
                warpgroup=lax.axis_index("warpgroup"),
                **dict.fromkeys((*operands, *updated))
                | dict(zip((*given, *changed, *outputs), refs[:-1], strict=True)),
                **refs[-1],
            )
        )

    kernel.__name__ = name
    launched = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[scratch],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not meets),
    )

    def call(*arrays):
        places = [jax.new_ref(x) for x in arrays[len(given) :]]
        results = launched(*arrays[: len(given)], *places)
        return [*map(jax.freeze, places), *results]

    arrays = *given.values(), *changed.values()
    axes = frozenset().union(*map(varying, arrays))
    if axes:
        # Of a mesh, in `jax.shard_map`. `plgpu.warp_map` refuses references that vary over them
        # (JAX 0.11.2), so the kernel is traced as if nothing did.
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        call = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(call)(*shapes))
    found = dict(zip((*changed, *outputs), call(*arrays), strict=True))
    # `plgpu.kernel` forgets that its results vary.
    return found | {name: vary_over(axes, found[name]) for name in outputs}


def share(items: int, at):
    """How many items a program has, of which it takes every `programs`-th."""
    return lax.div(items - at.program + at.programs - 1, at.programs)


def contiguous_share(items, at):
    """(first item, how many) of a program, where each has neighbouring ones; `items` is traced."""
    each, more = lax.div(items, at.programs), lax.rem(items, at.programs)
    first = at.program * each + jnp.minimum(at.program, more)
    return first, each + (at.program < more).astype(jnp.int32)


def roles(block: Callable, loader_registers: int = 40, computing: int = 2) -> Callable:
    """For `launch`: `block(at)` makes what computes in some warpgroups and loads in a further one.

    Args:
      block: makes an object with the methods `load` and `compute`.
      loader_registers: of each thread of the last warpgroup; the others share the rest.
      computing: warpgroups that compute, 2 or 3.
    """
    registers = ((computing + 1) * _REGISTERS[computing] - loader_registers) // computing // 8 * 8

    def run(at):
        member = block(at)
        loads = at.warpgroup == computing

        @pl.when(loads)
        def _():
            plgpu.set_max_registers(loader_registers, action="decrease")
            member.load()

        @pl.when(jnp.logical_not(loads))
        def _():
            plgpu.set_max_registers(registers, action="increase")
            member.compute()

    return run
