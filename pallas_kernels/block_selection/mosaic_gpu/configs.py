"""How the kernels of the selection are cut."""

import dataclasses
import itertools
from collections.abc import Iterator

from pallas_kernels import hopper
from pallas_kernels.hopper import HALF, ROWS

GROUP = 8  # neighbouring blocks: as many rows as TMA copies at least into an operand of wgmma
STEP = HALF * GROUP  # blocks
MOST = 64  # blocks that a query selects
MOST_LISTED = 16  # of candidates in shared memory
MOST_GROUPS = 256  # that a query is rescored in: no row of what TMA copies is longer


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      stages: tiles of 64 or 256 blocks in shared memory at a time, in the search for groups.
      places: queries whose candidates are in shared memory at a time, in the rescoring, of each
        half of a tile.
      programs: thread blocks at most.
    """

    stages: int
    places: int = 2
    programs: int = hopper.MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static about a call.

    Attributes:
      batch, tokens, heads, dim: of the queries.
      count: blocks that a query selects, 8 or a multiple of 16.
      groups: in which the blocks of a query are rescored, likewise; the search finds `count`.
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    count: int
    groups: int

    @property
    def tiles(self):
        """Of 128 queries."""
        return -(-self.tokens // ROWS)

    @property
    def items(self):
        """Tiles of one head."""
        return self.batch * self.tiles * self.heads

    @property
    def part(self):
        """Groups of a query that are scored at a time."""
        few = max(self.count, self.groups) <= 16 and self.dim <= 64
        return self.groups if few else 8

    @property
    def listed(self):
        """Whether the search has lists of candidates in shared memory, not in registers."""
        return self.count <= MOST_LISTED

    @property
    def products(self):
        """Products of 64 queries and 64 blocks for which a tile of features in the search lasts."""
        return 4 if self.listed and self.dim <= 64 else 1

    @property
    def places(self):
        """Tiles of queries in shared memory at a time."""
        return 2 if max(self.count, self.groups) * self.dim <= 32 * 128 else 1

    def locate(self, item):
        """(batch element, tile, KV head) of an item."""
        tile, h = item // self.heads, item % self.heads
        return tile // self.tiles, tile % self.tiles, h


def grid(dim: int) -> Iterator[Config]:
    """Configs that are worth trying."""
    for cut in itertools.product((2, 3), (1, 2, 3)):
        yield Config(*cut)
