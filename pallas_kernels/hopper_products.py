"""Products of matrices that a warpgroup begins, and takes later, in Mosaic's terms.

`plgpu.wgmma` adds to an accumulator, which has to be zeros at first, and takes the results of one
product at a time. Here both are left to the caller.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import hopper_lanes
from pallas_kernels.hopper import HALF

_MATRIX = plgpu.Layout.WGMMA


def begin(rows, others):
    """Begins to multiply all rows with all others: f32 [64, N], which only `finish` takes.

    Other than `plgpu.wgmma` it adds to nothing, so there are no zeros to begin with.

    Args:
      rows: bf16 [64, d], in shared memory as `hopper.operand_tile` makes it; d is a multiple of 64.
      others: bf16 [N, d], likewise.
    """
    (count, dim), size = others.shape, others.shape[0] // 2
    result = plgpu.ShapeDtypeStruct((HALF, count), jnp.float32, _MATRIX)
    swizzled = plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled),) * 2, return_type=result)
    def start(_, *operands):
        single = ir.F32Type.get()
        numbers = llvm.inline_asm(
            llvm.StructType.get_literal([single] * size),
            [_described(x, dim) for x in operands], _products_code(count, dim),
            ",".join(["=&f"] * size + ["l", "l", "~{memory}"]), has_side_effects=True,
        )  # fmt: skip
        made, pair = hopper_lanes.registers(result), ir.VectorType.get((2,), single)
        for n in range(count // 8):
            for half in range(2):
                found = [llvm.extractvalue(single, numbers, [4 * n + 2 * half + e]) for e in (0, 1)]
                made[hopper_lanes.place(n, half)] = vector.from_elements(pair, found)
        return hopper_lanes.matrix(made, is_signed=None)

    return start(rows, others)


def _described(ref, dim: int):
    """An operand of `wgmma` in shared memory, whose rows are swizzled by 128 bytes."""
    wide = ir.IntegerType.get_signless(64)

    def constant(value):
        return arith.constant(wide, value)

    address = llvm.ptrtoint(wide, mgpu.utils.memref_ptr(ref))
    address = arith.andi(arith.shrui(address, constant(4)), constant(2**14 - 1))
    eight_rows = 16 * dim  # bytes
    return arith.ori(address, constant(1 << 62 | eight_rows >> 4 << 32 | 1 << 16))


def _products_code(count: int, dim: int) -> str:
    """Products of 16 columns each, of which the first one does not add; last come the operands."""
    size = count // 2
    made = ", ".join(f"${i}" for i in range(size))
    lines = []
    for n in range(dim // 16):
        offset = (n // 4 * 1024 + n % 4 * 32) >> 4
        lines.append(
            f"add.s64 a, ${size}, {offset}; add.s64 b, ${size + 1}, {offset};"
            f" wgmma.mma_async.sync.aligned.m64n{count}k16.f32.bf16.bf16 {{{made}}}, a, b,"
            f" {int(n > 0)}, 1, 1, 0, 0;"
        )
    return (
        f"{{ .reg .b64 a, b; wgmma.fence.sync.aligned; {' '.join(lines)}"
        " wgmma.commit_group.sync.aligned; }"
    )


def finish(products):
    """The products, once they are there.

    Args:
      products: of `begin`.
    """
    result = plgpu.ShapeDtypeStruct(products.shape, jnp.float32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)
    def wait(_, x):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], "wgmma.wait_group.sync.aligned 0;", "", has_side_effects=True)
        return mgpu.optimization_barrier(x)  # nothing that needs them comes before

    return wait(products)
