"""What Pallas has no words for on Hopper GPUs: code in Mosaic's own terms, thread by thread.

A warpgroup has four warps of 32 threads. Of a matrix of 64 rows in registers, as `wgmma` leaves it,
a warp has 16 rows; of eight columns a thread has two neighbours in one row, and the same two in the
row eight below.
"""

import functools
import math

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector

from pallas_kernels.hopper import HALF, ROW, WARPS

_WARP_ROWS = HALF // WARPS
_ROW_THREADS = 4  # that share a row
_MATRIX = plgpu.Layout.WGMMA
_BOOL = plgpu.ShapeDtypeStruct((), jnp.bool_, plgpu.Layout.WG_SPLAT(()))
_NUMBERS = plgpu.ShapeDtypeStruct((HALF,), jnp.float32, ROW)
_SEND = "@$0 cp.async.bulk.global.shared::cta.bulk_group [$1], [$2], $3;"


def any_of_warp(marks):
    """Whether anything in a warp's 16 rows is marked, bool; warps need not meet for it.

    So it differs between the warps of a warpgroup: what depends on it must not need all of them.

    Args:
      marks: bool [64], one number per row, or [64, N].
    """

    @plgpu.inline_mgpu(arg_types=(ROW if marks.ndim == 1 else _MATRIX,), return_type=_BOOL)
    def vote(_, x):
        found = nvvm.vote_sync(_everyone(), _of_registers(arith.ori, x), "any")
        return mgpu.FragmentedArray.splat(found, (), is_signed=False)

    return vote(marks)


def largest_of_warp(x):
    """The largest number of each warp's 16 rows, f32 [64], once for each row.

    Args:
      x: f32 [64, N].
    """

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=_NUMBERS)
    def largest(_, x):
        own = _of_registers(arith.maximumf, x)
        most = mgpu.utils.redux(_ordered(own), _everyone(), nvvm.ReductionKind.MAX)
        return _for_rows(arith.bitcast(own.type, _ordered(most)))

    return largest(x)


def lowest_of_warp(x):
    """The lowest number of each warp's 16 rows, f32 [64], once for each row.

    Args:
      x: f32 [64, N], not negative.
    """

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=_NUMBERS)
    def lowest(_, x):
        own = _of_registers(arith.minimumf, x)
        bits = arith.bitcast(_integer(32), own)
        least = mgpu.utils.redux(bits, _everyone(), nvvm.ReductionKind.MIN)
        return _for_rows(arith.bitcast(own.type, least))

    return lowest(x)


