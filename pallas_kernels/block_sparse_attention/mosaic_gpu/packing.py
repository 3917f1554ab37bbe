"""Results of entries in 12 bits a number, three quarters of bf16's bytes.

A number has bf16's sign and mantissa, and an exponent of 4 bits. Results lie within the values of
their block, so exponents count down from a power of two above all of the block's values, its scale;
of what is below 2^-14 of it little or nothing is left. A scale comes from its block alone: what
a query gets does not depend on other blocks.

Numbers are packed in the registers that hold them. Four pairs of columns, a quarter of the width
apart, are three words: each has a pair of its own, with 4 bits to spare in each half, and there a
third of the bits of the last pair.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper, hopper_lanes

WORDS = 3  # for four pairs
# Packed numbers are those of f32 between 2^-126 and 2^-111: 4 of their exponent's bits are zero.
_TOP = 112
_PAIR = 0x07FF07FF  # exponents and mantissas of two numbers
_SIGNS = 0x08000800  # their signs, where 12 bits are side by side
_OWN = -0x7800_7801  # all but the bits to spare
_FREE = ((11, 0x000F000F), (7, 0x00F000F0), (3, 0x0F000F00))  # what goes where, of 12 bits each
# About half of 2^112, so that neither what is summed up nor its factor leaves f32's range.
SHIFT = 60
SHIFTED, UNPACKED = 2.0**SHIFT, 2.0 ** (_TOP - SHIFT)


def width(head_dim: int) -> int:
    """Words of a row."""
    return head_dim // 8 * WORDS


def tile(count: int, rows: int, head_dim: int):
    """Shared memory for tiles of packed rows."""
    return hopper.row_tile((count, rows, width(head_dim)), jnp.int32)


def scales(v, block_size: int):
    """A power of two for each block of values, above them: v [B, N, H, D] -> f32 [B, Nb, H].

    Blocks with NaN, infinities or values of 2^60 and above have NaN; it is 2^-40 at least.
    """
    missing = -v.shape[1] % block_size
    most = jnp.pad(jnp.max(jnp.abs(v), axis=3), [(0, 0), (0, missing), (0, 0)])
    most = most.reshape(len(v), -1, block_size, v.shape[2]).max(axis=2).astype(jnp.float32)
    exponent = lax.bitcast_convert_type(most, jnp.int32) & 0x7F800000
    scale = jnp.maximum(2 * lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-40)
    return jnp.where(scale <= 2.0**60, scale, jnp.nan)


def packing_factor(scale, total):
    """What sums of values are to be multiplied with before they are packed.

    Args:
      scale: of the block.
      total: of their weights, each of which is at most 2^-SHIFT.
    """
    return 1 / (total * 2.0**_TOP * scale)


def pack(x):
    """Packs what was multiplied by its factor: f32 [64, D] -> int32 [64, 3 D / 8]."""
    return pack_pairs(hopper_lanes.narrow(x))


def unpack(words):
    """The packed numbers, yet to be multiplied with `SHIFTED`, their block's scale and `UNPACKED`.

    One factor for all three could be more than f32 holds, or so little that sums would be lost.

    Args:
      words: int32 [64, 3 D / 8].

    Returns:
      f32 [64, D].
    """
    return hopper_lanes.widen(unpack_pairs(words))


def unpack_entries(words, scale):
    """The results of entries, outside of kernels.

    Args:
      words: int32 [entries, groups, 3 D / 8].
      scale: f32 [entries], that of each entry's block.

    Returns:
      f32 [entries, groups, D].
    """
    factor = (SHIFTED * scale)[:, None, None]
    return hopper_lanes.plain_widen(unpack_pairs(words)) * factor * UNPACKED


def pack_pairs(pairs):
    """Pairs of bf16 with 4 bits to spare each: int32 [..., D / 2] -> [..., 3 D / 8]."""
    *pairs, last = _split(pairs, WORDS + 1)
    last = (last & _PAIR) | (_shift_right(last, 4) & _SIGNS)
    words = [
        pair | ((last << places) & (bits << places))
        for pair, (places, bits) in zip(pairs, _FREE, strict=True)
    ]
    return jnp.concatenate(words, axis=-1)


def unpack_pairs(words):
    """What `pack_pairs` has packed."""
    words = _split(words, WORDS)
    last = 0
    for word, (places, bits) in zip(words, _FREE, strict=True):
        last = last | (_shift_right(word, places) & bits)
    last = (last & _PAIR) | ((last & _SIGNS) << 4)
    return jnp.concatenate([*(word & _OWN for word in words), last], axis=-1)


def _split(x, parts: int):
    *rest, columns = x.shape
    each, begin = columns // parts, [0] * len(rest)
    return [lax.slice(x, (*begin, n * each), (*rest, (n + 1) * each)) for n in range(parts)]


def _shift_right(x, places: int):
    return lax.shift_right_logical(x, jnp.int32(places))
