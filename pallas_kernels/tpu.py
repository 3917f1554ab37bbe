"""What the Mosaic TPU kernels share: how they are launched, and how they walk over tiles."""

import math
import types
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mesh_axes import vary_alike

LANES = 128
LOG2E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
# Of on-chip memory, for one kernel. v5e and v6e have 128 MiB, v5p 64 MiB. The kernels' tiles are
# large enough with much less, so that one set of sizes serves all three.
VMEM_BUDGET = 48 * 2**20
WALK = 5  # numbers that describe a walk, see `walk`


def product(a, b, axis_a: int, axis_b: int):
    """The product of two matrices, summed over an axis of each, in f32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def column(row, length: int):
    """A row [1, length] as a column [length, 1]."""
    return jnp.broadcast_to(row, (8, length)).T[:, :1]


def padded_bytes(shape: Sequence[int | None], dtype) -> int:
    """Of an array in VMEM, where its last two axes are padded to whole registers."""
    *rest, rows, columns = (1, 1, *(1 if size is None else size for size in shape))
    size = jnp.dtype(dtype).itemsize
    rows = -(-rows // (32 // size)) * (32 // size)
    return math.prod(rest) * rows * -(-columns // LANES) * LANES * size


def vmem_bytes(blocks, scratch, temporaries: int) -> int:
    """Bytes of VMEM that a kernel takes.

    Args:
      blocks: (array or ShapeDtypeStruct, BlockSpec) of operands and outputs; there are two of each
        block, one in use and one on its way.
      scratch: a tree of scratch types.
      temporaries: bytes of values that are too large for registers.
    """
    total = temporaries
    for array, spec in blocks:
        if spec.block_shape is not None and spec.memory_space != pltpu.SMEM:
            total += 2 * padded_bytes(spec.block_shape, array.dtype)
    for leaf in jax.tree.leaves(scratch):
        if leaf.memory_space == pltpu.VMEM:
            total += padded_bytes(leaf.shape, leaf.dtype)
    return total


def launch(
    name: str,
    run: Callable,
    *,
    grid: tuple[int, int],
    operands,
    outputs,
    scratch,
    temporaries: int,
    products: int,
    head_dim: int,
):
    """Runs a kernel.

    Args:
      name: of the kernel, for profilers and compilers' reports.
      run: is called with a namespace that has a reference for each name in the three dicts below,
        None for None.
      grid: sequences and their tiles. Only the tiles of one sequence run in order, see `walk`.
      operands: dict of (array, BlockSpec), or None.
      outputs: dict of (ShapeDtypeStruct, BlockSpec), or None.
      scratch: dict of scratch types, or None.
      temporaries: see `vmem_bytes`.
      products: of queries and keys, one number each, of `head_dim` terms. With this, XLA plans.

    Returns:
      A dict of arrays, like `outputs`.

    Raises:
      ValueError: if it needs more than VMEM_BUDGET.
    """
    given, made, kept = (
        {name: x for name, x in each.items() if x is not None}
        for each in (operands, outputs, scratch)
    )
    need = vmem_bytes([*given.values(), *made.values()], kept, temporaries)
    if need > VMEM_BUDGET:
        raise ValueError(f"{name} needs {need} bytes of VMEM, over {VMEM_BUDGET}: use xla")
    absent = dict.fromkeys((*operands, *outputs, *scratch))

    def kernel(*refs):
        names = (*given, *made, *kept)
        run(types.SimpleNamespace(**absent | dict(zip(names, refs, strict=True))))

    arrays = vary_alike(*(array for array, _ in given.values()))
    manual = jax.typeof(arrays[0]).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=manual) for x, _ in made.values()
    ]
    results = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in made.values()],
        scratch_shapes=list(kept.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=need
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * head_dim,
            transcendentals=products,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        name=name,
    )(*arrays)
    return dict(zip(made, results, strict=True))


def walk(plan, turn, copies: Callable, step: Callable) -> None:
    """Walks over tiles that lie in HBM; while one is computed with, the next is on its way.

    The first tile of a walk is fetched during the last step of the walk before, along the last
    axis of the grid.

    Args:
      plan: int32 [1, WALK] in SMEM: the first tile of this walk and the one after its last (there
        is at least one), the same of the tiles that are seen whole, the first of the next walk.
      turn: int32 [1], scratch in SMEM.
      copies: makes the copies of a tile into one of two slots, from the tile and the slot.
      step: computes with a tile, given the tile, its slot, and whether it is not seen whole.
    """
    more = pl.program_id(1) + 1 < pl.num_programs(1)
    first, last, whole_first, whole_last, following = (plan[0, n] for n in range(WALK))

    def start(tile, slot):
        for copy in copies(tile, slot):
            copy.start()

    @pl.when(pl.program_id(1) == 0)
    def _():
        turn[0] = 0
        start(first, 0)

    begin = turn[0] - first

    @pl.loop(first, last)
    def _(tile):
        slot = lax.rem(begin + tile, 2)
        ends = tile + 1 == last

        @pl.when(jnp.logical_not(ends) | more)
        def _():
            start(jnp.where(ends, following, tile + 1), 1 - slot)

        for copy in copies(tile, slot):
            copy.wait()
        whole = (whole_first <= tile) & (tile < whole_last)
        pl.when(whole)(lambda: step(tile, slot, False))
        pl.when(jnp.logical_not(whole))(lambda: step(tile, slot, True))

    turn[0] = lax.rem(begin + last, 2)