def highest_of_rows(x, rank: int):
    """The number of each row that comes at a place, counted from the highest: f32 [64].

    Args:
      x: f32 [64, N].
      rank: the place, a power of two that is N / 2 or divides N / 4; 1 is that of the highest.
    """

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=_NUMBERS)
    def highest(_, x):
        made = np.empty(mgpu.WGMMA_ROW_LAYOUT.registers_shape((HALF,)), object)
        for half, row in enumerate(np.ndindex(made.shape)):
            own = [
                element(x.registers[place(n, half)], e)
                for n in range(x.shape[1] // 8)
                for e in range(2)
            ]
            runs = [_sorted(own[i : i + rank]) for i in range(0, len(own), rank)]
            best = functools.reduce(lambda x, y: _merged(_best_of_both(x, y)), runs)
            # First of two threads of a row, then of all four.
            other = [mgpu.utils.shfl_bfly(x, 1) for x in best]
            few = len(best) < rank
            best = _merged([*best, *reversed(other)] if few else _best_of_both(best, other))
            other = [mgpu.utils.shfl_bfly(x, 2) for x in best]
            lowest = functools.reduce(arith.minimumf, _best_of_both(best, other))
            made[row] = vector.from_elements(ir.VectorType.get((1,), lowest.type), [lowest])
        return mgpu.FragmentedArray(_registers=made, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=None)

    return highest(x)


def _best_of_both(one, other):
    """The highest of two descending runs, as many as are in one: a run that falls and rises."""
    return [arith.maximumf(x, y) for x, y in zip(one, reversed(other), strict=True)]


def _sorted(numbers):
    """In descending order (a bitonic network)."""
    if len(numbers) == 1:
        return numbers
    middle = len(numbers) // 2
    one, other = (_sorted(x) for x in (numbers[:middle], numbers[middle:]))
    return _merged([*one, *reversed(other)])


def _merged(numbers):
    """A run that rises and falls, or falls and rises, in descending order."""
    if len(numbers) == 1:
        return numbers
    middle = len(numbers) // 2
    pairs = list(zip(numbers[:middle], numbers[middle:], strict=True))
    return [
        *_merged([arith.maximumf(x, y) for x, y in pairs]),
        *_merged([arith.minimumf(x, y) for x, y in pairs]),
    ]


def hide(x, first, last):
    """x f32 [64, N] with -inf in the columns before a row's `first` and from its `last` on.

    As `hopper.keep`, but that no register holds the number of a column meanwhile.

    Args:
      x: f32 [64, N].
      first: f32 [64].
      last: f32 [64].
    """
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_MATRIX, ROW, ROW), return_type=result)
    def hide(_, x, first, last):
        single = ir.F32Type.get()
        lane = arith.remui(mgpu.utils.thread_idx(), arith.constant(_integer(32), _ROW_THREADS))
        own = arith.sitofp(single, arith.muli(lane, arith.constant(lane.type, 2)))
        nothing = arith.constant(single, -math.inf)
        made = registers(result)
        for half in range(2):
            # Of this thread's columns, as if it were the first of its row.
            low, high = (arith.subf(element(b.registers.flat[half], 0), own) for b in (first, last))
            for n in range(x.shape[1] // 8):
                kept = []
                for e in range(2):
                    column = arith.constant(single, float(8 * n + e))
                    seen = arith.andi(
                        arith.cmpf(arith.CmpFPredicate.OGE, column, low),
                        arith.cmpf(arith.CmpFPredicate.OLT, column, high),
                    )
                    number = element(x.registers[place(n, half)], e)
                    kept.append(arith.select(seen, number, nothing))
                pair = ir.VectorType.get((2,), single)
                made[place(n, half)] = vector.from_elements(pair, kept)
        return matrix(made, is_signed=None)

    return hide(x, first, last)


def narrow(x):
    """Pairs of numbers, rounded to bf16, as one: f32 [64, N] -> int32 [64, N / 2].

    The first of a pair is in the low half. The pairs of 16 columns come in the order 0, 4, 1, 5, 2,
    6, 3, 7, so that nothing moves between threads.
    """
    rows, columns = x.shape
    result = plgpu.ShapeDtypeStruct((rows, columns // 2), jnp.int32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)
    def narrow(_, x):
        rounded, word = ir.VectorType.get((2,), ir.BF16Type.get()), _integer(32)
        made = registers(result)
        for place in np.ndindex(made.shape):
            pairs = [
                llvm.bitcast(word, arith.truncf(rounded, x.registers[_tile(place, n)]))
                for n in range(2)
            ]
            made[place] = vector.from_elements(ir.VectorType.get((2,), word), pairs)
        return matrix(made, is_signed=True)

    return narrow(x)


def widen(x):
    """The numbers of the pairs that `narrow` made: int32 [64, N / 2] -> f32 [64, N]."""
    rows, columns = x.shape
    result = plgpu.ShapeDtypeStruct((rows, columns * 2), jnp.float32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_MATRIX,), return_type=result)
    def widen(_, x):
        word, number = _integer(32), ir.F32Type.get()
        made = registers(result)
        for place in np.ndindex(x.registers.shape):
            for n in range(2):
                pair = element(x.registers[place], n)
                halves = (
                    arith.shli(pair, arith.constant(word, 16)),
                    arith.andi(pair, arith.constant(word, -(2**16))),
                )
                numbers = [arith.bitcast(number, half) for half in halves]
                made[_tile(place, n)] = vector.from_elements(
                    ir.VectorType.get((2,), number), numbers
                )
        return matrix(made, is_signed=None)

    return widen(x)


def plain_narrow(x):
    """As `narrow`, outside of kernels: f32 [..., N]."""
    x = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    pairs = jnp.swapaxes(bits[..., 0] | bits[..., 1] << 16, -1, -2)
    return lax.bitcast_convert_type(pairs, jnp.int32).reshape(*x.shape[:-4], -1)


def plain_widen(x):
    """As `widen`, outside of kernels: int32 [..., N / 2]."""
    pairs = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 4, 2), -1, -2)
    halves = jnp.stack([pairs << 16, pairs & -(2**16)], axis=-1)
    return lax.bitcast_convert_type(halves, jnp.float32).reshape(*x.shape[:-1], -1)


