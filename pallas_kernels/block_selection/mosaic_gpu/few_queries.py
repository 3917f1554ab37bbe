"""Selection for a few queries, as in decoding: the blocks are shared out among thread blocks.

One kernel takes the best of each part of the blocks, a second one the best of those, as often as
needed. Each of their thread blocks has one warpgroup and one query, whose candidates lie in a
matrix of 64 rows in registers. Each warp takes out its K best in order, without waiting for the
others; then these are ranked.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes, shapes
from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.hopper import HALF, along_columns, along_rows

_COLUMNS = 8  # of a product: queries, here all the same
_PART = HALF * _COLUMNS  # blocks of a thread block
_LIST = 16  # rows of a warp, which hold a list of its best; results are padded to a multiple
_CANDIDATES = 4096  # of a thread block of the second kernel, at most


def _matrix(shape):
    """The row and the column of each candidate, int32."""
    return (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )


def _lists(scores, numbers, count: int):
    """The best `count` of each warp's 16 rows of scores [64, N], in order: [(score, number)].

    Each pair, f32 [64] both, has 16 candidates of each warp.
    """
    place = lax.rem(plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=hopper.ROW), _LIST)

    def take(n, state):
        scores, to_score, to_number = state
        top = hopper_lanes.largest_of_warp(scores)
        best = scores == along_rows(top, scores.shape)
        first = hopper_lanes.lowest_of_warp(jnp.where(best, numbers, NOTHING))
        to_score = jnp.where(place == n, top, to_score)
        to_number = jnp.where(place == n, first, to_number)
        taken = numbers == along_rows(first, scores.shape)
        return jnp.where(taken, -jnp.inf, scores), to_score, to_number

    lists = []
    for _ in range(count // _LIST):
        empty = (hopper.full((HALF,), x, hopper.ROW) for x in (-jnp.inf, 0))
        scores, *found = lax.fori_loop(0, _LIST, take, (scores, *empty))
        lists.append(found)
    return lists


def _join(lists, at):
    """Brings the lists of all warps into one order: (score, number), f32 [64] both, by column.

    A candidate's place is the number of those that are better.
    """
    for n, found in enumerate(lists):
        for tile, x in zip((at.score_tile, at.number_tile), found, strict=True):
            tile[n] = x
    plgpu.commit_smem()
    shape = HALF, HALF
    place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    joined = [hopper.full((HALF,), x, hopper.COLUMN) for x in (-jnp.inf, -1)]

    for found in lists:
        score, number = (along_rows(x, shape) for x in found)
        better = hopper.full((HALF,), 0, hopper.ROW)
        for n in range(len(lists)):
            other, other_number = (
                along_columns(plgpu.load(tile.at[n], layout=hopper.COLUMN), shape)
                for tile in (at.score_tile, at.number_tile)
            )
            ahead = (other > score) | ((other == score) & (other_number < number))
            better += jnp.where(ahead, 1.0, 0.0).sum(axis=1)
        here = place.astype(jnp.float32) == along_rows(better, shape)
        joined = [
            jnp.maximum(x, jnp.where(here, y, -jnp.inf).max(axis=0))
            for x, y in zip(joined, (score, number), strict=True)
        ]
    return joined


def _take_best(scores, numbers, at):
    """Writes out the best of scores [64, N] in order; of equal ones the lowest number first."""
    found = _join(_lists(scores, numbers, at.out_score.shape[1]), at)
    plgpu.commit_smem()  # All warps have read the lists.
    _store(at, *found)


def _store(at, score, number):
    """Writes out the first places of f32 [64] both; the numbers of the last kernel are integers."""
    number_tile = at.number_tile.at[0]
    if at.out_number.dtype == jnp.int32:
        number = jnp.where(score > -jnp.inf, number, -1).astype(jnp.int32)
        number_tile = at.integer_tile
    at.score_tile[0] = score
    number_tile[...] = number
    plgpu.commit_smem()
    places = pl.ds(0, at.out_score.shape[1])
    plgpu.copy_smem_to_gmem(at.score_tile.at[0, places], at.out_score.at[at.program])
    plgpu.copy_smem_to_gmem(number_tile.at[places], at.out_number.at[at.program])
    plgpu.wait_smem_to_gmem(0)


def _score(heads: int, tokens: int, parts: int, at):
    """The best blocks of one part, for one query."""
    query, part = lax.div(at.program, parts), lax.rem(at.program, parts)
    token, h = lax.div(query, heads), lax.rem(query, heads)
    first = part * _PART
    low, high = at.start[token] - first, at.limit[token] - first
    shape = HALF, _COLUMNS

    def products():
        b = lax.div(token, tokens)
        tiles = [pl.ds(n * HALF, HALF) for n in range(_COLUMNS)]
        for n, tile in enumerate(tiles):
            blocks = pl.ds(pl.multiple_of(first + n * HALF, HALF), HALF)
            plgpu.copy_gmem_to_smem(at.c.at[b, blocks, h], at.c_tile.at[tile], at.ready)
        # The query in each row: of a tile that `wgmma` reads, copies take 8 rows at least.
        u = plgpu.load(at.u.at[query], layout=hopper.COLUMN, optimized=False)
        at.u_tile[...] = along_columns(u, (HALF, u.shape[0]))
        plgpu.commit_smem()
        plgpu.barrier_wait(at.ready)
        columns = hopper.transposed(at.u_tile.at[pl.ds(0, _COLUMNS)])

        def multiply(*accs):
            for acc, tile in zip(accs, tiles, strict=True):
                plgpu.wgmma(acc, at.c_tile.at[tile], columns)
            return [acc[...] for acc in accs]

        return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for _ in tiles))

    row, column = _matrix(shape)
    number = column * HALF + row

    @pl.when((low < _PART) & (high > 0))
    def _():
        scores = hopper.full(shape, -jnp.inf)
        for n, product in enumerate(products()):  # all columns of a product are the same
            scores = jnp.where(column == n, product, scores)
        scores = jnp.where(number >= low, scores, -jnp.inf)
        scores = jnp.where(number < high, scores, -jnp.inf)
        _take_best(scores, (number + first).astype(jnp.float32), at)

    @pl.when((low >= _PART) | (high <= 0))
    def _():
        _store(at, *(hopper.full((HALF,), x, hopper.ROW) for x in (-jnp.inf, 0)))


def _merge(at):
    """The best of the candidates of one program."""
    scores, numbers = (
        plgpu.load(x.at[at.program], layout=plgpu.Layout.WGMMA, optimized=False)
        for x in (at.score, at.number)
    )
    _take_best(scores, numbers, at)


def _launch(name, run, programs, width, last, operands, scratch):
    lists = dict.fromkeys(
        ("score_tile", "number_tile"), plgpu.SMEM((width // _LIST, HALF), jnp.float32)
    )
    results = hopper.launch(
        name,
        run,
        programs=programs,
        warpgroups=1,
        operands=operands,
        outputs={
            "out_score": jax.ShapeDtypeStruct((programs, width), jnp.float32),
            "out_number": jax.ShapeDtypeStruct(
                (programs, width), jnp.int32 if last else jnp.float32
            ),
        },
        scratch=scratch
        | lists
        | {"integer_tile": plgpu.SMEM((HALF,), jnp.int32) if last else None},
    )
    return results["out_score"], results["out_number"]


@functools.partial(jax.jit, static_argnames="count")
def select_few(u, c, limit, start, *, count: int):
    """index int32 and score f32 [B, T, Hkv, count]; arguments as of `mosaic_gpu.select`.

    T need not be a multiple of anything.
    """
    batch, tokens, heads, dim = u.shape
    queries = batch * tokens * heads
    width = -(-count // _LIST) * _LIST
    parts = -(-c.shape[1] // _PART)
    if parts > 1:  # as many as fill the rows of the next kernel
        parts = -(-parts * width // _PART) * _PART // width
    score, number = _launch(
        "score_few", functools.partial(_score, heads, tokens, parts), queries * parts, width,
        parts == 1,
        {"u": u.reshape(queries, dim), "c": c, "limit": limit.ravel(), "start": start.ravel()},
        {"u_tile": hopper.operand_tile((HALF, dim)),
         "c_tile": hopper.operand_tile((_PART, dim)),
         "ready": plgpu.Barrier(num_arrivals=_COLUMNS)},
    )  # fmt: skip
    while parts > 1:
        each = min(-(-parts * width // _PART) * _PART, _CANDIDATES)
        score, number = (
            shapes.pad(x.reshape(queries, -1), 1, each, fill=fill).reshape(-1, HALF, each // HALF)
            for x, fill in ((score, -jnp.inf), (number, 0))
        )
        parts = len(score) // queries
        score, number = _launch(
            "merge_few", _merge, len(score), width, parts == 1,
            {"score": score, "number": number}, {},
        )  # fmt: skip
    shape = batch, tokens, heads, width
    score, number = (x.reshape(shape)[..., :count] for x in (score, number))
    return number, score
