"""How the kernels cut a call into tiles, and how far each tile walks."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.hopper import HALF, ROWS
from pallas_kernels.segments import first_places


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
      step: keys (forward, dQ) or query rows (dK, dV) of a step of a walk.
      stages: steps in shared memory at a time.
      places: tiles of queries in shared memory at a time, in forward and dQ.
      programs: thread blocks at most.
      computing: warpgroups that compute, in forward and dQ: 2 or 3, each on 64 rows of a tile.
    """

    step: int = 64
    stages: int = 4
    places: int = 2
    programs: int = hopper.MULTIPROCESSORS
    computing: int = 2


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
    biased: bool
    computing: int  # warpgroups

    @classmethod
    def of(cls, q, k, key_bias, scale, config: Config):
        """Of q [B, T, Hq, D], k [B, N, Hkv, D], a bias or None, and how the kernel is cut."""
        return cls(*q.shape, *k.shape[1:3], scale, key_bias is not None, config.computing)

    @property
    def groups(self):
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self):
        """Rows of a tile of queries."""
        return HALF * self.computing

    @property
    def width(self):
        """Tokens of a tile of queries."""
        return self.rows // self.groups // 8 * 8

    @property
    def tiles(self):
        """Tiles of queries, of each batch element and KV head."""
        return -(-self.tokens // self.width)

    @property
    def key_tiles(self):
        """Tiles of keys, likewise."""
        return -(-self.num_keys // ROWS)

    @property
    def items(self):
        """Tiles of queries in all."""
        return self.batch * self.tiles * self.num_kv_heads

    @property
    def key_items(self):
        """Tiles of keys in all."""
        return self.batch * self.key_tiles * self.num_kv_heads

    def locate(self, item, tiles):
        """(batch element, tile, KV head) of a work item."""
        tile = lax.div(item, self.num_kv_heads)
        return lax.div(tile, tiles), lax.rem(tile, tiles), lax.rem(item, self.num_kv_heads)


def plan_queries(start, end, sizes: Sizes, step: int):
    """int32 [B, tiles, 3, rows]: the starts and the ends of a tile's rows, and its walk.

    The walk: its first key, its steps, and the first and last step that all rows see whole.
    """
    shape = sizes.batch, sizes.tiles, sizes.width
    pad = [(0, 0), (0, sizes.tiles * sizes.width - sizes.tokens)]
    start, end = (jnp.pad(x, pad, mode="edge").reshape(shape) for x in (start, end))
    first = start[..., 0] // 8 * 8
    # One step at least, since the first one begins before the others.
    steps = jnp.maximum(1, (end[..., -1] - first + step - 1) // step)
    whole_first = jnp.minimum((start[..., -1] - first + step - 1) // step, steps)
    whole_last = jnp.clip((end[..., 0] - first) // step, whole_first, steps)
    walk = jnp.stack([first, steps, whole_first, whole_last], axis=-1)
    walk = jnp.pad(walk, [(0, 0), (0, 0), (0, sizes.rows - 4)])
    row = jnp.arange(sizes.rows) % sizes.width
    return jnp.stack([start[..., row], end[..., row], walk], axis=2)


def plan_keys(start, end, sizes: Sizes, step: int):
    """int32 [B, key tiles, 2, 8]: the walk of each half of a tile over the queries.

    The first query and the steps, both of the whole tile; the half's first and last step, and
    its first and last step whose queries all see the half whole; the half's first key.
    """
    halves = 2 * sizes.key_tiles
    key = jnp.arange(halves, dtype=jnp.int32) * HALF

    def first_of(half):  # query whose half has at least each number, from 1 on
        return jax.vmap(lambda row: first_places(row, halves))(half)[:, 1:]

    first = first_of(-(-end // HALF))  # whose end is past the half's first key
    last = jnp.maximum(first_of(start // HALF), first)
    whole_first = first_of(end // HALF)
    whole_last = first_of(-(-start // HALF))
    origin = jnp.repeat(first[:, ::2] // 8 * 8, 2, axis=1)

    def steps_to(token):  # complete ones
        return jnp.maximum(token - origin, 0) // step

    own_first, own_last = steps_to(first), steps_to(last + step - 1)
    # A half whose walk is empty takes no step, whatever the other does.
    own_last = jnp.where(last > first, own_last, own_first)
    steps = jnp.repeat(jnp.maximum(own_last[:, ::2], own_last[:, 1::2]), 2, axis=1)
    whole_first = jnp.clip(steps_to(whole_first + step - 1), own_first, own_last)
    whole_last = jnp.clip(steps_to(whole_last), whole_first, own_last)
    columns = [origin, steps, own_first, own_last, whole_first, whole_last]
    plan = jnp.stack([*columns, jnp.broadcast_to(key, steps.shape)], axis=-1).astype(jnp.int32)
    plan = jnp.pad(plan, [(0, 0), (0, 0), (0, 1)])
    return plan.reshape(sizes.batch, sizes.key_tiles, 2, 8)


def by_tile(x, sizes: Sizes):
    """f32 [B, T, Hq] -> [B, tiles, Hkv, rows], in the order of a tile's rows: head by head."""
    pad = [(0, 0), (0, sizes.tiles * sizes.width - sizes.tokens), (0, 0)]
    shape = sizes.batch, sizes.tiles, sizes.width, sizes.num_kv_heads, sizes.groups
    x = jnp.pad(x, pad).reshape(shape).transpose(0, 1, 3, 4, 2)
    x = x.reshape(*x.shape[:3], -1)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, sizes.rows - x.shape[3])])


def by_token(x, sizes: Sizes):
    """The inverse of `by_tile`."""
    x = x[..., : sizes.groups * sizes.width]
    x = x.reshape(*x.shape[:3], sizes.groups, sizes.width).transpose(0, 1, 4, 2, 3)
    return x.reshape(sizes.batch, -1, sizes.num_heads)[:, : sizes.tokens]
