"""Selection for a few queries, as in decoding: the blocks are shared out among thread blocks.

One kernel takes the best of each part of the blocks, a second one the best of those, as often as
needed. Each of their thread blocks has one warpgroup and one query, whose candidates lie in a
matrix of 64 rows in registers, and takes out the best in order, K times.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, shapes
from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.hopper import HALF

FEW = 4  # queries of a sequence at most
_COLUMNS = 8  # of a product: queries, here all the same
_PART = HALF * _COLUMNS  # blocks of a thread block
_WIDTH = 16  # results are padded to a multiple
_CANDIDATES = 2048  # of a thread block of the second kernel, at most


def _matrix(shape):
    """The row and the column of each candidate, int32."""
    return (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )


def _take_best(scores, numbers, at):
    """Writes out the best of scores [64, N] in order; of equal ones the lowest number first."""
    count = at.out_score.shape[1]
    place = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=hopper.ROW)

    def take(n, state):
        scores, to_score, to_number = state
        top = scores.max(axis=1).max()
        first = jnp.where(scores == top, numbers, NOTHING).min(axis=1).min()
        to_score = jnp.where(place == n, top, to_score)
        to_number = jnp.where(place == n, first, to_number)
        return jnp.where(numbers == first, -jnp.inf, scores), to_score, to_number

    empty = (hopper.full((HALF,), x, hopper.ROW) for x in (-jnp.inf, 0))
    _, to_score, to_number = lax.fori_loop(0, count, take, (scores, *empty))
    at.score_tile[...] = to_score
    at.number_tile[...] = to_number
    plgpu.commit_smem()
    for tile, out in ((at.score_tile, at.out_score), (at.number_tile, at.out_number)):
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, count)], out.at[at.program])
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
        plgpu.copy_gmem_to_smem(at.u.at[query], at.u_tile, at.ready)
        plgpu.barrier_wait(at.ready)

        def multiply(*accs):
            for acc, tile in zip(accs, tiles, strict=True):
                plgpu.wgmma(acc, at.c_tile.at[tile], hopper.transposed(at.u_tile))
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
        at.score_tile[...] = hopper.full((HALF,), -jnp.inf, hopper.ROW)
        plgpu.commit_smem()
        tile = at.score_tile.at[pl.ds(0, at.out_score.shape[1])]
        plgpu.copy_smem_to_gmem(tile, at.out_score.at[at.program])
        plgpu.wait_smem_to_gmem(0)


def _merge(at):
    """The best of the candidates of one program."""
    scores, numbers = (
        plgpu.load(x.at[at.program], layout=plgpu.Layout.WGMMA, optimized=False)
        for x in (at.score, at.number)
    )
    _take_best(scores, numbers, at)


def _launch(name, run, programs, width, operands, scratch):
    results = hopper.launch(
        name,
        run,
        programs=programs,
        warpgroups=1,
        operands=operands,
        outputs=dict.fromkeys(
            ("out_score", "out_number"), jax.ShapeDtypeStruct((programs, width), jnp.float32)
        ),
        scratch=scratch
        | dict.fromkeys(("score_tile", "number_tile"), plgpu.SMEM((HALF,), jnp.float32)),
    )
    return results["out_score"], results["out_number"]


@functools.partial(jax.jit, static_argnames="count")
def select_few(u, c, limit, start, *, count: int):
    """index int32 and score f32 [B, T, Hkv, count]; arguments as of `mosaic_gpu.select`.

    T need not be a multiple of anything.
    """
    batch, tokens, heads, dim = u.shape
    queries = batch * tokens * heads
    width = -(-count // _WIDTH) * _WIDTH
    parts = -(-c.shape[1] // _PART)
    u = jnp.broadcast_to(u.reshape(queries, 1, dim), (queries, _COLUMNS, dim))
    score, number = _launch(
        "score_few", functools.partial(_score, heads, tokens, parts), queries * parts, width,
        {"u": u, "c": c, "limit": limit.ravel(), "start": start.ravel()},
        {"u_tile": hopper.operand_tile((_COLUMNS, dim)),
         "c_tile": hopper.operand_tile((_PART, dim)),
         "ready": plgpu.Barrier(num_arrivals=_COLUMNS + 1)},
    )  # fmt: skip
    while parts > 1:
        each = min(-(-parts * width // _PART) * _PART, _CANDIDATES)
        score, number = (
            shapes.pad(x.reshape(queries, -1), 1, each, fill=fill).reshape(-1, HALF, each // HALF)
            for x, fill in ((score, -jnp.inf), (number, 0))
        )
        score, number = _launch(
            "merge_few", _merge, len(score), width, {"score": score, "number": number}, {}
        )
        parts = len(score) // queries
    shape = batch, tokens, heads, width
    score, number = (x.reshape(shape)[..., :count] for x in (score, number))
    return jnp.where(score > -jnp.inf, number, -1).astype(jnp.int32), score
