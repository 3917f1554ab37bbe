"""That the interpreter of Hopper kernels refuses what the chip would."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from pallas_kernels import hopper
from tests.pallas_kernels.hopper_interpreter import interpret


@pytest.mark.parametrize(("width", "aligned"), [(32, True), (8, False)])
def test_copies_begin_at_multiples_of_128_bytes(width, aligned):
    def kernel(at):
        at.tile[...] = jnp.ones((4, width), jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.tile.at[1], at.out)
        plgpu.wait_smem_to_gmem(0)

    def run():
        out = jax.ShapeDtypeStruct((width,), jnp.float32)
        tile = plgpu.SMEM((4, width), jnp.float32)
        return hopper.launch(
            "copy", kernel, programs=1, warpgroups=1, operands={"x": jnp.ones(8)},
            outputs={"out": out}, scratch={"tile": tile},
        )  # fmt: skip

    with interpret():
        if aligned:
            jax.block_until_ready(run())
        else:
            with pytest.raises(ValueError, match="byte 32 of .* no multiple of 128"):
                run()
