"""Code in Mosaic's own terms: what it computes on a GPU, and what tests elsewhere take for it."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper as kernels
from pallas_kernels import hopper_lanes, hopper_products
from pallas_kernels.ahead_of_time import compile_for
from pallas_kernels.hopper import HALF, by_warp


def round_trip(x, numbers, places, rows: int):
    """A kernel that does all of it with x [64, N].

    Returns:
      x rounded to bf16, times `numbers` (n of them, for 64 / n rows each); these numbers as
      [entries, rows], and the packed pairs as [entries, rows, N / 2], of which `places` says
      where they go.
    """
    width = x.shape[1] // 2

    def run(at):
        plgpu.copy_gmem_to_smem(at.x, at.x_tile, at.barrier)
        plgpu.copy_gmem_to_smem(at.numbers, at.numbers_tile, at.barrier)
        plgpu.copy_gmem_to_smem(at.places, at.places_tile, at.barrier)
        plgpu.barrier_wait(at.barrier)
        pairs = hopper_lanes.narrow(plgpu.load(at.x_tile, layout=plgpu.Layout.WGMMA))
        factor = hopper_lanes.spread(at.numbers_tile.at[pl.ds(0, len(numbers))])
        wide = hopper_lanes.widen(pairs) * kernels.along_rows(factor, x.shape)
        own = hopper_lanes.spread(at.places_tile.at[pl.ds(0, HALF // rows)])
        at.pairs_tile[...] = pairs
        at.factor_tile[...] = factor
        at.x_tile[...] = wide
        plgpu.commit_smem()
        hopper_lanes.send_entries(at.pairs_tile, at.pairs, own)
        hopper_lanes.send_entries(at.factor_tile, at.factors, own)
        plgpu.commit_smem_to_gmem_group()
        plgpu.copy_smem_to_gmem(at.x_tile, at.wide)
        plgpu.wait_smem_to_gmem(0)

    entries = HALF // rows + 1
    found = kernels.launch(
        "round_trip",
        run,
        programs=1,
        operands={"x": x, "numbers": jnp.pad(numbers, (0, 32 - len(numbers))), "places": places},
        updated={
            "pairs": jnp.full((entries, rows, width), 7, jnp.int32),
            "factors": jnp.full((entries, rows), 7, jnp.float32),
        },
        outputs={"wide": jax.ShapeDtypeStruct(x.shape, jnp.float32)},
        scratch={
            "x_tile": kernels.row_tile(x.shape, jnp.float32),
            "numbers_tile": plgpu.SMEM((32,), jnp.float32),
            "places_tile": plgpu.SMEM((32,), jnp.int32),
            "pairs_tile": kernels.row_tile((HALF, width), jnp.int32),
            "factor_tile": plgpu.SMEM((HALF,), jnp.float32),
            "barrier": plgpu.Barrier(num_arrivals=3),
        },
        warpgroups=1,
    )
    return found["wide"], found["factors"], found["pairs"]


ROWS, WIDTH = (8, 16), 48  # Mosaic stores no rows of 128 bytes and more without a swizzle


def operands(rows: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(HALF, WIDTH)).astype(np.float32)
    numbers = rng.normal(size=HALF // rows).astype(np.float32)
    places = np.full(32, -1, np.int32)
    places[: HALF // rows] = rng.permutation(HALF // rows)
    places[1] = -1
    return jnp.asarray(x), jnp.asarray(numbers), jnp.asarray(places)


@pytest.mark.parametrize("rows", ROWS)
def test_against_plain_numbers(hopper, rows):
    x, numbers, places = operands(rows)
    wide, factors, pairs = jax.jit(round_trip, static_argnames="rows")(
        x, numbers, places, rows=rows
    )
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float32)
    each = np.repeat(np.asarray(numbers), rows)
    np.testing.assert_array_equal(wide, rounded * each[:, None])
    packed = np.asarray(hopper_lanes.plain_narrow(x)).reshape(-1, rows, WIDTH // 2)
    for found, sent in ((pairs, packed), (factors, each.reshape(-1, rows))):
        expected = np.full_like(found, 7)
        for n, place in enumerate(np.asarray(places)[: HALF // rows]):
            if place >= 0:
                expected[place] = sent[n]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_warps_share_copies(hopper, count):
    """Pieces of 8 rows, which leave in reverse order; also interpreted it is warps that copy."""
    x = jnp.arange(count * 8 * 32, dtype=jnp.int32).reshape(-1, 32)

    def run(at):
        def piece(n):
            return pl.ds(n * 8, 8)

        def load(n):
            plgpu.copy_gmem_to_smem(at.x.at[piece(n)], at.x_tile.at[piece(n)], at.barrier)

        def store(n):
            target = at.out.at[piece(count - 1 - n)]
            plgpu.copy_smem_to_gmem(at.x_tile.at[piece(n)], target, commit_group=False)

        by_warp(count, load)
        plgpu.barrier_wait(at.barrier)
        by_warp(count, store)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    @jax.jit
    def copy(x):
        return kernels.launch(
            "share_copies", run, programs=1, operands={"x": x}, outputs={"out": x}, warpgroups=1,
            scratch={
                "x_tile": plgpu.SMEM(x.shape, x.dtype),
                "barrier": plgpu.Barrier(num_arrivals=count),
            },
        )["out"]  # fmt: skip

    expected = np.asarray(x).reshape(count, 8, 32)[::-1].reshape(x.shape)
    np.testing.assert_array_equal(copy(x), expected)


@pytest.mark.parametrize("dim", [64, 128])
def test_products_and_hidden_columns(hopper, dim):
    """Whole numbers, so that products are exact."""
    rng = np.random.default_rng(2)
    rows, others = (jnp.asarray(rng.integers(-9, 10, (HALF, dim)), jnp.bfloat16) for _ in range(2))
    first, last = (jnp.asarray(rng.integers(-9, 75, HALF), jnp.float32) for _ in range(2))

    def run(at):
        for name in ("rows", "others", "first", "last"):
            plgpu.copy_gmem_to_smem(getattr(at, name), getattr(at, f"{name}_tile"), at.barrier)
        plgpu.barrier_wait(at.barrier)
        x = hopper_products.finish(hopper_products.begin(at.rows_tile, at.others_tile))
        bounds = (plgpu.load(x, layout=kernels.ROW) for x in (at.first_tile, at.last_tile))
        at.out_tile[0], at.out_tile[1] = x, hopper_lanes.hide(x, *bounds)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.out_tile, at.out)
        plgpu.wait_smem_to_gmem(0)

    shape = 2, HALF, HALF
    tiled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

    @jax.jit
    def multiply(rows, others, first, last):
        return kernels.launch(
            "products", run, programs=1, warpgroups=1,
            operands={"rows": rows, "others": others, "first": first, "last": last},
            outputs={"out": jax.ShapeDtypeStruct(shape, jnp.float32)},
            scratch={
                "rows_tile": kernels.operand_tile(rows.shape),
                "others_tile": kernels.operand_tile(others.shape),
                "out_tile": plgpu.SMEM(shape, jnp.float32, transforms=tiled),
                "first_tile": plgpu.SMEM((HALF,), jnp.float32),
                "last_tile": plgpu.SMEM((HALF,), jnp.float32),
                "barrier": plgpu.Barrier(num_arrivals=4),
            },
        )["out"]  # fmt: skip

    found = multiply(rows, others, first, last)
    expected = np.asarray(rows, np.float32) @ np.asarray(others, np.float32).T
    np.testing.assert_array_equal(found[0], expected)
    column = np.arange(HALF)
    seen = (column >= first[:, None]) & (column < last[:, None])
    np.testing.assert_array_equal(found[1], np.where(seen, expected, -np.inf))


def test_pairs_come_back():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 48)), jnp.float32)
    pairs = hopper_lanes.plain_narrow(x)
    assert pairs.shape == (3, 24)
    np.testing.assert_array_equal(hopper_lanes.plain_widen(pairs), x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        pairs[:, 0] & 0xFFFF,
        np.asarray(jax.lax.bitcast_convert_type(x[:, 0].astype(jnp.bfloat16), jnp.uint16)),
    )
    # Of the second pair that stands there the numbers were those of columns 8 and 9.
    second = jax.lax.bitcast_convert_type(pairs[:, 1:2], jnp.bfloat16).reshape(3, 2)
    np.testing.assert_array_equal(second, x[:, 8:10].astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", ROWS)
def test_compiles(rows):
    compilation = compile_for("h200", lambda *x: round_trip(*x, rows=rows), *operands(rows))
    (kernel,) = compilation.kernels
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
