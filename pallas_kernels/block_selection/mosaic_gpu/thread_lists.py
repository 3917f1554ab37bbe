"""Lists of candidates in shared memory, to which each thread adds on its own, in Mosaic's terms.

A thread has two neighbours of every eight columns of a row of scores (see `hopper_lanes`), so four
threads share a row, and each has a list for it, and one for another row. Nobody else reads or
writes them: no barrier is needed, and the order does not depend on who comes first.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import hopper_lanes
from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.hopper import HALF, ROW

DEPTH = 33  # entries of a list
COUNTS = HALF, 8  # shape of a number for each list: column 2 i has those of a row's thread i
_THREADS = 128
_WORD = 4  # bytes: a score, or a number
_STRIDE = _THREADS * _WORD  # from an entry of a list to the next
_NUMBERS = DEPTH * _STRIDE  # from scores to numbers: pairs of them would take pairs of registers
_TOGETHER = 4  # entries that `drop` reads before it writes
_MATRIX = plgpu.Layout.WGMMA
_COUNTS = plgpu.ShapeDtypeStruct(COUNTS, jnp.int32, _MATRIX)
_LIST = plgpu.RefType()


def tile(count: int):
    """Shared memory for the lists of so many warpgroups."""
    return plgpu.SMEM((count, 2, 2, DEPTH, _THREADS), jnp.float32)


def put(tile, scores, origin, enter, filled):
    """Adds scores that are high enough to the lists, with their numbers.

    Args:
      tile: of a warpgroup.
      scores: f32 [64, N].
      origin: f32 [64], the number of column 0; the others follow.
      enter: f32 [64], the lowest score that is added.
      filled: int32 `COUNTS`, how many candidates a list has: at most DEPTH - N / 4.

    Returns:
      `filled`, afterwards.
    """

    @plgpu.inline_mgpu(arg_types=(_LIST, _MATRIX, ROW, ROW, _MATRIX), return_type=_COUNTS)
    def put(_, tile, scores, origin, enter, filled):
        def add(half):
            start = _start(tile, half)
            lane = arith.remui(mgpu.utils.thread_idx(), _word(4))
            number = arith.addf(
                _one(origin, half), arith.sitofp(ir.F32Type.get(), arith.muli(lane, _word(2)))
            )
            columns = [
                (8 * n + e, hopper_lanes.element(scores.registers[hopper_lanes.place(n, half)], e))
                for n in range(scores.shape[1] // 8)
                for e in range(2)
            ]
            # Each address has a register of its own: stores take long to read theirs.
            lines = [
                f"setp.ge.f32 p, ${i + 3}, $1; add.f32 n, $2, {_immediate(column)};"
                f" @p st.shared.f32 [a{i}], ${i + 3}; @p st.shared.f32 [a{i} + {_NUMBERS}], n;"
                f" selp.b32 size, {_STRIDE}, 0, p; add.s32 a{i + 1}, a{i}, size;"
                for i, (column, _) in enumerate(columns)
            ]
            code = (
                f"{{ .reg .pred p; .reg .f32 n; .reg .b32 size, a<{len(lines) + 1}>;"
                f" mov.b32 a0, $0; {' '.join(lines)} mov.b32 $0, a{len(lines)}; }}"
            )
            end = _end(start, filled, half)
            inputs = [_one(enter, half), number, *(score for _, score in columns)]
            end = _assemble(code, inputs, end)
            return _count(start, end)

        return _counts(add)

    return put(tile, scores, origin, enter, filled)


def drop(tile, stay, last, filled):
    """Keeps the candidates that are better than a score, or as good and with a number low enough.

    Args:
      tile: of a warpgroup.
      stay: f32 [64], the score.
      last: f32 [64], the highest number.
      filled: int32 `COUNTS`, how many candidates a list has.

    Returns:
      `filled`, afterwards.
    """

    @plgpu.inline_mgpu(arg_types=(_LIST, ROW, ROW, _MATRIX), return_type=_COUNTS)
    def drop(_, tile, stay, last, filled):
        def keep(half):
            start = _start(tile, half)
            inputs = [_one(stay, half), _one(last, half), _end(start, filled, half)]
            return _count(start, _assemble(_drop_code(), inputs, start))

        return _counts(keep)

    return drop(tile, stay, last, filled)


def load(tile, filled, first, depth: int):
    """Candidates of each list from `first` on: scores and numbers, f32 [64, 4 depth].

    Those of a list are in the columns that its thread has; where there are none, scores are -inf
    and numbers `NOTHING`.

    Args:
      tile: of a warpgroup.
      filled: int32 `COUNTS`, how many candidates a list has.
      first: int32 `COUNTS`, the same for all lists.
      depth: candidates of a list, even.
    """
    result = plgpu.ShapeDtypeStruct((HALF, 4 * depth), jnp.float32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_LIST, _MATRIX, _MATRIX), return_type=(result, result))
    def load(_, tile, filled, first):
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        made = [hopper_lanes.registers(result) for _ in range(2)]
        for half in range(2):
            start = _start(tile, half)
            end = _end(start, filled, half)
            begin = _end(start, first, half)
            for n in range(depth // 2):
                entries = [_load_entry(begin, end, 2 * n + e) for e in range(2)]
                for each, values in zip(made, zip(*entries, strict=True), strict=True):
                    each[hopper_lanes.place(n, half)] = vector.from_elements(pair, list(values))
        return tuple(hopper_lanes.matrix(each, is_signed=None) for each in made)

    return load(tile, filled, first)


def _load_entry(begin, end, n: int):
    """The score and the number of the n-th candidate from an address on, if it is before `end`."""
    single = ir.F32Type.get()
    both = ir.Type.parse("!llvm.struct<(f32, f32)>")
    code = (
        f"{{ .reg .pred p; setp.lt.u32 p, $2, $3; mov.b32 $0, 0fFF800000;"
        f" mov.b32 $1, {_immediate(NOTHING)}; @p ld.shared.f32 $0, [$2];"
        f" @p ld.shared.f32 $1, [$2 + {_NUMBERS}]; }}"
    )
    place = arith.addi(begin, _word(n * _STRIDE))
    constraints = "=&f,=&f,r,r,~{memory}"
    found = llvm.inline_asm(both, [place, end], code, constraints, has_side_effects=True)
    return [llvm.extractvalue(single, found, [i]) for i in range(2)]


def merge(tile, filled, count: int):
    """The numbers of each row in ascending order, f32 [64, count]; `NOTHING` after the last.

    Args:
      tile: of a warpgroup.
      filled: int32 `COUNTS`, how many candidates a list has; their numbers ascend.
      count: columns of the result.
    """
    result = plgpu.ShapeDtypeStruct((HALF, count), jnp.float32, _MATRIX)

    @plgpu.inline_mgpu(arg_types=(_LIST, _MATRIX), return_type=result)
    def merge(_, tile, filled):
        lane = arith.remui(mgpu.utils.thread_idx(), _word(4))
        own = [[None] * (count // 4) for _ in range(2)]
        rows = [_Merge(tile, filled, half) for half in range(2)]
        for column in range(count):  # of both rows, since each waits for shared memory
            i = column // 8 * 2 + column % 2
            ours = arith.cmpi(arith.CmpIPredicate.eq, lane, _word(column % 8 // 2))
            for numbers, row in zip(own, rows, strict=True):
                lowest, before = row.take_lowest(), numbers[i]
                numbers[i] = lowest if before is None else arith.select(ours, lowest, before)
        made = hopper_lanes.registers(result)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for n in range(count // 8):
            for half in range(2):
                numbers = own[half][2 * n : 2 * n + 2]
                made[hopper_lanes.place(n, half)] = vector.from_elements(pair, numbers)
        return hopper_lanes.matrix(made, is_signed=None)

    return merge(tile, filled)


class _Merge:
    """Four lists of numbers, those of a row, of which the lowest can be taken."""

    def __init__(self, tile, filled, half: int):
        self.place = _start(tile, half)
        self.end = _end(self.place, filled, half)
        _, self.number = _load_entry(self.place, self.end, 0)

    def take_lowest(self):
        lowest = self.number
        for distance in (1, 2):
            lowest = arith.minimumf(lowest, mgpu.utils.shfl_bfly(lowest, distance))
        taken = arith.cmpf(arith.CmpFPredicate.OEQ, self.number, lowest)
        self.place = arith.select(taken, arith.addi(self.place, _word(_STRIDE)), self.place)
        _, self.number = _load_entry(self.place, self.end, 0)
        return lowest


def _drop_code():
    """Reads the entries from $0 to $3, and writes those that stay from $0 on.

    Those stay whose score is above $1, or is $1 with a number up to $2.
    """
    # All is set first: what may or may not be loaded would be alive from before the loops.
    read = [
        f"setp.lt.u32 p, r, $3; mov.b32 n{i}, 0; mov.b32 s{i}, 0f7FFFFFFF;"  # NaN: never stays
        f" @p ld.shared.f32 s{i}, [r]; @p ld.shared.f32 n{i}, [r + {_NUMBERS}];"
        f" add.s32 r, r, {_STRIDE};"
        for i in range(_TOGETHER)
    ]
    write = [
        f"setp.eq.f32 p, s{i}, $1; setp.le.and.f32 p, n{i}, $2, p; setp.gt.or.f32 p, s{i}, $1, p;"
        f" @p st.shared.f32 [$0], s{i}; @p st.shared.f32 [$0 + {_NUMBERS}], n{i};"
        f" @p add.s32 $0, $0, {_STRIDE};"
        for i in range(_TOGETHER)
    ]
    registers = f".reg .pred p; .reg .b32 r; .reg .f32 s<{_TOGETHER}>; .reg .f32 n<{_TOGETHER}>;"
    body = " ".join((*read, *write))
    return (
        f"{{ {registers} mov.b32 r, $0; LOOP: setp.ge.u32 p, r, $3; @p bra DONE;"
        f" {body} bra LOOP; DONE: }}"
    )


def _assemble(code: str, inputs, address):
    """Runs code that changes an address, $0; the inputs are $1, $2 and so on."""
    kinds = ["f" if x.type == ir.F32Type.get() else "r" for x in inputs]
    constraints = ",".join(("=r", *kinds, "0", "~{memory}"))
    return llvm.inline_asm(
        address.type, [*inputs, address], code, constraints, has_side_effects=True
    )


def _start(tile, half: int):
    """The address of a thread's list for its first row, or for its second one."""
    thread = arith.remui(mgpu.utils.thread_idx(), _word(_THREADS))
    address = arith.trunci(
        ir.IntegerType.get_signless(32),
        llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(tile)),
    )
    address = arith.addi(address, arith.muli(thread, _word(_WORD)))
    return arith.addi(address, _word(2 * half * _NUMBERS))


def _end(start, filled, half: int):
    """The address after a list's last candidate."""
    return arith.addi(start, arith.muli(_one(filled, half), _word(_STRIDE)))


def _count(start, end):
    return arith.divui(arith.subi(end, start), _word(_STRIDE))


def _counts(of_half):
    """The array `COUNTS` of what is computed for a thread's first row, and for its second one."""
    made = hopper_lanes.registers(_COUNTS)
    pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
    for half in range(2):
        made[hopper_lanes.place(0, half)] = vector.from_elements(pair, [of_half(half), _word(0)])
    return hopper_lanes.matrix(made, is_signed=True)


def _one(x, half: int):
    """A thread's number of an array with one for each row, or for each list."""
    return hopper_lanes.element(x.registers.flat[half], 0)


def _word(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _immediate(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"
