"""That the interpreter of Hopper kernels refuses what the chip would."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax import lax

from pallas_kernels import hopper
from tests.pallas_kernels.hopper_interpreter import interpret


@pytest.mark.parametrize(("width", "aligned"), [(32, True), (8, False)])
def test_copies_begin_at_multiples_of_128_bytes(width, aligned):
    with interpret():
        if aligned:
            jax.block_until_ready(copy_row(width, (width,), lambda out: out))
        else:
            with pytest.raises(ValueError, match="byte 32 of .* no multiple of 128"):
                copy_row(width, (width,), lambda out: out)


@pytest.mark.parametrize("length", [64, 40])
def test_copies_end_within_a_row(length):
    def part(out):
        return out.at[0, pl.ds(pl.multiple_of(lax.axis_index("program") * 32, 32), 32)]

    with interpret():
        if length == 64:
            jax.block_until_ready(copy_row(32, (2, length), part))
        else:
            with pytest.raises(ValueError, match="past the end of a row: .* 32 of 40"):
                copy_row(32, (2, length), part)


def copy_row(width, shape, place):
    """Runs a kernel that copies the second row of 4 to a place of an array."""

    def kernel(at):
        at.tile[...] = jnp.ones((4, width), jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.tile.at[1], place(at.out))
        plgpu.wait_smem_to_gmem(0)

    return hopper.launch(
        "copy", kernel, programs=1, warpgroups=1, operands={"x": jnp.ones(8)},
        outputs={"out": jax.ShapeDtypeStruct(shape, jnp.float32)},
        scratch={"tile": plgpu.SMEM((4, width), jnp.float32)},
    )  # fmt: skip
