"""How the kernels cut a call into tiles, how arrays are laid out, and how far each tile walks.

A sequence is a KV head of a batch element. Tokens lie along the lanes of registers, in all arrays:
so what belongs to a query, such as its range or its log-sum-exp, lies along its column of the
logits; and D = 64, which would leave half of the lanes empty, needs no padding. It is how XLA lays
such arrays out by itself, too. A tile of queries is a matrix of G x tokens columns.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import shapes
from pallas_kernels.tpu import LANES, WALK

_COLUMNS = 1024  # of a tile of queries, about
_TOKENS = 256  # of a tile of queries at most: what one walks over further is seen by few of them
_KEYS = 256  # of a tile of keys at most
_OPERAND_BYTES = 2**21  # of a step's logits at most, in the dtype of the operands
_USUAL_WALK = 1024  # keys that a query is taken to walk over, which only the ranges tell


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static about a call."""

    batch: int
    tokens: int
    num_heads: int
    head_dim: int
    num_keys: int
    num_kv_heads: int
    scale: float
    dtype: jnp.dtype

    @classmethod
    def of(cls, q, k, scale):
        """Of q [B, T, Hq, D] and k [B, N, Hkv, D]."""
        return cls(*q.shape, *k.shape[1:3], scale, jnp.dtype(q.dtype))

    @property
    def groups(self):
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def sequences(self):
        """KV heads of all batch elements."""
        return self.batch * self.num_kv_heads

    @property
    def width(self):
        """Tokens of a tile of queries."""
        return _tile(min(_TOKENS, _COLUMNS // self.groups), self.tokens)

    @property
    def columns(self):
        """Of a tile of queries: all query heads at all its tokens."""
        return self.groups * self.width

    @property
    def tiles(self):
        """Tiles of queries, of each sequence."""
        return -(-self.tokens // self.width)

    @property
    def key_width(self):
        """Keys of a tile of keys."""
        return _tile(
            min(_KEYS, _OPERAND_BYTES // (self.columns * self.dtype.itemsize)), self.num_keys
        )

    @property
    def key_tiles(self):
        """Tiles of keys, of each sequence."""
        return -(-self.num_keys // self.key_width)

    @property
    def temporaries(self):
        """Bytes of what a step makes of its logits; products of f32 take several parts of each."""
        arrays = 4 if self.dtype == jnp.bfloat16 else 12
        return arrays * 4 * self.key_width * self.columns

    @property
    def logits(self):
        """Of all queries and the keys that they see, about."""
        return self.batch * self.num_heads * self.tokens * min(self.num_keys, _USUAL_WALK)

    def query_block(self):
        """A tile of `queries_of`."""
        return pl.BlockSpec(
            (None, self.groups, self.head_dim, self.width), lambda sequence, i: (sequence, 0, 0, i)
        )

    def key_block(self):
        """A tile of `keys_of`."""
        return pl.BlockSpec(
            (None, self.head_dim, self.key_width), lambda sequence, i: (sequence, 0, i)
        )

    def bias_block(self):
        """A tile of `bias_of`."""
        return pl.BlockSpec((None, 1, self.key_width), lambda sequence, i: (sequence, 0, i))

    def plan_block(self, tiles: int):
        """A tile's walk, of the plan of each batch element's tiles."""
        return pl.BlockSpec(
            (None, 1, WALK),
            lambda sequence, i: (sequence // self.num_kv_heads * tiles + i, 0, 0),
            memory_space=pltpu.SMEM,
        )


def _tile(size: int, length: int) -> int:
    """A multiple of the lanes up to a size, and not much longer than an axis."""
    return max(LANES, min(size // LANES, -(-length // LANES)) * LANES)


def queries_of(x, sizes: Sizes):
    """[B, T, Hq, ...] -> [sequences, G, ..., padded T], padded with zeros."""
    x = shapes.pad(x, 1, sizes.width)
    x = x.reshape(sizes.batch, -1, sizes.num_kv_heads, sizes.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 1, -1)
    return x.reshape(sizes.sequences, *x.shape[2:])


def from_queries(x, sizes: Sizes):
    """The inverse of `queries_of`."""
    x = x.reshape(sizes.batch, sizes.num_kv_heads, *x.shape[1:])
    x = jnp.moveaxis(x, -1, 1)
    return x.reshape(sizes.batch, -1, sizes.num_heads, *x.shape[4:])[:, : sizes.tokens]


def keys_of(x, sizes: Sizes):
    """[B, N, Hkv, D] -> [sequences, D, padded N], padded with zeros."""
    x = jnp.moveaxis(shapes.pad(x, 1, sizes.key_width), 1, -1)
    return x.reshape(sizes.sequences, sizes.head_dim, -1)


def from_keys(x, sizes: Sizes):
    """The inverse of `keys_of`."""
    x = x.reshape(sizes.batch, sizes.num_kv_heads, sizes.head_dim, -1)
    return jnp.moveaxis(x, -1, 1)[:, : sizes.num_keys]


def bias_of(x, sizes: Sizes):
    """f32 [B, N, Hkv] -> [sequences, 1, padded N]; None for None."""
    if x is None:
        return None
    return shapes.pad(x, 1, sizes.key_width).swapaxes(1, 2).reshape(sizes.sequences, 1, -1)


def from_bias(x, sizes: Sizes):
    """The inverse of `bias_of`."""
    x = x.reshape(sizes.batch, sizes.num_kv_heads, -1)
    return x.swapaxes(1, 2)[:, : sizes.num_keys]


def ranges_of(start, end, sizes: Sizes):
    """int32 [B, 2, padded T]: starts and ends; what is padded sees nothing."""
    missing = [(0, 0), (0, sizes.tiles * sizes.width - sizes.tokens)]
    start = jnp.pad(start, missing, constant_values=sizes.num_keys)
    return jnp.stack([start, jnp.pad(end, missing, mode="edge")], axis=1)


def _plan(first, last, whole_first, whole_last):
    """Walks of tiles [B, tiles] as int32 [B * tiles, 1, WALK], see `tpu.walk`."""
    following = jnp.roll(first, -1, axis=1)  # the last tile's is not looked at
    plan = jnp.stack([first, last, whole_first, whole_last, following], axis=-1)
    return plan.astype(jnp.int32).reshape(-1, 1, WALK)


def plan_queries(ranges, sizes: Sizes):
    """The walk of each tile of queries over tiles of keys.

    It begins with the first key that its first query with any sees, so its steps do not depend on
    later queries.
    """
    start, end = jnp.moveaxis(ranges.reshape(sizes.batch, 2, sizes.tiles, sizes.width), 1, 0)
    some, width = start < end, sizes.key_width
    first = jnp.min(jnp.where(some, start, sizes.num_keys - 1), axis=2) // width
    last = -(-jnp.max(jnp.where(some, end, 0), axis=2) // width)
    whole_first, whole_last = -(-start[..., -1] // width), end[..., 0] // width
    return _plan(first, jnp.maximum(last, first + 1), whole_first, whole_last)


def plan_keys(ranges, sizes: Sizes):
    """The walk of each tile of keys over the tiles of queries, some of which see it."""
    start, end = jnp.moveaxis(ranges.reshape(sizes.batch, 2, sizes.tiles, sizes.width), 1, 0)
    begin = jnp.arange(sizes.key_tiles, dtype=jnp.int32) * sizes.key_width

    def count(rows, bounds, side):  # numbers below (left) or up to (right) each bound
        return jax.vmap(lambda row: jnp.searchsorted(row, bounds, side=side))(rows)

    first = count(end[..., -1], begin, "right")
    last = count(start[..., 0], begin + sizes.key_width, "left")
    whole_first = count(end[..., 0], begin + sizes.key_width, "left")
    whole_last = count(start[..., -1], begin, "right")
    first = jnp.minimum(first, sizes.tiles - 1)
    return _plan(first, jnp.maximum(last, first + 1), whole_first, whole_last)