def spread(ref):
    """For each of 64 rows that which its neighbours share with it, of n numbers in shared memory.

    Args:
      ref: [n], of 32 bits each, for 64 / n rows; n is 4 or 8.

    Returns:
      [64], a number per row.
    """
    result = plgpu.ShapeDtypeStruct((HALF,), ref.dtype, ROW)
    shared = HALF // ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def spread(_, ref):
        dtype = ir.MemRefType(ref.type).element_type
        made = np.empty(mgpu.WGMMA_ROW_LAYOUT.registers_shape((HALF,)), object)
        for half, place in enumerate(np.ndindex(made.shape)):
            index = _first_row(half)
            index = arith.divui(index, arith.constant(index.type, shared))
            number = memref.load(ref, [arith.index_cast(ir.IndexType.get(), index)])
            made[place] = vector.from_elements(ir.VectorType.get((1,), dtype), [number])
        is_signed = True if isinstance(dtype, ir.IntegerType) else None
        return mgpu.FragmentedArray(
            _registers=made, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=is_signed
        )

    return spread(ref)


def send_entries(tile, array, places):
    """Each warp starts the copies of the entries whose rows it has written: of 8 or 16 rows each.

    Its threads alone wait for them (`plgpu.wait_smem_to_gmem`).

    Args:
      tile: [64, W] or [64], of 32 bits each, in shared memory, rows one after the other.
      array: [entries, rows, W] or [entries, rows] in device memory.
      places: int32 [64]: of each row its entry there; -1 for none.
    """
    rows, words = array.shape[1], math.prod(array.shape[2:])
    transforms = (plgpu.TilingTransform((8, words)),) if len(tile.shape) > 1 else ()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), ROW))
    def send(_, tile, array, places):
        size = arith.constant(_integer(32), rows * words * 4)
        for half in range(_WARP_ROWS // rows):
            place = element(places.registers.flat[half], 0)
            source = _at(tile, _first_row(half), words * 4)
            target = _at(array, place, rows * words * 4)
            filled = arith.cmpi(arith.CmpIPredicate.sge, place, arith.constant(place.type, 0))
            _copy(arith.andi(_one_of_warp(), filled), target, source, size)

    send(tile, array, places)


def _everyone():
    """The mask of all threads of a warp."""
    return arith.constant(_integer(32), -1)


def _of_registers(op, x):
    """What op makes of all numbers that a thread has of an array."""
    both = functools.reduce(op, x.registers.flat)
    return functools.reduce(op, [element(both, n) for n in range(both.type.shape[0])])


def _ordered(x):
    """Bits of f32 as integers of the same order, or back: negative ones run the other way."""
    integer = _integer(32)
    bits = x if x.type == integer else arith.bitcast(integer, x)
    sign = arith.shrsi(bits, arith.constant(integer, 31))
    return arith.xori(bits, arith.andi(sign, arith.constant(integer, 2**31 - 1)))


def _for_rows(number):
    """A thread's number, for all of its rows."""
    return mgpu.FragmentedArray.splat(number, (HALF,), mgpu.WGMMA_ROW_LAYOUT)


def _integer(bits: int):
    return ir.IntegerType.get_signless(bits)


def element(register, n: int):
    """Number n of what a register holds."""
    return vector.extract(register, dynamic_position=[], static_position=[n])


def registers(result):
    """Room for the registers of a matrix."""
    return np.empty(mgpu.WGMMA_LAYOUT.registers_shape(result.shape), object)


def place(n: int, half: int):
    """Which register of a matrix has the n-th eight columns of a thread's first or second row."""
    return 0, n, 0, 0, half, 0, 0, 0, 0


def matrix(registers, is_signed):
    """The matrix [64, N] that these registers hold; `is_signed` is None for floats."""
    return mgpu.FragmentedArray(
        _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=is_signed
    )


def _tile(place, n: int):
    """Of two neighbouring tiles of eight columns the n-th, in an array of twice the width."""
    return (place[0], 2 * place[1] + n, *place[2:])


def _first_row(half: int):
    """The first of the rows that a warp has, or of their second half."""
    warp = arith.remui(mgpu.utils.warp_idx(), arith.constant(_integer(32), WARPS))
    row = arith.muli(warp, arith.constant(warp.type, _WARP_ROWS))
    return arith.addi(row, arith.constant(row.type, 8 * half))


def _at(ref, index, size: int):
    """The address of element `index` of so many bytes."""
    wide = arith.extsi(_integer(64), index)
    offset = arith.muli(wide, arith.constant(wide.type, size))
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], _integer(8))


def _one_of_warp():
    return mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARP)


def _copy(predicate, target, source, size):
    operands = [predicate, target, source, size]
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, _SEND, "b,l,l,r", has_side_effects=True)
