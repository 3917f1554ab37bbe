"""Results of entries in 12 bits a number, three quarters of bf16's bytes.

A number has bf16's sign and mantissa, and an exponent of 4 bits. Results lie within the values of
their block, so exponents count down from a power of two above all of the block's values, its scale;
2^-15 of it and less is rounded in steps of 2^-22 of it. A scale comes from its block alone: what
a query gets does not depend on other blocks.

Numbers are packed in the registers that hold them: eight columns, an eighth of the width apart, are
three words. Each word has two numbers with 4 bits free in front of each, and a third of the bits
of another two is put there.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper

COLUMNS, WORDS = 8, 3  # that go together
# Packed numbers are those of f32 between 2^-126 and 2^-111: 4 of their exponent's bits are zero.
_TOP = 112
_PAIR = 0x07FF07FF  # exponents and mantissas of two numbers
_SIGNS = 0x08000800  # their signs, where 12 bits are side by side
_HALF_UNIT = 0x8000  # of bf16's last bit
_FREE = ((11, 0x000F000F), (7, 0x00F000F0), (3, 0x0F000F00))  # what goes where, of 12 bits each
_MIDDLE = 60
UNPACKED = 2.0 ** (_TOP - _MIDDLE)


def width(head_dim: int) -> int:
    """Words of a row."""
    return head_dim // COLUMNS * WORDS


def tile(count: int, rows: int, head_dim: int):
    """Shared memory for tiles of packed rows."""
    return hopper.row_tile((count, rows, width(head_dim)), jnp.int32)


def scales(v, block_size: int):
    """A power of two for each block of values, above them: v [B, N, H, D] -> f32 [B, Nb, H].

    Blocks with NaN, infinities or values of 2^37 and above have NaN; it is 2^-40 at least.
    """
    missing = -v.shape[1] % block_size
    most = jnp.pad(jnp.max(jnp.abs(v), axis=3), [(0, 0), (0, missing), (0, 0)])
    most = most.reshape(len(v), -1, block_size, v.shape[2]).max(axis=2).astype(jnp.float32)
    exponent = lax.bitcast_convert_type(most, jnp.int32) & 0x7F800000
    scale = jnp.maximum(2 * lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-40)
    return jnp.where(scale <= 2.0**37, scale, jnp.nan)


def packing_factor(scale):
    """What results are to be multiplied with before they are packed."""
    return 2.0**-_TOP / scale


def unpacking_factor(scale):
    """What unpacked numbers are to be multiplied with, and then, summed or not, with `UNPACKED`.

    One factor for both could be more than f32 holds, or so little that what is summed is lost.
    """
    return scale * 2.0**_MIDDLE


def pack(x):
    """Packs what was multiplied by `packing_factor`: f32 [..., D] -> int32 [..., 3 D / 8]."""
    columns = _split(lax.bitcast_convert_type(x, jnp.int32) + _HALF_UNIT, COLUMNS)
    low, high = columns[::2], columns[1::2]
    pairs = [_shift_right(x, 16) | (y & -0x10000) for x, y in zip(low, high, strict=True)]
    last = pairs.pop()
    last = (last & _PAIR) | (_shift_right(last, 4) & _SIGNS)
    words = [
        pair | ((last << places) & (bits << places))
        for pair, (places, bits) in zip(pairs, _FREE, strict=True)
    ]
    return jnp.concatenate(words, axis=-1)


def unpack(words):
    """The packed numbers, yet to be multiplied as `unpacking_factor` says.

    Args:
      words: int32 [..., 3 D / 8].

    Returns:
      f32 [..., D].
    """
    words = _split(words, WORDS)
    last = 0
    for word, (places, bits) in zip(words, _FREE, strict=True):
        last = last | (_shift_right(word, places) & bits)
    last = (last & _PAIR) | ((last & _SIGNS) << 4)
    own = [word & -0x7800_7801 for word in words]
    columns = [x for pair in (*own, last) for x in (pair << 16, pair & -0x10000)]
    return jnp.concatenate([lax.bitcast_convert_type(x, jnp.float32) for x in columns], axis=-1)


def unpack_entries(words, scale):
    """The results of entries.

    Args:
      words: int32 [entries, groups, 3 D / 8].
      scale: f32 [entries], that of each entry's block.

    Returns:
      f32 [entries, groups, D].
    """
    return unpack(words) * unpacking_factor(scale)[:, None, None] * UNPACKED


def _split(x, parts: int):
    *rest, columns = x.shape
    each, begin = columns // parts, [0] * len(rest)
    return [lax.slice(x, (*begin, n * each), (*rest, (n + 1) * each)) for n in range(parts)]


def _shift_right(x, places: int):
    return lax.shift_right_logical(x, jnp.int32(places))
