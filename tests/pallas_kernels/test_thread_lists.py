"""Lists that threads keep in shared memory: on a GPU, and as tests elsewhere take them to be."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, hopper_lanes
from pallas_kernels.block_selection.mosaic_gpu import thread_lists
from pallas_kernels.block_selection.mosaic_gpu.lists import NOTHING
from pallas_kernels.block_selection.mosaic_gpu.thread_lists import COUNTS, DEPTH
from pallas_kernels.hopper import HALF
from tests.pallas_kernels import plain_lists

RANK, LAST, LOADED, MERGED = 16, 90.0, 16, 32
NAMES = "put", "drop", "load", "merge"


def steps(put, drop, load, merge, highest_of_rows, tile, scores, zeros, row, number):
    """Two steps of candidates, of which some go again, in terms of the functions given.

    Args:
      scores: two of f32 [64, 64].
      zeros: int32 `COUNTS`.
      row: makes one number for all rows.
      number: of the first candidate of each list to load.

    Returns:
      The score that 16 of each row reach, scores and numbers in the lists, and the lowest numbers.
    """
    bound = highest_of_rows(scores[0], RANK)
    filled = put(tile, scores[0], row(0.0), bound, zeros)
    filled = put(tile, scores[1], row(64.0), bound, filled)
    filled = drop(tile, highest_of_rows(scores[1], RANK), row(LAST), filled)
    return bound, *load(tile, filled, zeros + number, LOADED), merge(tile, filled, MERGED)


def in_a_kernel(scores, number: int):
    """`steps` as a kernel runs them."""

    def run(at):
        plgpu.copy_gmem_to_smem(at.scores, at.scores_tile, at.ready)
        plgpu.barrier_wait(at.ready)
        both = [plgpu.load(at.scores_tile.at[n], layout=plgpu.Layout.WGMMA) for n in range(2)]
        functions = (getattr(thread_lists, name) for name in NAMES)
        zeros = plgpu.layout_cast(jnp.zeros(COUNTS, jnp.int32), plgpu.Layout.WGMMA)
        at.bound_tile[...], at.found_tile[0], at.found_tile[1], at.merged_tile[...] = steps(
            *functions, hopper_lanes.highest_of_rows, at.list_tile.at[0], both, zeros,
            lambda x: hopper.full((HALF,), x, hopper.ROW), number,
        )  # fmt: skip
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.bound_tile, at.bound)
        plgpu.copy_smem_to_gmem(at.found_tile, at.found)
        plgpu.copy_smem_to_gmem(at.merged_tile, at.merged)
        plgpu.wait_smem_to_gmem(0)

    found = 2, HALF, 4 * LOADED
    tiled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    results = hopper.launch(
        "thread_lists", run, programs=1, operands={"scores": scores}, warpgroups=1,
        outputs={
            "bound": jax.ShapeDtypeStruct((HALF,), jnp.float32),
            "found": jax.ShapeDtypeStruct(found, jnp.float32),
            "merged": jax.ShapeDtypeStruct((HALF, MERGED), jnp.float32),
        },
        scratch={
            "scores_tile": plgpu.SMEM(scores.shape, jnp.float32, transforms=tiled),
            "list_tile": thread_lists.tile(1),
            "bound_tile": plgpu.SMEM((HALF,), jnp.float32),
            "found_tile": plgpu.SMEM(found, jnp.float32, transforms=tiled),
            "merged_tile": plgpu.SMEM((HALF, MERGED), jnp.float32, transforms=tiled),
            "ready": plgpu.Barrier(num_arrivals=1),
        },
    )  # fmt: skip
    return results["bound"], *results["found"], results["merged"]


class Tile:
    """An array that is changed in place."""

    def __init__(self, x):
        self.x, self.shape = x, x.shape

    def __getitem__(self, place):
        return self.x

    def __setitem__(self, place, x):
        self.x = x


@pytest.mark.parametrize("number", [0, 3])
def test_against_plain_lists(hopper, number):
    """With whole numbers, so that some scores are as good as the bound, and -inf."""
    scores = np.round(8 * np.random.default_rng(number).normal(size=(2, HALF, HALF)))
    scores[:, :, 5:40] = np.where(scores[:, :, 5:40] < -4, -np.inf, scores[:, :, 5:40])
    scores = jnp.asarray(scores, jnp.float32)
    expected = steps(
        *(getattr(plain_lists, name) for name in (*NAMES, "highest_of_rows")),
        Tile(jnp.full((2, 2, DEPTH, 128), jnp.nan)), scores, jnp.zeros(COUNTS, jnp.int32),
        lambda x: jnp.full(HALF, x), number,
    )  # fmt: skip
    found = jax.jit(in_a_kernel, static_argnames="number")(scores, number=number)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    bound, score, number, merged = expected
    assert np.all((scores[0] >= bound[:, None]).sum(axis=1) >= RANK)
    assert np.all((score > -np.inf) == (number < NOTHING))
    assert np.all(np.diff(merged, axis=1)[merged[:, 1:] < NOTHING] > 0)
